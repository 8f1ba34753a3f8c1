"""Compare every contender's loss and gradients with the truth, so that a wrong one shows."""

from __future__ import annotations

import math

from torch import Tensor

from benchmarks.losses.call import call
from benchmarks.losses.contenders import Contender
from benchmarks.losses.inputs import Inputs
from benchmarks.losses.truth import checked_tokens, truth


class Check:
    """Compares answers with the truth: on all tokens, or on some tokens in an extra call.

    In the second case the gradient of these tokens in the full-size call is compared too, and the
    larger error is kept: an offset that overflows shows only at full size.
    """

    def __init__(self, x: Inputs) -> None:
        self.tokens = checked_tokens(x)
        self.share = len(self.tokens) / x.student.shape[0]
        self.part = x.rows(self.tokens)
        self.true = truth(self.part)
        self.errors: dict[str, dict[str, float | None]] = {}

    def answers(self, contender: Contender, x: Inputs, loss: Tensor) -> None:
        """Compare the loss and gradients of a full-size call, which left its gradients in x."""
        if self.share == 1:
            self.errors[contender.name] = self._compare(x, loss)
            return
        full = None
        if x.case.differentiated:
            full = rms(x.student.grad[self.tokens], self.true.grad_hidden * self.share)
        found = self._compare(self.part, call(contender, self.part)[2])
        if full is not None:
            found["grad_hidden"] = worse(found["grad_hidden"], full)
        self.errors[contender.name] = found
        self.part.clear()

    def _compare(self, x: Inputs, loss: Tensor) -> dict[str, float | None]:
        """Signed relative error of the loss; relative RMS errors of the gradients."""
        true, hidden, weight = self.true, None, None
        if x.case.differentiated:
            hidden = rms(x.student.grad, true.grad_hidden)
        if true.grad_weight is not None:
            weight = rms(x.head.grad[true.entries], true.grad_weight)
        return {
            "loss": loss.item() / true.loss - 1,
            "grad_hidden": hidden,
            "grad_weight": weight,
        }


def worse(a: float, b: float) -> float:
    """The larger one; NaN if one of them is NaN."""
    return b if math.isnan(b) or b > a else a


def rms(found: Tensor, true: Tensor) -> float:
    """Relative RMS error: |found - true| / |true| in the 2-norm."""
    return ((found.double() - true).norm() / true.norm()).item()
