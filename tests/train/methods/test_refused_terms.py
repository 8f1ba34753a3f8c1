"""Terms and weights of a loss that cannot be right together, each refused in one line."""

import pytest

from opsd_train.config.errors import UserError
from tests.helpers.method_cases import settings


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loss.objective=log_ratio"], "set loss.token_weight.gate"),
        (["loss.token_weight={credit: {}}"], "loss.token_weight.credit"),
        (["loss.long_term=1.0"], "needs loss.objective=full_vocabulary and loss.beta=1"),
        (["loss.objective=top_k", "loss.token_weight={early: 0.5}"], "loss.token_weight.early"),
        (["loss.objective=top_k", "loss.forward_kl={}"], "not loss.objective=top_k"),
        (
            [
                "loss.objective=top_k",
                "grpo={token_weight: {credit: {}}}",
                "rollout.samples_per_prompt=4",
            ],
            "grpo.token_weight.credit needs the teacher's probability",
        ),
        (
            [
                *("grpo={token_weight: {credit: {}}}", "rollout.samples_per_prompt=4"),
                "loss.token_weight={skip_first: 1}",
            ],
            "leave loss.token_weight.skip_first and count_first out",
        ),
        (
            ["grpo={token_weight: {gate: 5.0}}", "rollout.samples_per_prompt=4"],
            "grpo.token_weight.gate",
        ),
        (
            ["grpo={}", "rollout.samples_per_prompt=4", "opsd.verify_weight={wrong: 0.5}"],
            "opsd.verify_weight would undo the advantages",
        ),
        (
            ["grpo={weight: 0}", "loss.weight=0", "rollout.samples_per_prompt=4"],
            "leave nothing to train on",
        ),
        (
            [
                *("grpo={}", "loss={weight: 0, beta: 1.0, long_term: 1.0}"),
                "rollout.samples_per_prompt=4",
            ],
            "with loss.weight=0 set it to 0",
        ),
        (
            ["loss={beta: 1.0, long_term: 1.0, token_weight: {count_first: 4}}"],
            "loss.long_term reads all tokens that follow",
        ),
        (["loss.token_weight={skip_first: 3, count_first: 3}"], "leaves no token"),
        (["loss.token_weight={skip_first: 5}"], "skip_first=5 leaves no token"),
        (
            [
                *("method=distill", "distill.teacher=t", "distill.on_policy=false"),
                "loss.objective=sampled_token",
            ],
            "loss.objective=sampled_token is over samples of the student",
        ),
        (
            [
                *("method=distill", "distill.teacher=t", "distill.on_policy=0.5"),
                *("loss.beta=1.0", "loss.long_term=1.0"),
            ],
            "loss.long_term is over samples of the student",
        ),
        (["loss.weight=0"], "loss.weight=0 leaves nothing to train on: set grpo"),
        (
            ["loss.weight=0", "loss.objective=top_k", "grpo={}", "rollout.samples_per_prompt=4"],
            "leave loss.objective=full_vocabulary",
        ),
        (["grpo={}"], "rollout.samples_per_prompt must be 2 or more"),
        (
            ["grpo={}", "rollout.samples_per_prompt=4", "rollout.temperature=1.2"],
            "set loss.temperature to rollout.temperature",
        ),
        (
            ["method=grpo", "rollout.samples_per_prompt=4", "grpo={weight: 0.5}"],
            "belong to method=opsd",
        ),
        (["method=sft", "updates_per_step=2"], "set it to 1 for sft"),
        (["method=sft", "grpo={}"], "settings of method grpo and opsd; this recipe uses sft"),
        (
            ["loss.objective=sampled_token", "updates_per_step=2", "rollout.top_p=0.9"],
            "updates_per_step > 1 with loss.objective=sampled_token weights tokens",
        ),
        (
            ["loss.token_weight={importance_cap: 2.0}", "rollout.top_k=5"],
            "loss.token_weight.importance_cap compares with the sampler",
        ),
        (
            [
                "loss.objective=sampled_token",
                "updates_per_step=2",
                "loss.token_weight={importance_cap: 2.0}",
            ],
            "with updates_per_step > 1 sampled tokens have this weight",
        ),
        (
            ["loss.beta=1.0", "loss.long_term=1.0", "updates_per_step=2"],
            "set loss.token_weight.importance_cap",
        ),
        (
            ["method=distill", "distill.teacher=t", "distill.sampler_share=0.2"],
            "set loss.token_weight.importance_cap",
        ),
        (
            [
                "method=distill",
                "distill.teacher=t",
                "distill.on_policy=0.5",
                "rollout.samples_per_prompt=2",
            ],
            "rollout.samples_per_prompt must be 1",
        ),
        (
            [
                "method=distill",
                "distill.teacher=t",
                "distill.on_policy=0.5",
                "loss.token_weight={importance_cap: 2.0}",
            ],
            "needs samples of the student in every step",
        ),
        (
            ["method=context_distill", "curriculum={target: 0.5, width: 0.25}"],
            "context_distill samples another model",
        ),
        (
            [
                *("method=distill", "distill.teacher=t", "distill.sampler_share=0.2"),
                *(
                    "loss.token_weight={importance_cap: 2.0}",
                    "curriculum={target: 0.5, width: 0.25}",
                ),
            ],
            "samples from the teacher too",
        ),
    ],
)
def test_what_cannot_be_right_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(UserError) as caught:
        settings(*overrides)
    assert words in str(caught.value) and "\n" not in str(caught.value)
