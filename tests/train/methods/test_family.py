"""The recipes around OPSD: each loss and its gradient from its formula over full logits in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor, nn

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.methods.base import Method
from tests.helpers.method_cases import (
    Outcome,
    assert_same,
    change,
    chosen,
    counted,
    double,
    finish,
    grads_of,
    log_probs,
    make_method,
    make_policy,
    make_samples,
    make_teacher,
    recipe_settings,
    run,
)


@dataclass
class Read:
    """A sample with what both models say of it: (T, V) log-probabilities, at the completion."""

    sample: Sample
    student: Tensor  # differentiable
    teacher: Tensor
    initial: Tensor
    advantage: float  # of the group's rewards, 0 where they are all the same

    @property
    def s(self) -> Tensor:
        """(T,) of the sampled tokens."""
        return chosen(self.student, self.sample.completion)

    @property
    def t(self) -> Tensor:
        return chosen(self.teacher, self.sample.completion)

    @property
    def delta(self) -> Tensor:
        return (self.t - self.s).detach()

    @property
    def policy_gradient(self) -> Tensor:
        """-r A min(s / q, 2), r the ratio to the present policy: 1, with the gradient of log s."""
        ratio = (self.s - self.s.detach()).exp()
        return -ratio * self.advantage * sampler_weight(self)

    @property
    def log_ratio_to_initial(self) -> Tensor:
        return self.s - chosen(self.initial, self.sample.completion)


Part = tuple[Tensor, Tensor]  # (T,) values, and 1 for the tokens that a term counts


def mean(parts: Sequence[Part]) -> Tensor:
    return sum((v * m).sum() for v, m in parts) / sum(m.sum() for _, m in parts)


def forward_kl(read: Read) -> Tensor:
    return (read.teacher.exp() * (read.teacher - read.student)).sum(-1)


def reverse_kl(read: Read) -> Tensor:
    return (read.student.exp() * (read.student - read.teacher)).sum(-1)


def jsd(read: Read) -> Tensor:
    s, t = read.student.exp(), read.teacher.exp()
    middle = ((s + t) / 2).log()
    return ((t * (read.teacher - middle)).sum(-1) + (s * (read.student - middle)).sum(-1)) / 2


def all_of(value: Callable[[Read], Tensor], reads: Sequence[Read]) -> Tensor:
    """The mean over every token."""
    return mean([(value(read), torch.ones(len(read.s))) for read in reads])


def in_context(value: Callable[[Read], Tensor], reads: Sequence[Read]) -> Tensor:
    """The mean over the tokens of samples whose teacher sees something."""
    return mean([(value(r), torch.full((len(r.s),), float(bool(r.sample.context)))) for r in reads])


def with_advantage(value: Callable[[Read], Tensor], reads: Sequence[Read]) -> Tensor:
    """The mean over the tokens of samples in groups of right and wrong ones."""
    return mean([(value(r), torch.full((len(r.s),), float(r.advantage != 0))) for r in reads])


def at(positions: Callable[[int], bool], read: Read) -> Tensor:
    return torch.tensor([float(positions(n)) for n in range(len(read.s))])


def early_weight(read: Read, gamma: float, first: int = 0) -> Tensor:
    size = [abs(d) if n >= first else 0.0 for n, d in enumerate(read.delta.tolist())]
    total = sum(size) or 1.0
    return torch.tensor([1 + gamma * (1 - sum(size[:n]) / total) for n in range(len(size))])


def credit(read: Read, mix: float, clip: float) -> Tensor:
    sign = math.copysign(1, read.advantage)
    factor = [min(max(math.exp(sign * d), 1 - clip), 1 + clip) for d in read.delta.tolist()]
    return torch.tensor([1 - mix + mix * f for f in factor], dtype=torch.double)


def unsure(read: Read) -> Tensor:
    """1 where the teacher's entropy is at least 0.8 nats."""
    entropy = -(read.teacher.exp() * read.teacher).sum(-1)
    return (entropy >= 0.8).double()


def following(read: Read) -> Tensor:
    """The mean of delta over the tokens that follow each one."""
    values = read.delta.tolist()
    rest = [values[n + 1 :] for n in range(len(values))]
    return torch.tensor([sum(r) / len(r) if r else 0.0 for r in rest], dtype=torch.double)


def sampler_weight(read: Read) -> Tensor:
    """min(s / q, 2), a constant."""
    q = torch.tensor(read.sample.logprobs, dtype=torch.double)
    return (read.s.detach() - q).exp().clamp(max=2.0)


def k3(read: Read) -> Tensor:
    gap = -read.log_ratio_to_initial
    return gap.exp() - gap - 1


def top_and_rest(read: Read, k: int) -> Tensor:
    order = read.teacher.argsort(-1, descending=True)

    def kept(log_p: Tensor) -> Tensor:
        top, others = (log_p.gather(-1, ids) for ids in (order[:, :k], order[:, k:]))
        return torch.cat([top, others.logsumexp(-1, keepdim=True)], -1)

    s, t = kept(read.student), kept(read.teacher)
    return (t.exp() * (t - s)).sum(-1)


Formula = Callable[[Sequence[Read]], Tensor]
SAMPLED = lambda read: -read.delta * read.s  # noqa: E731

# name: the formula, and overrides that make its small terms large enough to be seen.
FORMULAS: dict[str, tuple[Formula, list[str]]] = {
    "sdft": (lambda reads: mean([(forward_kl(r), at(lambda n: n >= 3, r)) for r in reads]), []),
    "sdpo-sibling": (lambda reads: in_context(jsd, reads), []),
    "sdpo-feedback": (lambda reads: in_context(reverse_kl, reads), []),
    "sdpo": (
        lambda reads: (
            0.5 * in_context(jsd, reads)
            + 0.5 * with_advantage(lambda read: read.policy_gradient, reads)
        ),
        [],
    ),
    "gkd": (lambda reads: all_of(jsd, reads), []),
    "rlsd": (
        lambda reads: with_advantage(lambda r: r.policy_gradient * credit(r, 0.5, 0.2), reads),
        [],
    ),
    "rlsd, some without a context": (
        lambda reads: with_advantage(
            lambda r: r.policy_gradient * (credit(r, 0.5, 0.2) if r.sample.context else 1), reads
        ),
        [
            "prompts.teacher_context=[sibling]",
            "evaluation.teacher=false",
            "evaluation.divergence=false",
        ],
    ),
    "sdar": (
        lambda reads: (
            0.7 * all_of(lambda r: torch.sigmoid(5 * r.delta) * (r.t - r.s), reads)
            + with_advantage(lambda r: r.policy_gradient + 0.4 * k3(r), reads)
        ),
        ["loss.weight=0.7", "grpo.kl_weight=0.4"],
    ),
    "sdpg": (
        lambda reads: (
            0.7 * all_of(reverse_kl, reads)
            + with_advantage(
                lambda r: r.policy_gradient + 0.4 * r.log_ratio_to_initial.square() / 2, reads
            )
        ),
        ["loss.weight=0.7", "grpo.kl_weight=0.4"],
    ),
    "minillm": (
        lambda reads: all_of(
            lambda r: (reverse_kl(r) - following(r) * r.s) * sampler_weight(r), reads
        ),
        [],
    ),
    "opsd-importance-weighted": (
        lambda reads: all_of(lambda r: SAMPLED(r) * early_weight(r, 0.5), reads),
        [],
    ),
    "opsd-importance-weighted, skipping": (  # what is left out is in no sum
        lambda reads: mean(
            [(SAMPLED(r) * early_weight(r, 0.5, 2), at(lambda n: n >= 2, r)) for r in reads]
        ),
        ["loss.token_weight={early: 0.5, skip_first: 2}"],
    ),
    "opsd-entropy-aware": (
        lambda reads: all_of(lambda r: SAMPLED(r) + unsure(r) * forward_kl(r), reads),
        [],
    ),
    "opsd-skip-first": (
        lambda reads: mean([(forward_kl(r), at(lambda n: n >= 3, r)) for r in reads]),
        [],
    ),
    "opsd-prefix": (
        lambda reads: mean([(forward_kl(r), at(lambda n: n < 4, r)) for r in reads]),
        ["loss.token_weight.count_first=4"],
    ),
    "opsd-top-k": (
        lambda reads: all_of(lambda r: top_and_rest(r, 8), reads),
        ["loss.top_k=8"],
    ),
    "opsd-reference-free": (lambda reads: all_of(forward_kl, reads), []),
}


def samples_of(config: Config) -> list[Sample]:
    """Two groups with right and wrong answers and one without a right one; of every third sample
    the teacher sees nothing, where it sees something of the rollout."""
    samples = [replace(s, correct=s.correct and i < 8) for i, s in enumerate(make_samples(12))]
    if not config.prompts.teacher_context:
        return samples
    return [
        replace(sample, context=(), teacher_prompt=sample.student_prompt)
        if index % 3 == 0
        else replace(sample, context=("sibling",))
        for index, sample in enumerate(samples)
    ]


def advantages(config: Config, samples: Sequence[Sample]) -> list[float]:
    size, found = config.rollout.samples_per_prompt, []
    for first in range(0, len(samples), size):
        rewards = torch.tensor([float(bool(s.correct)) for s in samples[first : first + size]])
        same = len(set(rewards.tolist())) == 1
        found += [0.0] * size if same else ((rewards - rewards.mean()) / rewards.std()).tolist()
    return found


def read_all(config: Config, model: nn.Module, teacher: nn.Module | None, samples) -> list[Read]:
    """`teacher`: None: the model itself with its adapters off."""
    off, reads = model.disable_adapter, []
    for sample, advantage in zip(samples, advantages(config, samples), strict=True):
        y = sample.completion
        privileged = config.distill is None or config.distill.prompt == "teacher"
        prompt = sample.teacher_prompt if privileged else sample.student_prompt
        with torch.no_grad():
            with nullcontext() if teacher else off():
                lt = log_probs(teacher or model, prompt, y).double()
            with off():
                initial = log_probs(model, sample.student_prompt, y)
        student = log_probs(model, sample.student_prompt, y)
        reads.append(Read(sample, student, lt, initial, advantage))
    return reads


def teacher_model(config: Config, policy, at_start: nn.Module) -> nn.Module | None:
    kind = config.opsd.teacher if config.opsd else "initial"
    return {"initial": None, "current": double(policy)}.get(kind, at_start)


def made(config: Config) -> tuple[Method, nn.Module, nn.Module | None]:
    """The method after a change of the weights, the model in fp64, and its teacher."""
    policy = make_policy()
    at_start, other = double(policy), make_teacher()
    method = make_method(config, policy, other)
    change(policy, 11)
    if config.distill:
        return method, double(policy), double(other)
    return method, double(policy), teacher_model(config, policy, at_start)


@pytest.mark.parametrize("name", FORMULAS)
def test_loss_and_gradient_equal_the_formula(name: str) -> None:
    formula, overrides = FORMULAS[name]
    config = recipe_settings(name.partition(",")[0], *overrides)
    method, model, teacher = made(config)
    samples = samples_of(config)
    weighed = method.assign_weights(samples)
    found = run(method, [s for s in weighed if s.weight > 0], num_tokens=counted(weighed))
    loss = formula(read_all(config, model, teacher, samples))
    model.zero_grad()
    loss.backward()
    assert_same(found, Outcome(loss.item(), {}, grads_of(model)))


def test_positions_weigh_the_kl_of_a_policy_gradient_too() -> None:
    more = ("grpo.token_weight={count_first: 2}", "grpo.kl_weight=0.4", "loss.weight=0.7")
    config = recipe_settings("sdpg", *more)
    method, model, teacher = made(config)
    samples = samples_of(config)
    weighed = method.assign_weights(samples)
    found = run(method, [s for s in weighed if s.weight > 0], num_tokens=counted(weighed))
    reads, parts = read_all(config, model, teacher, samples), []
    for read in reads:
        value = read.policy_gradient + 0.4 * read.log_ratio_to_initial.square() / 2
        parts.append((value, at(lambda n: n < 2, read) * float(read.advantage != 0)))
    loss = 0.7 * all_of(reverse_kl, reads) + mean(parts)
    model.zero_grad()
    loss.backward()
    assert_same(found, Outcome(loss.item(), {}, grads_of(model)))


@pytest.mark.parametrize("name", ["sdpo-sibling", "sdpo", "opsd-skip-first"])
def test_statistics_are_unknown_where_nothing_counts(name: str) -> None:
    config = recipe_settings(name)
    method, _, _ = made(config)
    samples = [s for s in method.assign_weights(samples_of(config)) if s.weight > 0]
    stats = finish(method, [samples], method.precompute([samples]), counted(samples)).stats
    counts = torch.tensor(
        [
            bool(s.context) if s.context is not None else n >= 3
            for s in samples
            for n in range(len(s.completion))
        ]
    )
    for column in ("divergence", "teacher_entropy", "student_entropy"):
        assert torch.equal(~stats[column].isnan(), counts), column
    if name == "sdpo":  # the policy gradient reads every token, and counts some
        assert not stats["logprob"].isnan().any()
        active = [s.policy_weight > 0 for s in samples for _ in s.completion]
        assert (~stats["ratio"].isnan()).tolist() == active and not all(active)


def test_what_counts_in_no_term_is_left_out() -> None:
    """A sample without a context counts only in a policy gradient, where there is one."""
    for name, policy_gradient in (("sdpo-sibling", False), ("sdpo", True)):
        config = recipe_settings(name)
        method, _, _ = made(config)
        for sample in method.assign_weights(samples_of(config)):
            mixed = policy_gradient and sample.policy_weight > 0
            assert (sample.weight > 0) == (bool(sample.context) or mixed)
            assert (sample.divergence_weight > 0) == bool(sample.context)
