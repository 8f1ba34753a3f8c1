"""The tensors of a case: random, close, or captured from SmolLM2."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from benchmarks.losses.cases import Case

REAL_PAIR = Path(__file__).parents[1] / ".cache" / "real_pair.pt"
# Standard deviation of the logits: about 2 nats of entropy over 150k entries, like a model's.
_LOGIT_SPREAD = 4.5
_TEACHER_NOISE = {"random": 0.3, "close": 0.05}


class MissingInputs(Exception):
    """The case's inputs are not on this machine; the message says how to get them."""


class Inputs:
    """The inputs of a contender.

    student, teacher    (N, D) hidden states
    head, teacher_head  (V, D) equal numbers in two tensors, so that no peer takes them for shared
    labels              (N,)
    upstream            (N,) factor of each token in the log-probability's loss
    """

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case = case
        generator = torch.Generator(device).manual_seed(0)
        if case.inputs == "real":
            student, teacher, head, labels = _real(case, device)
        else:
            student, teacher, head, labels = _drawn(case, device, generator)
        dtype = case.torch_dtype
        self.student = student.to(dtype).requires_grad_()
        self.teacher = teacher.to(dtype)
        self.head = head.to(dtype)
        self.teacher_head = self.head.clone()
        self.head.requires_grad_(case.trained)
        self.labels = labels
        self.upstream = 0.5 + torch.rand(case.tokens, device=device, generator=generator)

    def rows(self, chosen: Tensor) -> Inputs:
        """The chosen tokens only, with the same heads."""
        part = object.__new__(Inputs)
        part.case = self.case
        part.student = self.student.detach()[chosen].requires_grad_()
        part.teacher, part.labels = self.teacher[chosen], self.labels[chosen]
        part.upstream = self.upstream[chosen]
        part.head, part.teacher_head = self.head, self.teacher_head
        return part

    def save(self, path: Path) -> None:
        """Write the tensors to a file."""
        names = ("student", "teacher", "head", "labels", "upstream")
        torch.save({name: getattr(self, name).detach() for name in names}, path)

    @classmethod
    def load(cls, case: Case, path: Path) -> Inputs:
        """The inputs of a case from a saved file."""
        x = object.__new__(cls)
        x.case = case
        for name, tensor in torch.load(path, weights_only=True).items():
            setattr(x, name, tensor)
        x.student.requires_grad_()
        x.teacher_head = x.head.clone()
        x.head.requires_grad_(case.trained)
        return x

    def clear(self) -> None:
        """Drop the gradients."""
        self.student.grad = self.head.grad = None


def _drawn(
    case: Case, device: torch.device, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, vocab = case.shape.hidden, case.shape.vocab

    def normal(rows: int) -> Tensor:
        return torch.randn(rows, hidden, device=device, generator=generator)

    student = normal(case.tokens)
    teacher = student + _TEACHER_NOISE[case.inputs] * normal(case.tokens)
    head = normal(vocab).mul_(_LOGIT_SPREAD / hidden**0.5)
    labels = torch.randint(vocab, (case.tokens,), device=device, generator=generator)
    return student, teacher, head, labels


def _real(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not REAL_PAIR.exists():
        raise MissingInputs("no captured pair here: run python -m benchmarks.real_pair")
    pair = torch.load(REAL_PAIR, map_location=device, weights_only=True)
    held = pair["student"].shape[0]
    if case.tokens > held:
        raise MissingInputs(f"the captured pair holds {held} tokens, not {case.tokens}")
    rows = slice(case.tokens)
    return pair["student"][rows], pair["teacher"][rows], pair["head"], pair["labels"][rows]
