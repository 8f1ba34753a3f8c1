"""Known pitfalls of FSDP2 with adapters and with a loss that reads the head."""

from pathlib import Path

import pytest
import torch

from opsd_train.config.errors import UserError
from tests.helpers import sharded_runs as sharding
from tests.helpers.pair import SIZE, Pair, alone
from tests.helpers.sharded_runs import OVERRIDES
from tests.helpers.steps import Course
from tests.helpers.tiny import config

pytestmark = pytest.mark.dist

FULL = "lora=null"
BF16 = "model.dtype=bfloat16"
LAYERS = ["model.layers.0", "model.layers.1"]


@pytest.mark.parametrize("shard", ["full", "none"])
@pytest.mark.parametrize("overrides", [(), (FULL, BF16)], ids=["lora", "full-bf16"])
def test_a_loss_sees_the_whole_head(
    pair: Pair, models: Path, overrides: tuple[str, ...], shard: str
) -> None:
    """A shard used as the whole head would distil over a part of the vocabulary."""
    course = Course(models, "untied", overrides, shard)
    one = sharding.heads(alone(), course) if FULL not in overrides else None
    dtype = torch.bfloat16 if BF16 in overrides else torch.float32
    for head in pair.run(sharding.heads, course):
        assert head["plain"] and head["types"] == {dtype}
        assert head["value"].shape == (261, 32)
        assert head["trained"] == (FULL in overrides)
        if one is not None:
            assert torch.equal(head["value"], one["value"])
        assert head["outside"] == "DTensor" and head["refused"]


@pytest.mark.parametrize("model, overrides", [("tied", (BF16,)), ("untied", (FULL, BF16))])
def test_sharded_modules(pair: Pair, models: Path, model: str, overrides: tuple[str, ...]) -> None:
    """The layers and the causal LM only: not the PeftModel, and not the head by itself."""
    for found in pair.run(sharding.structure, Course(models, model, overrides)):
        assert found["units"] == ["", *LAYERS]
        assert found["peft"] == (FULL not in overrides) and not found["peft_sharded"]
        assert found["plain"] == []  # adapters too, as they are added before sharding
        assert bool(found["adapters"]) == (FULL not in overrides)
        assert found["tied"] == (model == "tied")
        assert found["trained_types"] == {torch.float32}
        assert found["frozen_types"] == (set() if FULL in overrides else {torch.bfloat16})


@pytest.mark.parametrize("problems", [1, 5])
def test_evaluation_after_training(pair: Pair, models: Path, problems: int) -> None:
    course = Course(models, overrides=(f"evaluation.problems={problems}", FULL))
    one = sharding.evaluated(alone(), course)
    assert len(one["student"]) == problems and one["divergence"] > 0
    assert problems == 1 or len(set(one["correct"])) == 2
    for found in pair.run(sharding.evaluated, course):
        assert found["divergence"] == pytest.approx(one["divergence"], rel=1e-3)
        assert {**found, "divergence": None} == {**one, "divergence": None}


@pytest.mark.parametrize("shard", ["full", "none"])
def test_a_rank_generates_alone(pair: Pair, models: Path, shard: str) -> None:
    course = Course(models, overrides=OVERRIDES, shard=shard)
    wanted = sharding.generated_by_one_rank(alone(), course)
    assert len(wanted) == 3
    idle, made = pair.run(sharding.generated_by_one_rank, course)
    assert idle == [] and [c.tokens for c in made] == [c.tokens for c in wanted]


def test_ranks_generate_at_different_lengths(pair: Pair, models: Path) -> None:
    course = Course(models, overrides=(*OVERRIDES, FULL))
    short, long = pair.run(sharding.generated_at_different_lengths, course)
    assert {len(c.tokens) for c in short} == {1}
    assert sum(len(c.tokens) for c in long) > 20


@pytest.mark.parametrize("overrides", [(BF16,), (BF16, FULL)], ids=["lora", "full"])
def test_weights_return_after_generation(
    pair: Pair, models: Path, overrides: tuple[str, ...]
) -> None:
    """Generation computes in bf16, adapters too; fp32 weights are restored bit for bit."""
    course = Course(models, overrides=(*overrides, *OVERRIDES))
    for found in (
        sharding.failing_generation(alone(), course),
        *pair.run(sharding.failing_generation, course),
    ):
        assert found["failed"] and found["same"]
        assert found["inside"] == found["still"] == {("whole", torch.bfloat16)}
        assert found["loss"] is None or 0 < found["loss"] < 1


def test_copies_add_up_their_gradients_once(pair: Pair, models: Path) -> None:
    overrides = (FULL, "micro_batch_tokens=110", "method=sft")
    for calls, groups in pair.run(sharding.reductions, Course(models, "tied", overrides, "none")):
        assert groups == 2 and calls == 1 + len(LAYERS)


def test_fewer_samples_than_ranks(pair: Pair, models: Path) -> None:
    course = Course(models, overrides=("problems_per_step=1",))
    for text in pair.run(sharding.refusal, course):
        assert text.startswith("problems_per_step=1 ") and f"{SIZE} processes" in text


@pytest.mark.parametrize(
    "override, reason",
    [
        ("lora.target_modules=[q_proj, lm_head]", "lora.target_modules: lm_head cannot"),
        ("lora.target_modules=[all-linear]", "no module 'all-linear'"),
    ],
)
def test_no_adapter_on_the_head(models: Path, override: str, reason: str) -> None:
    assert reason in sharding.refusal(alone(), Course(models, overrides=(override,)))


def test_adapters_are_lora_and_nothing_else(tmp_path: Path) -> None:
    """Prompt tuning would shift the hidden states; no recipe can ask for it."""
    for key in ("peft_type=PROMPT_TUNING", "num_virtual_tokens=8", "modules_to_save=[lm_head]"):
        with pytest.raises(UserError, match=rf"unknown key lora\.{key.split('=')[0]}"):
            config("model", tmp_path, f"lora.{key}")
