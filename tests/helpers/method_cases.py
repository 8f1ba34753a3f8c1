"""Every training method on the tiny model, and the same loss computed from full logits."""

import copy
import functools
import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from opsd_kernels.integrations.heads import lm_head
from opsd_train.config.load import config_from, load_recipe, merge
from opsd_train.config.loss_schema import LossConfig
from opsd_train.config.method_schema import GrpoConfig
from opsd_train.config.schema import Config, LoraConfig
from opsd_train.data.batches import Sample, micro_batches
from opsd_train.data.problems import Problem
from opsd_train.methods import METHODS
from opsd_train.methods.base import Method, Stats
from opsd_train.methods.teachers import LocalTeacher
from opsd_train.model.adapters import add_adapters
from opsd_train.model.policy import Policy
from tests.helpers import devices
from tests.helpers.tiny import config, make_model, recipe

PAD, VOCAB, TEACHER_VOCAB = 0, 261, 288
LORA = LoraConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
GRPO = ("method=grpo", "rollout.samples_per_prompt=4", "rollout.temperature=1.2")
AHEAD = ("rollout.engine=vllm-server", "rollout.servers=[http://a:1]", "rollout.ahead=1")
CASES = {
    "opsd forward KL": ("loss.beta=0.0",),
    "opsd JSD": ("loss.beta=0.5", "loss.temperature=1.3"),
    "opsd reverse KL": ("loss.beta=1.0",),
    "opsd clipped": ("loss.beta=0.0", "loss.token_clip=0.05"),
    "opsd top k": ("loss.objective=top_k", "loss.top_k=8", "loss.temperature=1.3"),
    "opsd sampled token": ("loss.objective=sampled_token", "loss.temperature=1.3"),
    "opsd sampled token, ahead": (*AHEAD, "loss.objective=sampled_token"),
    "sft": ("method=sft",),
    "star": ("method=star",),
    "context_distill": ("method=context_distill",),
    "grpo": (*GRPO, "grpo.kl_weight=0.05", "updates_per_step=2"),
    "distill": ("method=distill", "distill.teacher=t", "loss.beta=0.5"),
    "distill top k": (
        *("method=distill", "distill.teacher=t", "loss.beta=0.0"),
        *("loss.objective=top_k", "loss.top_k=8", "distill.prompt=teacher"),
    ),
    "distill sampled token": (
        *("method=distill", "distill.teacher=t", "loss.objective=sampled_token"),
    ),
}

TERMS = {
    "opsd and policy gradient": (
        *("rollout.samples_per_prompt=4", "loss.beta=1.0", "loss.weight=0.7"),
        "grpo={weight: 0.5, kl_weight: 0.1, kl_estimator: k2}",
    ),
    "opsd top k and policy gradient": (
        *("rollout.samples_per_prompt=4", "loss.objective=top_k", "loss.top_k=8", "grpo={}"),
    ),
    "opsd credit": (
        *("rollout.samples_per_prompt=4", "loss.weight=0"),
        "grpo={token_weight: {credit: {}}}",
    ),
    "opsd log ratio": ("loss.objective=log_ratio", "loss.token_weight={gate: 5.0}"),
    "opsd early": ("loss.token_weight={early: 0.5, skip_first: 1}",),
    "opsd where unsure": ("loss.objective=sampled_token", "loss.forward_kl={min_entropy: 2.0}"),
    "opsd clipped ratio": ("loss.objective=sampled_token", "updates_per_step=2"),
    "distill long term": (
        *("method=distill", "distill.teacher=t", "loss.beta=1.0", "loss.long_term=1.0"),
        "loss.token_weight={importance_cap: 2.0}",
    ),
}
"""More terms and weights of a loss; their formulas are in tests/train/methods/test_family.py."""


def settings(*overrides: str) -> Config:
    return config("model", "runs/none", *overrides)


LOSS_KEYS = ("method", "loss", "opsd", "grpo", "distill", "updates_per_step")


def recipe_settings(name: str, *overrides: str) -> Config:
    """The loss of a demo's recipe, on the tiny model."""
    loaded = load_recipe(f"demo/{name}")
    own = {key: loaded[key] for key in LOSS_KEYS if key in loaded}
    own["rollout"] = {"samples_per_prompt": loaded["rollout"].get("samples_per_prompt", 1)}
    if sees := loaded["prompts"].get("teacher_context"):
        own["prompts"] = {"teacher_context": sees}
        own["evaluation"] = {"teacher": False, "divergence": False}
    return config_from(merge(recipe("model", "runs/none"), own), overrides)


def make_policy(
    lora: bool = True,
    dtype: torch.dtype = torch.float32,
    trained: bool = True,
    vocab_size: int = VOCAB,
    tied: bool = True,
) -> Policy:
    """The tiny model as load_policy makes it; `trained`: adapters have weights other than zero."""
    model = make_model(vocab_size, dtype if lora else torch.float32, tied=tied)
    if lora:
        model = add_adapters(model, LORA)
    policy = Policy(model.to(devices.NAME), PAD, dtype)
    if trained and lora:
        change(policy, seed=1, std=0.3, only="lora_B")
    return policy


def make_teacher(dtype: torch.dtype = torch.float32, vocab_size: int = TEACHER_VOCAB) -> Policy:
    """Another model: wider, its vocabulary padded further."""
    model = make_model(vocab_size, dtype, hidden_size=48).requires_grad_(False)
    return Policy(model.to(devices.NAME), PAD, dtype)


def make_method(config: Config, policy: Policy, teacher: Policy | None = None) -> Method:
    kind = METHODS[config.method]
    if config.method == "distill":
        rows = lm_head(policy.core).weight.shape[0]
        prompt = config.distill.prompt
        made = LocalTeacher(teacher or make_teacher(), prompt, config.loss, rows)
        return kind(config, policy, {None: made})
    return kind(config, policy)


def change(policy: Policy, seed: int, std: float = 0.02, only: str = "") -> None:
    """Change the trained weights at random, as an optimizer step would."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if parameter.requires_grad and only in name:
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data += std * noise.to(parameter.device)


def make_samples(
    count: int = 8, same_prompt: bool = False, vocab_size: int = VOCAB
) -> list[Sample]:
    """Samples of all lengths, four to a group: right and wrong, finished and cut off."""
    generator = torch.Generator().manual_seed(2)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, vocab_size, (size,), generator=generator).tolist()

    samples = []
    for index in range(count):
        student, teacher, completion = tokens(3, 12), tokens(5, 20), tokens(1, 9)
        noise = torch.randn(len(completion), generator=generator)
        samples.append(
            Sample(
                Problem(f"p{index}", "", "", ""),
                student,
                student if same_prompt else teacher,
                completion,
                logprobs=(noise - 5).tolist(),
                finished=index % 4 != 3,
                correct=index % 4 in (0, 3),
            )
        )
    return samples


def counted(samples: Sequence[Sample]) -> int:
    """The number of loss tokens: tokens of the samples with a weight above 0."""
    return sum(len(sample.completion) for sample in samples if sample.weight > 0)


@dataclass
class Outcome:
    loss: float
    stats: Stats
    grads: dict[str, Tensor]


def run(
    method: Method, samples: Sequence[Sample], budget: int = 10**6, num_tokens: int | None = None
) -> Outcome:
    """Precompute, loss and backward over the micro-batches of a token budget; no update."""
    groups = list(micro_batches(samples, budget, method.policy.layout))
    return finish(method, groups, method.precompute(groups), num_tokens or counted(samples))


def finish(method: Method, groups: list, precomputed: list, num_tokens: int) -> Outcome:
    """Loss and backward over precomputed micro-batches."""
    method.policy.model.zero_grad()
    total, columns = 0.0, []
    for group, constants in zip(groups, precomputed, strict=True):
        loss, stats = method.loss(group, constants, num_tokens)
        loss.backward()
        total += loss.item()
        assert all(
            column.shape == (sum(len(s.completion) for s in group),) and not column.requires_grad
            for column in stats.values()
        )
        columns.append(stats)
    stats = {name: torch.cat([column[name] for column in columns]).cpu() for name in columns[0]}
    return Outcome(total, stats, grads_of(method.policy.model))


def grads_of(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of the trained parameters, those that have one, on the CPU."""
    return {n: p.grad.clone().cpu() for n, p in model.named_parameters() if p.grad is not None}


# ------------------------------------------------------------------------------------- the formulas


def double(policy: Policy) -> nn.Module:
    """A copy of the model as it is now, in fp64 and on the CPU."""
    return copy.deepcopy(policy.model).cpu().double()


def logits_alone(model: nn.Module, prompt: list[int], completion: list[int]) -> Tensor:
    """(T, V) logits that predict the completion, of one sample in a batch of its own."""
    ids = torch.tensor([[*prompt, *completion]])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1]


def log_probs(
    model: nn.Module, prompt: list[int], completion: list[int], temperature: float = 1.0
) -> Tensor:
    logits = logits_alone(model, prompt, completion)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(logits[:, :VOCAB] / temperature, -1)


def chosen(log_probabilities: Tensor, completion: list[int]) -> Tensor:
    return log_probabilities[range(len(completion)), completion]


def divergence(ls: Tensor, lt: Tensor, y: list[int], loss: LossConfig) -> Tensor:
    """Equations 6-9 per token."""
    if loss.objective == "sampled_token":
        return -(chosen(lt, y) - chosen(ls, y)).detach() * chosen(ls, y)
    if loss.objective == "top_k" and loss.top_k < VOCAB:
        ls, lt = (top_and_rest(log_p, lt, loss.top_k) for log_p in (ls, lt))
    s, t = ls.exp(), lt.exp()
    if loss.beta == 0:
        entries = t * (lt - ls)
    elif loss.beta == 1:
        entries = s * (ls - lt)
    else:
        lm = (loss.beta * t + (1 - loss.beta) * s).log()
        entries = loss.beta * t * (lt - lm) + (1 - loss.beta) * s * (ls - lm)
    return entries.clamp(max=loss.token_clip or math.inf).sum(-1)


def top_and_rest(log_p: Tensor, teacher: Tensor, k: int) -> Tensor:
    """(T, k + 1) log-probabilities of the teacher's k most likely tokens and of all the others."""
    order = teacher.argsort(-1, descending=True)
    kept, others = (log_p.gather(-1, ids) for ids in (order[:, :k], order[:, k:]))
    return torch.cat([kept, others.logsumexp(-1, keepdim=True)], -1)


def surrogate(
    logprob: Tensor, old: Tensor, reference: Tensor, sample: Sample, grpo: GrpoConfig
) -> Tensor:
    """Equations 4 and 5 per token, with the importance weight and k3, one token at a time."""
    values = []
    for index, new in enumerate(logprob):
        ratio, a = torch.exp(new - old[index]), sample.advantage
        bounded = min(max(ratio, 1 - grpo.clip_low), 1 + grpo.clip_high)
        value = -min(ratio * a, bounded * a)
        if grpo.importance_cap is not None:
            correction = torch.exp(old[index] - sample.logprobs[index]).item()
            value = value * min(correction, grpo.importance_cap)
        gap = reference[index] - new
        value = value + grpo.kl_weight * (torch.exp(gap) - gap - 1)
        values.append(value)
    return torch.stack(values)


def plain_loss(
    config: Config,
    model: nn.Module,
    samples: Sequence[Sample],
    teacher: nn.Module | None = None,
    old: nn.Module | None = None,
) -> Tensor:
    """The method's loss; without a `teacher`, the model itself with its adapters off."""
    reference = nullcontext if teacher else getattr(model, "disable_adapter", nullcontext)
    total = 0.0
    for sample in samples:
        prompt, y = sample.student_prompt, sample.completion
        read = functools.partial(log_probs, completion=y)
        if config.method in ("opsd", "distill"):
            temperature = config.loss.temperature
            ls = read(model, prompt, temperature=temperature)
            with torch.no_grad(), reference():
                privileged = config.distill is None or config.distill.prompt == "teacher"
                theirs = sample.teacher_prompt if privileged else prompt
                lt = read(teacher or model, theirs, temperature=temperature)
            value = divergence(ls, lt.to(ls.dtype), y, config.loss)
            if config.rollout.ahead and config.loss.objective == "sampled_token":
                pairs = zip(chosen(ls, y).tolist(), sample.logprobs, strict=True)
                value = value * torch.tensor([min(math.exp(own - q), 2.0) for own, q in pairs])
        elif config.method == "grpo":
            grpo, temperature = config.grpo or GrpoConfig(), config.rollout.temperature
            logprob = chosen(read(model, prompt, temperature=temperature), y)
            with torch.no_grad():
                past = chosen(read(old or model, prompt, temperature=temperature), y)
                with reference():
                    initial = chosen(read(teacher or model, prompt, temperature=temperature), y)
            value = surrogate(logprob, past, initial, sample, grpo)
        else:
            value = -chosen(read(model, prompt), y)
        total = total + sample.weight * value.sum()
    return total / counted(samples)


def truth(config: Config, model: nn.Module, samples: Sequence[Sample], **models) -> Outcome:
    """Loss and gradients from full logits."""
    model.zero_grad()
    loss = plain_loss(config, model, samples, **models)
    loss.backward()
    return Outcome(loss.item(), {}, grads_of(model))


def assert_same(found: Outcome, wanted: Outcome, rel: float = 1e-4) -> None:
    """Equal losses, and equal gradients, not zero, for every trained weight."""
    assert abs(found.loss - wanted.loss) <= rel * abs(wanted.loss), (found.loss, wanted.loss)
    assert found.grads.keys() == wanted.grads.keys() and len(found.grads) >= 12
    for name, grad in found.grads.items():
        size = wanted.grads[name].abs().max()
        assert size > 0, f"{name}: the formula gives no gradient; the test would see nothing"
        error = (grad - wanted.grads[name]).abs().max()
        assert error <= rel * size, f"{name}: off by {error / size:.1e} of its size"


def reweighted(samples: Sequence[Sample], weights: Sequence[float]) -> list[Sample]:
    return [replace(sample, weight=weight) for sample, weight in zip(samples, weights, strict=True)]
