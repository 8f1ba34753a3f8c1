"""Counts matrix products with the profiler, from the shapes of their operands."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from opsd_kernels.testing import make_pair

N, D, V = 96, 48, 640


GEMM = 2 * N * D * V


HEAD = ("student_input", "student_weight")


# Where the operand shapes (rows, inner) and (inner, columns) stand among the profiled arguments.
OPERANDS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::baddbmm_": (1, 2),
    "aten::_addmm_activation": (1, 2),
    "aten::mv": (0, 1),
    "aten::addmv": (1, 2),
    "aten::addmv_": (1, 2),
}


def gemms(fn: Callable[[], object]) -> float:
    """Products of fn in units of 2 N D V; an operator inside a counted one is not counted again."""
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as recorded:
        fn()
    flops = 0
    for event in recorded.events():
        outer = event.cpu_parent
        while outer is not None and outer.name not in OPERANDS:
            outer = outer.cpu_parent
        if event.name in OPERANDS and outer is None:
            first, second = (event.input_shapes[i] for i in OPERANDS[event.name])
            columns = second[-1] if len(second) > 1 else 1
            flops += 2 * torch.Size(first).numel() * columns
    return flops / GEMM


def case(**options: object) -> dict[str, Tensor]:
    return make_pair(N, D, V, dtype=torch.float32, **options)
