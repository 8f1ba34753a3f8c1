"""Prints what prepared launches give compiled kernels, without a GPU: see test_triton_compile."""

import json
from unittest import mock

import torch
import triton

from opsd_kernels import Plan, layouts, plan
from opsd_kernels.backends import triton_backend, triton_row_gradients
from opsd_kernels.backends.triton_launch import PreparedLaunch
from opsd_kernels.backends.triton_math import Epilogue
from opsd_kernels.problem import DivergenceProblem, Execution, GradsNeeded, Head
from tests.helpers.recording_driver import RecordingDriver, record

TOKENS, HIDDEN, VOCAB = 17, 16, 200


def one_launch(driver: RecordingDriver) -> list[dict[str, object]]:
    """The same launch three times, the last one in another stream."""
    rows, columns = 3, 128
    z, merged = torch.empty(2, rows, columns), torch.empty(4, rows)
    dz = [x.view(torch.bfloat16)[:, :columns] for x in z]
    bias = torch.empty(columns, dtype=torch.bfloat16)
    launch = PreparedLaunch(
        triton_row_gradients.row_jsd_shares, rows,
        *z, Epilogue(bias, None, 0.5), Epilogue(None, 30.0, 1.0), merged, merged[0], merged[:2],
        *dz, rows, columns, columns, z.stride(1), dz[0].stride(0), merged.stride(0), 0.5, 0.5,
        BLOCK_V=256, LANES=32, HEAD_STATISTICS=2, num_warps=1, num_stages=1, enable_fp_fusion=True,
    )  # fmt: skip
    for driver.stream in (7, 7, 8):
        launch()
    names = "kernel", "grid", "stream", "arguments"
    return [dict(zip(names, found, strict=True)) for found in driver.launches]


def a_call() -> None:
    """A JSD in blocks of two sizes and two slices."""
    weights = torch.zeros(2, VOCAB, HIDDEN)
    heads = [Head(torch.zeros(TOKENS, HIDDEN), w, None, None, 1.0) for w in weights]
    p = DivergenceProblem(*heads, None, None, 0.5, None, False, Execution("tiled", None, None))
    triton_backend.divergence(p, chosen(), None, GradsNeeded(hidden=True))


def chosen() -> Plan:
    """Blocks of 5 or 4 rows, slices of 128 columns."""
    with mock.patch.multiple(layouts, _SLICES=(128,), _WAVES=()):
        return plan(TOKENS, HIDDEN, VOCAB, device="cuda", schedule="tiled", workspace_bytes=8_000)


def main() -> None:
    driver, by_triton, whole = record(), [], triton.JITFunction.run

    def watched(kernel: triton.JITFunction, *how: object, **flags: object) -> object:
        by_triton.append(kernel.fn.__name__)
        return whole(kernel, *how, **flags)

    with mock.patch.object(triton.JITFunction, "run", watched):
        found: dict[str, object] = {"launches": one_launch(driver), "by_triton": len(by_triton)}
        driver.launches.clear()
        by_triton.clear()
        a_call()
    names = [name for name, *_ in driver.launches]
    found["sizes"] = layouts.even_blocks(TOKENS, chosen().rows_per_block)
    found["merges"] = names.count("merge")
    found["all"], found["all_by_triton"] = len(names), len(by_triton)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
