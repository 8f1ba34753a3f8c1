"""Plain containers of what a backend computes and returns; `arguments` fills them.

Vectors in them are contiguous: kernels index them without a stride.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels.plan import Plan


@dataclass
class Head:
    """Hidden states and LM head of one model: z = softcap(hidden @ weight.T + bias) / temperature.

    The logit scale is folded into softcap and temperature, which may differ between two heads.
    """

    hidden: Tensor  # (N, D)
    weight: Tensor  # (V, D)
    bias: Tensor | None  # (V,)
    softcap: float | None
    temperature: float
    class_weight: Tensor | None = None  # (V,), for label smoothing

    def __post_init__(self) -> None:
        self.bias, self.class_weight = _contiguous(self.bias), _contiguous(self.class_weight)


@dataclass
class Execution:
    """How to run a loss, as the caller asked."""

    schedule: str
    workspace_bytes: int | None
    group_name: str | None  # the head's rows are sharded over this group's ranks
    precision: str = "auto"  # how the divergence family stores logits between passes


@dataclass
class DivergenceProblem:
    """Divergence of each token between a student and a teacher head."""

    student: Head
    teacher: Head
    labels: Tensor | None  # (N,) int64, read only for the label statistics
    keep: Tensor | None  # (N,) bool, rows to compute; None keeps all
    beta: float
    clip: float | None
    with_stats: bool
    execution: Execution

    def __post_init__(self) -> None:
        self.labels, self.keep = _contiguous(self.labels), _contiguous(self.keep)


@dataclass
class KnownEntries:
    """Entries of the gradient of the raw logits that the caller makes and the pass stores.

    Ids outside the vocabulary have no entry.
    """

    ids: Tensor  # (N, K) int64, into the whole vocabulary, distinct in a row
    dz: Tensor | None = None  # (N, K); None: 0, and the logits are wanted

    def __post_init__(self) -> None:
        self.ids, self.dz = self.ids.contiguous(), _contiguous(self.dz)


@dataclass
class LogprobProblem:
    """Log-probability of each token's target, entropy and log-sum-exp under one head.

    The value is (1 - e) c log p(y) + e / V sum_v w_v log p(v) - z lse**2, with e the label
    smoothing, c the class weight of the target, w_v the class weights and z the z-loss.
    With known entries it is -lse, and the gradient that of -lse but for those.
    """

    head: Head
    target: Tensor  # (N,) int64
    keep: Tensor | None  # (N,) bool
    label_smoothing: float
    with_entropy: bool
    execution: Execution
    with_predicted: bool = False
    label_weight: Tensor | None = None  # (N,) c; None is 1
    z_weight: Tensor | None = None  # () z; None is 0
    known: KnownEntries | None = None

    def __post_init__(self) -> None:
        self.target, self.keep = self.target.contiguous(), _contiguous(self.keep)


@dataclass
class TopkProblem:
    """The k largest log-probabilities of each token under one head."""

    head: Head
    labels: Tensor | None  # (N,) int64, for `keep` and its check alone
    keep: Tensor | None  # (N,) bool
    k: int
    ignore_index: int  # the ids of tokens that are dropped
    execution: Execution

    def __post_init__(self) -> None:
        self.labels, self.keep = _contiguous(self.labels), _contiguous(self.keep)


@dataclass(frozen=True)
class GradsNeeded:
    """Which gradients to compute."""

    hidden: bool = False
    weight: bool = False
    bias: bool = False
    entropy: bool = False  # the entropy's gradient of hidden, separately

    @property
    def any(self) -> bool:
        """Whether any gradient is needed."""
        return self.hidden or self.weight or self.bias


@dataclass
class Kept:
    """A block's logits between forward and backward, which then need not be multiplied again."""

    plan: Plan  # of the forward pass; backward has the same blocks
    block: slice  # of the rows computed
    logits: Tensor  # (heads, rows, V)
    merged: Tensor  # (K, rows) statistics


@dataclass
class Result:
    """Values of each token, and gradients of sum(row_scale * value) divided by `scale`.

    scale is the largest row scale for float16, whose gradients would underflow multiplied by
    1/num_tokens and are kept in fp32; else it is 1.
    """

    value: Tensor  # (N,) divergence, or (smoothed) log-probability
    stats: Tensor  # (S, N), rows as named by the operator
    grad_hidden: Tensor | None = None  # (N, D), `kept_dtype` of the inputs
    grad_entropy: Tensor | None = None  # (N, D), d entropy / d hidden
    grad_weight: Tensor | None = None  # (V, D), `weight_grad_dtype`, of fp32 sums
    grad_bias: Tensor | None = None  # (V,), fp32
    scale: Tensor | None = None  # ()
    known_logits: Tensor | None = None  # (N, K) z, of known entries without dz; 0 for others' ids
    kept: Kept | None = None


DIVERGENCE_STATS = (
    "student_entropy",
    "teacher_entropy",
    "student_logprob",
    "teacher_logprob",
    "clipped_mass",
)
LOGPROB_STATS = ("logprob", "entropy", "lse", "predicted")


def _contiguous(vector: Tensor | None) -> Tensor | None:
    return None if vector is None else vector.contiguous()


def kept_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of a gradient of the hidden states that backward scales; float16 lacks the range."""
    return torch.float32 if dtype == torch.float16 else dtype


def weight_grad_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of a head's gradient between forward and backward.

    On a CPU bfloat16 is rounded in forward, once; elsewhere backward rounds the fp32 sums.
    """
    bf16_on_cpu = weight.dtype == torch.bfloat16 and weight.device.type == "cpu"
    return weight.dtype if bf16_on_cpu else stat_dtype(weight.dtype)


def stat_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of row statistics: fp32 for all inputs but fp64, which gradcheck needs."""
    return torch.float64 if dtype == torch.float64 else torch.float32
