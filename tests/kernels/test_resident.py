"""A pair's rows in one pass: whoever may take it, and programs that wait for each other."""

from collections.abc import Callable

import pytest
import torch

from opsd_kernels import reference
from opsd_kernels.backends.triton_config import ResidentBlocks
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import make_pair
from tests.helpers import compiled
from tests.helpers.kernel_cases import STUDENT, check, move, run, same_bits

BETAS = pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 1.0])
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.fixture
def launched(triton_device: str, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each launch."""
    from opsd_kernels.backends.triton_rows_launch import StoredTiles

    rows, whole = [], StoredTiles.resident

    def watched(tiles: StoredTiles, *how: object) -> None:
        rows.append(tiles.rows)
        whole(tiles, *how)

    monkeypatch.setattr(StoredTiles, "resident", watched)
    return rows


@BETAS
def test_the_passes_apart_give_the_same(
    beta: float, launched: list[int], triton_device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU too small to hold a row's programs takes them one after the other."""
    from opsd_kernels.backends import triton_backend

    pair = move(make_pair(8, 24, 131, masked=2, dtype=torch.float32, seed=8), triton_device)
    how = {"beta": beta, "reduction": "none", "schedule": "blocked"}
    ones = [torch.ones(8, device=triton_device)]
    together = run(fused_linear_jsd, pair, STUDENT, ones, **how)
    assert launched == [6]
    few = ResidentBlocks(1, 1, 1, {})
    monkeypatch.setattr(triton_backend, "resident_blocks", lambda *_: few)
    apart = run(fused_linear_jsd, pair, STUDENT, ones, **how)
    assert launched == [6]
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)  # of fp32 sums


@pytest.mark.parametrize(
    ("how", "wrt"),
    [
        ({}, ()),
        ({"token_clip": 0.05}, STUDENT),
        ({"schedule": "tiled"}, STUDENT),
        ({"schedule": "streaming"}, STUDENT),
    ],
    ids=str,
)
def test_what_needs_passes_apart_has_them(
    how: dict, wrt: tuple, launched: list[int], triton_device: str
) -> None:
    pair = move(make_pair(8, 16, 70, dtype=torch.float32), triton_device)
    run(fused_linear_jsd, pair, wrt, **{"schedule": "blocked", **how})
    assert not launched


class TestPrograms:
    pytestmark = ON_A_GPU

    @BETAS
    @pytest.mark.parametrize("sizes", [(700, 64, 9111), (3, 16, 300001), (1, 8, 4097)], ids=str)
    def test_parts_of_a_row(self, sizes: tuple[int, int, int], beta: float) -> None:
        """Several programs a row, with all that they add up."""
        pair = make_pair(*sizes, masked=sizes[0] // 5, seed=12)
        options = {"beta": beta, "temperature": 1.3, "return_stats": True, "schedule": "blocked"}
        options |= {"student_softcap": 9.0, "teacher_softcap": 7.0}

        def flatly(fn: Callable) -> Callable:
            chosen = {k: v for k, v in options.items() if fn is fused_linear_jsd or k != "schedule"}
            return lambda **p: compiled.flat(fn(**p, **chosen))

        how = {"device": "cuda", "max_factor": 4.0}
        check(flatly(fused_linear_jsd), flatly(reference.linear_jsd), pair, STUDENT, **how)

    @BETAS
    def test_the_same_bits_each_time(self, beta: float) -> None:
        """A value read before it was told would not stand there every time."""
        pair = move(make_pair(900, 64, 50257, dtype=torch.bfloat16, seed=2), "cuda")
        how = {"beta": beta, "reduction": "none", "schedule": "blocked"}
        ones = [torch.ones(900, device="cuda")]
        first = run(fused_linear_jsd, pair, STUDENT[:1], ones, **how)
        for _ in range(50):
            same_bits(first, run(fused_linear_jsd, pair, STUDENT[:1], ones, **how))
