"""Triton's interpreter, made faster, and in Triton 3.6 to clamp as compiled kernels do."""

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable
from types import ModuleType

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


class _Nothing:
    """Stands for patches that were there already."""

    def restore(self) -> None:
        return


@functools.cache
def prepare() -> None:
    """To be called once Triton is imported for its interpreter, in each process."""
    interpreter.InterpreterBuilder.create_clampf = _clamp
    _patch_once()
    _types_once()
    _shortcuts()
    # Every sum of integers is checked for overflow, and the result dropped unless Triton debugs.
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, sanitize_overflow=False)


def _clamp(
    self: interpreter.InterpreterBuilder,
    x: interpreter.TensorHandle,
    low: interpreter.TensorHandle,
    high: interpreter.TensorHandle,
    propagate_nan: object,
) -> interpreter.TensorHandle:
    """As Triton 3.9's, whose NaN becomes a bound like on a GPU; that of 3.6 stays NaN."""
    if propagate_nan == interpreter._ir.PROPAGATE_NAN.NONE:
        return self.binary_op(self.binary_op(x, low, np.fmax), high, np.fmin)
    return self.ternary_op(x, low, high, np.clip)


def _patch_once() -> None:
    """Each launch lays the interpreter's patches of triton.language once.

    The interpreter lays them again for every call of a device function, thousands in a launch,
    which is nearly half of what a kernel's test takes. Laying them twice changes nothing.
    """
    lay, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    laid: set[ModuleType] = set()

    @functools.cache
    def seen(function: Callable) -> set[ModuleType]:
        values = function.__globals__.values()
        return {x for x in values if inspect.ismodule(x) and (x is tl or x is tl.core)}

    def lay_once(function: Callable) -> object:
        if seen(function) <= laid:
            return _Nothing()
        laid.update(seen(function))
        return lay(function)

    def launch(self: interpreter.GridExecutor, *arguments: object, **options: object) -> None:
        laid.clear()
        try:
            run(self, *arguments, **options)
        finally:
            laid.clear()

    interpreter._patch_lang = lay_once
    interpreter.GridExecutor.__call__ = launch


def _types_once() -> None:
    """Types of blocks, and shapes of tensors, are checked and described once for each shape.

    Each operation on a block makes both again, which is a third of what a kernel's test takes.
    """
    core, describe, numpy_type = tl.core, tl.block_type.__init__, interpreter._get_np_dtype
    known: dict[tuple[object, ...], dict[str, object]] = {}
    numpy_types: dict[str, np.dtype] = {}

    def block_type(self: tl.block_type, element: tl.dtype, shape: list[int]) -> None:
        key = (element.name, *map(core._unwrap_if_constexpr, shape))
        if key not in known:
            describe(self, element, shape)
            known[key] = dict(vars(self))
        vars(self).update(known[key], element_ty=element)

    @functools.cache
    def sizes(shape: tuple[int, ...]) -> tuple[tl.tuple, tl.constexpr]:
        return core.tuple([tl.constexpr(n) for n in shape]), tl.constexpr(math.prod(shape))

    def tensor(self: tl.tensor, handle: interpreter.TensorHandle, kind: tl.dtype) -> None:
        self.handle, self.type, self.dtype = handle, kind, kind.scalar
        self.shape, self.numel = sizes(tuple(kind.shape) if kind.is_block() else ())

    def of_numpy(kind: tl.dtype) -> np.dtype:
        name = kind.scalar.name
        if name not in numpy_types:
            numpy_types[name] = numpy_type(kind)
        return numpy_types[name]

    tl.block_type.__init__, tl.tensor.__init__ = block_type, tensor
    interpreter._get_np_dtype = of_numpy


def _shortcuts() -> None:
    """Answers at once what nearly every operation asks of a plain value or of two equal shapes."""
    unwrap, broadcast = tl.core._unwrap_if_constexpr, TritonSemantic.broadcast_impl_value

    @functools.cache
    def plain(kind: type) -> bool:
        return not issubclass(kind, list | tuple | tl.tuple | tl.constexpr)

    def unwrap_value(value: object) -> object:
        return value if plain(type(value)) else unwrap(value)

    def same_shape(self: TritonSemantic, lhs: tl.tensor, rhs: tl.tensor) -> tuple[tl.tensor, ...]:
        one, two = lhs.type, rhs.type
        if one.is_block() and two.is_block() and one.shape.values == two.shape.values:
            return lhs, rhs
        return broadcast(self, lhs, rhs)

    tl.core._unwrap_if_constexpr = unwrap_value
    TritonSemantic.broadcast_impl_value = same_shape
