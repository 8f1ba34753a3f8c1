"""Value and gradient rates of the log-probability family, from the statistics of each row.

With e the label smoothing, c the target's class weight, w_v the class weights and z the z-loss::

    value = (1 - e) c log p(y) + e / V sum_v w_v log p(v) - z lse**2
    dz_j  = sharp [j = y] + e / V w_j - mass p_j
    sharp = (1 - e) c,  mass = sharp + e / V sum_v w_v + 2 z lse

All arguments and results hold one entry per row, (rows,) or (rows, 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_kernels.problem import LogprobProblem

# No finite log-probability comes near this; a larger sum contains an entry of probability 0.
_INFINITE = 1e20


def value_of(
    p: LogprobProblem,
    logprob: Tensor,  # log p(y)
    label_weight: Tensor | None,  # c
    mean: Tensor | None,  # sum_v w_v log p(v) / V, if there is label smoothing
    lse: Tensor,
) -> Tensor:
    """The value. A class of weight 0 adds 0, even if its logit is -inf."""
    if p.known is not None:
        return -lse
    value = logprob
    if label_weight is not None:
        value = torch.where(label_weight == 0, 0, label_weight * logprob)
    if mean is not None:
        value = restore_infinity((1 - p.label_smoothing) * value + p.label_smoothing * mean)
    return value if p.z_weight is None else value - p.z_weight * lse.square()


def rates_of(
    p: LogprobProblem,
    label_weight: Tensor | None,
    share: Tensor | None,  # sum_v w_v / V, if there is label smoothing
    lse: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """(sharp, mass), or None where both are 1; those of -lse if entries are known."""
    if p.known is not None:
        return torch.zeros_like(lse), torch.ones_like(lse)
    if label_weight is None and share is None and p.z_weight is None:
        return None
    sharp = torch.full_like(lse, 1.0 - p.label_smoothing)
    if label_weight is not None:
        sharp = sharp * label_weight
    mass = sharp if share is None else sharp + p.label_smoothing * share
    return sharp, mass if p.z_weight is None else mass + 2 * p.z_weight * lse


def rates_with_lse(
    rates: tuple[Tensor, Tensor] | None, scale: Tensor, lse_scale: Tensor
) -> tuple[Tensor, Tensor]:
    """(sharp, mass) of scale * value + lse_scale * lse, for a value without smoothing."""
    sharp, mass = rates or (1.0, 1.0)
    return sharp * scale, mass * scale - lse_scale


def restore_infinity(column: Tensor) -> Tensor:
    """Make infinite the sums of log-probabilities that contain `LOG_ZERO`, a finite log 0."""
    return torch.where(column.abs() > _INFINITE, column * torch.inf, column)
