"""Triton's interpreter, made faster: its patches of triton.language are laid once a launch.

It lays them again for every call of a device function, thousands in a launch, which is nearly half
of what a kernel's test takes. Laying them twice changes nothing.
"""

import functools
import inspect
from collections.abc import Callable
from types import ModuleType

import triton.language as tl
from triton.runtime import interpreter


class _Nothing:
    """Stands for patches that were there already."""

    def restore(self) -> None:
        return


def patch_once() -> None:
    """From here on each launch lays the patches once for each module that its functions see."""
    if hasattr(interpreter._patch_lang, "once"):
        return
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

    lay_once.once = True
    interpreter._patch_lang = lay_once
    interpreter.GridExecutor.__call__ = launch
