"""Every contender's answers beside the truth: a fast wrong one must show."""

from __future__ import annotations

import math

from torch import Tensor

from benchmarks.losses.call import call
from benchmarks.losses.contenders import Contender
from benchmarks.losses.inputs import Inputs
from benchmarks.losses.truth import checked_tokens, truth


class Check:
    """Compares answers with the truth, on all tokens or on some of them in a call of their own.

    In the second case the gradient of those tokens in the call of full size is looked at as well
    and the worse of the two is kept: an offset that overflows shows there only.
    """

    def __init__(self, x: Inputs) -> None:
        self.tokens = checked_tokens(x)
        self.share = len(self.tokens) / x.student.shape[0]
        self.part = x.rows(self.tokens)
        self.true = truth(self.part)
        self.full: dict[str, float] = {}
        self.errors: dict[str, dict[str, float | None]] = {}

    def full_size(self, contender: Contender, x: Inputs) -> None:
        """Look at the gradient that a call of full size left in x."""
        found = x.student.grad[self.tokens]
        self.full[contender.name] = rms(found, self.true.grad_hidden * self.share)

    def answers(self, contender: Contender) -> None:
        """Ask for the checked tokens' loss and gradients: signed error, then root mean square."""
        part, true = self.part, self.true
        loss = call(contender, part)[2].item()
        on_part = rms(part.student.grad, true.grad_hidden)
        self.errors[contender.name] = {
            "loss": loss / true.loss - 1,
            "grad_hidden": worse(on_part, self.full[contender.name]),
            "grad_weight": rms(part.head.grad[true.entries], true.grad_weight)
            if true.grad_weight is not None
            else None,
        }
        part.clear()


def worse(a: float, b: float) -> float:
    """The larger, and NaN if one of them is."""
    return b if math.isnan(b) or b > a else a


def rms(found: Tensor, true: Tensor) -> float:
    return ((found.double() - true).norm() / true.norm()).item()
