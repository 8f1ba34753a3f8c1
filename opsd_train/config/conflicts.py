"""Settings of a recipe that contradict each other, each with one line that says what to change."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from opsd_train.config.loss_schema import LossConfig, PolicyWeightConfig, PositionsConfig
from opsd_train.config.method_schema import DistillConfig, GrpoConfig

if TYPE_CHECKING:
    from opsd_train.config.schema import Config

WITH_TEACHER = ("opsd", "distill")


def conflicts(config: Config) -> Iterator[str]:
    """One error message for each contradiction."""
    problems, heldout = config.evaluation.problems, config.data.heldout_size
    if problems > heldout:
        yield f"evaluation.problems={problems} is more than data.heldout_size={heldout}"
    if config.optim.warmup_steps > config.steps:
        yield f"optim.warmup_steps={config.optim.warmup_steps} is more than steps={config.steps}"
    for name, methods in (
        ("opsd", ("opsd",)),
        ("distill", ("distill",)),
        ("grpo", ("grpo", "opsd")),
    ):
        if getattr(config, name) is not None and config.method not in methods:
            owners = " and ".join(methods)
            yield f"{name}.* are settings of method {owners}; this recipe uses {config.method}"
    if config.method == "distill" and config.distill is None:
        yield "method=distill needs distill.teacher"
    yield from _teachers(config)
    if config.method not in WITH_TEACHER and config.loss != LossConfig():
        yield f"loss.* sets the divergence of opsd and distill; method={config.method} has none"
    elif config.loss.weight == 0:
        yield from _without_objective(config)
    yield from _solutions(config)
    if config.updates_per_step > 1 and config.method not in (*WITH_TEACHER, "grpo"):
        yield f"updates_per_step is of opsd, distill and grpo: set it to 1 for {config.method}"
    if config.method == "grpo" or config.grpo is not None:
        yield from _policy_gradient(config, config.grpo or GrpoConfig())
    yield from _sampled_tokens(config)
    yield from _positions(config)
    yield from _contexts(config)
    if config.collapse.action == "best" and not (problems and config.evaluation.every):
        yield (
            "collapse.action=best chooses by held-out accuracy: set evaluation.problems and "
            "evaluation.every"
        )


def _without_objective(config: Config) -> Iterator[str]:
    if config.grpo is None and config.loss.forward_kl is None:
        yield "loss.weight=0 leaves nothing to train on: set grpo, with method=opsd"
    if config.grpo is not None and config.grpo.weight == 0 and config.loss.forward_kl is None:
        yield "loss.weight=0 and grpo.weight=0 leave nothing to train on"
    if config.loss.long_term:
        yield "loss.long_term is a part of the objective: with loss.weight=0 set it to 0"
    if config.loss.objective == "top_k":
        yield "loss.weight=0 does not use the objective: leave loss.objective=full_vocabulary"


def _solutions(config: Config) -> Iterator[str]:
    """What needs samples of the student, where a step trains on solutions."""
    share = 0.0 if config.method == "sft" else 1.0
    if config.distill is not None:
        share = float(config.distill.on_policy)
    if share == 1:
        return
    never = share == 0
    if never and config.curriculum:
        yield "curriculum needs rollouts of the student; this recipe trains on solutions"
    if config.rollout.samples_per_prompt > 1:
        yield "rollout.samples_per_prompt must be 1: this recipe trains on solutions, one each"
    if config.rollout.ahead:
        yield "rollout.ahead must be 0: this recipe trains on solutions, nothing is generated"
    if config.loss.token_weight.importance_cap:
        yield "loss.token_weight.importance_cap needs samples of the student in every step"
    if config.distill and (config.loss.at_samples or config.loss.long_term):
        term = "long_term" if config.loss.long_term else f"objective={config.loss.objective}"
        yield f"loss.{term} is over samples of the student: set distill.on_policy=true"


def _teachers(config: Config) -> Iterator[str]:
    distill, column = config.distill, config.data.columns.teacher
    several = distill is not None and bool(distill.teachers)
    if several and (column is None or config.data.source == "reasoning_gym"):
        yield (
            "distill.teachers needs data.columns.teacher, the column that names a problem's "
            "teacher, and data.source=file or hub"
        )
    if column is not None and not several:
        yield f"data.columns.teacher={column} chooses among distill.teachers: set them"
    if distill and distill.sampler_share:
        yield from _mixture(config, distill)
    if config.curriculum and config.method == "context_distill":
        yield "curriculum follows the student's success; context_distill samples another model"
    if distill and any(teacher.cache for teacher in distill.by_name().values()):
        yield from _caches(config, distill)
    if distill and any(teacher.servers for teacher in distill.by_name().values()):
        yield from _servers(config)


def _mixture(config: Config, distill: DistillConfig) -> Iterator[str]:
    key = f"distill.sampler_share={distill.sampler_share}"
    if config.rollout.engine != "transformers":
        yield f"{key} needs rollout.engine=transformers"
    if config.curriculum:
        yield f"{key} samples from the teacher too, and curriculum follows the student's success"
    if distill.teachers or not distill.in_memory:
        yield f"{key} needs one teacher in memory: distill.teacher without cache and servers"
    if config.loss.token_weight.importance_cap is None:
        yield (
            f"{key} samples from another distribution than the student's: set "
            "loss.token_weight.importance_cap, such as 2.0"
        )


def _servers(config: Config) -> Iterator[str]:
    if config.loss.objective != "top_k":
        yield "distill.servers give the teacher's most likely tokens: set loss.objective=top_k"
    if config.loss.temperature != 1:
        yield "distill.servers give log-probabilities at temperature 1: set loss.temperature=1"


def _caches(config: Config, distill: DistillConfig) -> Iterator[str]:
    if config.loss.objective != "top_k":
        yield "distill.cache has the teacher's most likely tokens: set loss.objective=top_k"
    if distill.on_policy:
        yield "distill.cache is of the reference solutions: set distill.on_policy=false"
    if config.evaluation.problems and config.evaluation.divergence:
        yield (
            "distill.cache has no divergence of held-out completions: set "
            "evaluation.divergence=false"
        )


def _policy_gradient(config: Config, grpo: GrpoConfig) -> Iterator[str]:
    if config.rollout.samples_per_prompt < 2:
        yield "grpo compares samples of a problem: rollout.samples_per_prompt must be 2 or more"
    if grpo.importance_cap and not _from_all_tokens(config):
        yield (
            "grpo.importance_cap: rollout.top_p and top_k change the sampler's probabilities; "
            "set it to null, or sample from all tokens (top_p=1, top_k=0)"
        )
    if config.rollout.ahead and grpo.importance_cap is None:
        yield (
            "rollout.ahead=1 samples from older weights, which importance weights correct: set "
            "grpo.importance_cap, such as 2.0, or rollout.ahead=0"
        )
    if config.method == "grpo":
        if grpo.weight != 1 or grpo.token_weight != PolicyWeightConfig():
            yield (
                "grpo.weight and grpo.token_weight belong to method=opsd; for the policy gradient "
                "alone there, set loss.weight=0"
            )
    elif config.opsd is not None and config.opsd.verify_weight is not None:
        yield "opsd.verify_weight would undo the advantages of wrong samples: set it to null"
    elif config.loss.temperature != config.rollout.temperature:
        yield "grpo beside a divergence: set loss.temperature to rollout.temperature"
    elif grpo.token_weight.credit is not None:
        if config.loss.objective == "top_k":
            yield (
                "grpo.token_weight.credit needs the teacher's probability of the sampled token, "
                "which loss.objective=top_k does not have"
            )
        if config.loss.token_weight.some:
            yield (
                "grpo.token_weight.credit needs every token of the objective: leave "
                "loss.token_weight.skip_first and count_first out"
            )


def _sampled_tokens(config: Config) -> Iterator[str]:
    """Weights that compare a sampled token under loss.temperature with the sampler's."""
    loss, rollout = config.loss, config.rollout
    comparable = rollout.temperature == loss.temperature and _from_all_tokens(config)
    stale = rollout.ahead or config.updates_per_step > 1
    advice = "set rollout.temperature=loss.temperature, top_p=1 and top_k=0"
    key = "rollout.ahead=1" if rollout.ahead else "updates_per_step > 1"
    if stale and loss.long_term and not loss.token_weight.importance_cap:
        yield (
            f"loss.long_term with {key} is over samples of older weights: set "
            "loss.token_weight.importance_cap, such as 2.0"
        )
    if stale and loss.at_samples and config.method in WITH_TEACHER:
        if not comparable:
            yield (
                f"{key} with loss.objective={loss.objective} weights tokens by their probability: "
                f"{advice}"
            )
        if loss.token_weight.importance_cap:
            yield f"loss.token_weight.importance_cap: with {key} sampled tokens have this weight"
    if loss.token_weight.importance_cap and not comparable:
        yield f"loss.token_weight.importance_cap compares with the sampler: {advice}"


def _positions(config: Config) -> Iterator[str]:
    """Weights that leave no token of any completion."""
    policy = (config.grpo or GrpoConfig()).token_weight
    both: dict[str, PositionsConfig] = {"loss": config.loss.token_weight, "grpo": policy}
    for name, weights in both.items():
        skipped = weights.skip_first or 0
        if skipped >= min(weights.count_first or skipped + 1, config.rollout.max_new_tokens):
            yield f"{name}.token_weight.skip_first={skipped} leaves no token: lower it"


def _contexts(config: Config) -> Iterator[str]:
    """What does not go with a teacher's prompt that is made after the rollout."""
    sees, evaluation = config.prompts.teacher_context, config.evaluation
    if not sees:
        return
    reads = config.distill and all(t.prompt == "teacher" for t in config.distill.by_name().values())
    if config.method != "opsd" and not reads:
        yield (
            "prompts.teacher_context is for the teacher of opsd, or of distill with "
            f"distill.prompt=teacher; this recipe uses {config.method}"
        )
    if config.distill and config.distill.on_policy is not True:
        yield "prompts.teacher_context is of samples: set distill.on_policy=true"
    if config.distill and config.distill.sampler_share:
        yield "prompts.teacher_context is made after the rollout: set distill.sampler_share=0"
    if "sibling" in sees and config.rollout.samples_per_prompt < 2:
        yield (
            "prompts.teacher_context=[sibling] needs several samples of a problem: "
            "rollout.samples_per_prompt must be 2 or more"
        )
    for name in ("teacher", "divergence") if evaluation.problems else ():
        if getattr(evaluation, name):
            yield (
                f"evaluation.{name} needs a teacher's prompt of the problem alone: with "
                f"prompts.teacher_context set evaluation.{name}=false"
            )


def _from_all_tokens(config: Config) -> bool:
    return config.rollout.top_p == 1 and config.rollout.top_k == 0
