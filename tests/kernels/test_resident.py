"""A pair's rows in one pass: whoever may take it, and programs that wait for each other."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from opsd_kernels import reference
from opsd_kernels.backends.triton_config import ResidentBlocks
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.testing import make_pair
from tests.helpers import compiled
from tests.helpers.kernel_cases import STUDENT, check, move, run, same_bits
from tests.kernels.test_triton_differences import PADDED, ROWS, VOCAB, logits, truth

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


class TestOnePass:
    """Values, statistics and dz from logits; 16 bits take other formulas than float32 (FAST)."""

    @BETAS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("kind", ["random", "25%", "0.5%", "offset", "banned", "one-hot"])
    def test_kinds(self, kind: str, dtype: torch.dtype, beta: float, triton_device: str) -> None:
        check_one_pass(logits(kind), beta, dtype, triton_device)

    @BETAS
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
    @pytest.mark.parametrize("cap", [None, 5.0])
    def test_softcap_and_two_temperatures(
        self, cap: float | None, dtype: torch.dtype, beta: float, triton_device: str
    ) -> None:
        check_one_pass(logits("random"), beta, dtype, triton_device, cap, (2.0, 0.8))


def check_one_pass(
    pair: tuple[Tensor, Tensor],
    beta: float,
    dtype: torch.dtype,
    device: str,
    cap: float | None = None,
    t: tuple[float, float] = (1.0, 1.0),
) -> None:
    """`StoredTiles.resident` against float64 autograd over full logits."""
    from opsd_kernels.backends import passes
    from opsd_kernels.backends.passes import FORWARD_KL, JSD, REVERSE_KL, Layout
    from opsd_kernels.backends.triton_rows_launch import StoredTiles
    from opsd_kernels.problem import Head

    exact = tuple(x.float().double() for x in pair)
    value, grad = truth(exact, beta, cap, t)
    z = torch.full((2, ROWS, PADDED), -torch.inf, device=device)
    z[:, :, :VOCAB] = torch.stack(exact).float()
    hidden, weight = z.new_empty(ROWS, 1, dtype=dtype), z.new_empty(VOCAB, 1, dtype=dtype)
    heads = [Head(hidden, weight, None, cap, each) for each in t]
    layout = Layout(2, True, False, True, {0.0: FORWARD_KL, 1.0: REVERSE_KL}.get(beta, JSD))
    merged, sums = z.new_empty(layout.count, ROWS), z.new_empty(2, ROWS)
    labels = torch.arange(ROWS, device=device) * 411
    tiles = StoredTiles(z, heads, hidden)
    tiles.resident(layout, labels, 0, merged, sums, beta, None)
    found = (sums[0] if layout.kind == JSD else passes.kl_of(layout, merged)[0]).cpu().double()
    torch.testing.assert_close(found, value, rtol=2e-4, atol=1e-7 if layout.kind == JSD else 1e-6)
    for i, (raw, each) in enumerate(zip(exact, t, strict=True)):
        logp = ((cap * (raw / cap).tanh() if cap else raw) / each).log_softmax(-1)
        head = {name: x.cpu().double() for name, x in layout.head(merged, i).items()}
        entropy = torch.special.entr(logp.exp()).sum(-1)
        torch.testing.assert_close(passes.entropy_of(head), entropy, rtol=2e-5, atol=2e-6)
        label = logp.gather(1, labels.cpu()[:, None])[:, 0]
        rounding = 1e-7 * float(raw[raw.isfinite()].abs().max())  # of the logits in base 2
        torch.testing.assert_close(passes.logprob_of(head), label, rtol=1e-6, atol=rounding)
    # Stored in fp16: the gradient of z, not of the raw logit, times FP16_BOOST.
    dz = tiles.dz(dtype)[:, :VOCAB].cpu().double() / (64 * t[0] if dtype == torch.float16 else 1)
    if value.isinf().any():
        assert dz.isfinite().all()
        return
    most, smallest = (4e-4, 1e-7) if dtype == torch.float16 else (5e-5, 0.0)
    assert (dz - grad).norm() <= most * grad.norm() + smallest


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
