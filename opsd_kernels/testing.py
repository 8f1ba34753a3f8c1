"""Test tools: comparison with a float64 truth, and inputs like those of language models.

An error passes if it is at most `factor` times the error of plain PyTorch in the same dtype, plus a
floor of a few float32 roundings of the tensor's own size. Maximum and RMS error must both pass.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Relative to the size of the truth: 16 roundings of fp32; in float64 only the formula is tested.
FLOOR = {torch.float64: 1e-10}
DEFAULT_FLOOR = 16 * torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class Error:
    """How far a tensor is from the truth."""

    maximum: float
    rms: float
    worst: tuple[int, ...]


def measure(actual: Tensor, truth: Tensor) -> Error:
    """Error of the entries whose truth is finite; `assert_close` compares the others."""
    actual, truth = actual.detach().double(), truth.detach().double()
    if truth.numel() == 0:
        return Error(0.0, 0.0, ())
    gap = torch.where(truth.isfinite(), actual - truth, 0.0).abs()
    # A NaN would lose every comparison below and pass unseen.
    gap = torch.where(gap.isnan(), math.inf, gap)
    worst = tuple(int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
    return Error(gap.max().item(), gap.square().mean().sqrt().item(), worst)


def assert_close(
    actual: Tensor,
    truth: Tensor,
    plain: Tensor | None = None,
    *,
    factor: float = 2.0,
    max_factor: float | None = None,
    floor: float | None = None,
    atol: float = 0.0,
    name: str = "tensor",
) -> None:
    """Fail unless error(actual) <= factor * error(plain) + floor * size(truth) + atol.

    Holds for maximum and RMS. `plain` is what PyTorch computes in the dtype of the inputs; without
    it only the floor is allowed. `max_factor` is another factor for the maximum, which is one draw
    from a heavy tail where the RMS is an average.
    """
    assert actual.shape == truth.shape, (
        f"{name}: shape {tuple(actual.shape)}, not {tuple(truth.shape)}"
    )
    floor = FLOOR.get(actual.dtype, DEFAULT_FLOOR) if floor is None else floor
    exact = truth.double()
    odd = ~exact.isfinite()
    same = torch.equal(actual.double()[odd].nan_to_num(nan=0.25), exact[odd].nan_to_num(nan=0.25))
    assert same, f"{name}: infinities differ from the truth"
    max_factor = factor if max_factor is None else max_factor
    ours = measure(actual, truth)
    theirs = Error(0.0, 0.0, ()) if plain is None else measure(plain, truth)
    sizes = torch.where(odd, 0.0, exact).abs()
    largest = sizes.max().item() if sizes.numel() else 0.0
    typical = sizes.square().mean().sqrt().item() if sizes.numel() else 0.0
    limits = {
        "maximum": (ours.maximum, max_factor * theirs.maximum + floor * largest + atol),
        "RMS": (ours.rms, factor * theirs.rms + floor * typical + atol),
    }
    for kind, (error, limit) in limits.items():
        assert error <= limit, (
            f"{name}: {kind} error {error:.3e} exceeds {limit:.3e} (factor x plain PyTorch + "
            f"floor; plain: maximum {theirs.maximum:.3e}, RMS {theirs.rms:.3e}); worst at "
            f"{ours.worst}: got {actual[ours.worst].item():.9g}, truth "
            f"{exact[ours.worst].item():.9g}; truth maximum {largest:.3e}, RMS {typical:.3e}"
        )


def make_pair(
    tokens: int,
    hidden: int,
    vocab: int,
    *,
    kind: str = "random",
    teacher_hidden: int | None = None,
    dtype: torch.dtype = torch.float64,
    std: float = 3.0,
    noise: float = 0.05,
    offset: float = 0.0,
    masked: int = 0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of the divergence functions, by name.

    kind "random": independent student and teacher, logits of standard deviation `std`.
    kind "close": the teacher is the student with `noise` relative noise on its hidden states, as in
    self-distillation.
    kind "onehot": logits are `std` at one entry and -`std` elsewhere; in every third row the
    teacher peaks at another entry than the student.
    `offset` is added to both biases; `masked` rows chosen at random get label -100.
    """
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    h_s, w_s = normal(tokens, hidden), normal(vocab, hidden) * std / math.sqrt(hidden)
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    b_s, b_t = normal(vocab) * 0.5 + offset, normal(vocab) * 0.5 + offset
    d_t = teacher_hidden or hidden
    if kind == "random":
        h_t, w_t = normal(tokens, d_t), normal(vocab, d_t) * std / math.sqrt(d_t)
    elif kind == "close":
        h_t, w_t, b_t = h_s + noise * normal(tokens, hidden), w_s.clone(), b_s.clone()
    elif kind == "onehot":
        w_s = w_t = torch.eye(vocab, dtype=torch.float64)
        peak = labels.clone()
        peak[::3] = (peak[::3] + 1) % vocab
        h_s = _one_hot(labels, vocab, std)
        h_t = _one_hot(peak, vocab, std)
        b_s = b_t = torch.full((vocab,), offset, dtype=torch.float64)
    else:
        raise ValueError(f"kind is {kind!r}; expected 'random', 'close' or 'onehot'")
    labels[torch.randperm(tokens, generator=g)[:masked]] = -100
    tensors = {
        "student_input": h_s,
        "student_weight": w_s,
        "teacher_input": h_t,
        "teacher_weight": w_t,
        "shift_labels": labels,
        "student_bias": b_s,
        "teacher_bias": b_t,
    }
    return cast(tensors, dtype)


def _one_hot(index: Tensor, vocab: int, height: float) -> Tensor:
    rows = torch.full((len(index), vocab), -height, dtype=torch.float64)
    return rows.scatter(1, index.unsqueeze(1), height)


def single(pair: dict[str, Tensor]) -> dict[str, Tensor]:
    """The student's half of a pair, under the names of the log-probability functions."""
    return {
        "input": pair["student_input"],
        "weight": pair["student_weight"],
        "target": pair["shift_labels"],
        "bias": pair["student_bias"],
    }


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in another dtype; labels stay as they are."""
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}


def random_upstream(shape: tuple[int, ...], seed: int = 1) -> Tensor:
    """A gradient for per-token losses, with zeros among its entries."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=g, dtype=torch.float64)
    return torch.where(torch.rand(shape, generator=g) < 0.25, 0.0, values)
