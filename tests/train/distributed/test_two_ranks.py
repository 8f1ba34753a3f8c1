"""Two ranks match one process: samples, losses, metrics, gradients and weights of two steps."""

import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from opsd_train.cache_teacher import write_caches
from tests.helpers.pair import Pair, alone
from tests.helpers.sharded_runs import write_small_parts
from tests.helpers.steps import Course, Outcome, follow
from tests.helpers.tiny import config

pytestmark = pytest.mark.dist

FULL = "lora=null"
CHECKPOINTING = "model.gradient_checkpointing=true"
SMALL = "micro_batch_tokens=110"  # one sample or two
UNEVEN = "problems_per_step=5"
GATE = "opsd.verify_weight={correct: 1.0, wrong: 0.0}"
GRPO = ("method=grpo", "rollout.samples_per_prompt=2", "grpo.mask_truncated=false")
SDPO = (  # a teacher that sees siblings, renewed copies, and a policy gradient
    *("rollout.samples_per_prompt=3", "grpo={mask_truncated: false}", "loss.weight=0.5"),
    *("prompts.teacher_context=[sibling]", "prompts.teacher={{ sibling }}"),
    *("evaluation.teacher=false", "evaluation.divergence=false"),
    *("opsd.teacher=resync", "opsd.resync_every=1"),
)


def teacher(models: Path) -> tuple[str, ...]:
    return "method=distill", f"distill.teacher={models / 'teacher'}", "distill.dtype=float32"


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    """The largest relative error of any tensor."""
    assert one.keys() == two.keys()
    largest = 0.0
    for name, value in one.items():
        assert value.shape == two[name].shape
        largest = max(largest, ((value - two[name]).norm() / (value.norm() + 1e-12)).item())
    return largest


def assert_same_rows(one: Outcome, two: Outcome) -> None:
    for row, other in zip(one.rows, two.rows, strict=True):
        assert row.keys() - {"peak_mib"} == other.keys() - {"peak_mib"}  # per process
        for name in row:
            if not re.search("second|peak|top_tokens", name):
                assert other[name] == pytest.approx(row[name], rel=1e-3, abs=1e-5), name
        top, wanted = (r.get("top_tokens", []) for r in (other, row))
        for got, entry in zip(top, wanted, strict=True):
            assert got == (entry[0], pytest.approx(entry[1], rel=1e-3, abs=1e-5), entry[2])


def assert_same_samples(one: Outcome, ranks: list[Outcome]) -> None:
    for wanted, *parts in zip(one.samples, *(rank.samples for rank in ranks), strict=True):
        made = [sample for part in parts for sample in part]
        assert len(made) == len(wanted)
        for got, sample in zip(sorted(made), sorted(wanted), strict=True):
            assert got[:2] == sample[:2]
            if sample[2] is not None:
                assert got[2] == pytest.approx(sample[2], abs=1e-4)


def compare(pair: Pair, course: Course) -> tuple[Outcome, list[Outcome]]:
    """Follow the course on one process and on two, and check that nothing differs.

    Every update but the first begins with the weights of one process.
    """
    one = follow(alone(), course)
    ranks = pair.run(follow, replace(course, updates=tuple(one.updates)))
    assert_same_samples(one, ranks)
    assert_same_rows(one, ranks[0])
    assert [sorted(table) for table in ranks[0].shown] == [sorted(table) for table in one.shown]
    for rank in ranks:
        assert len(rank.gradients) == len(one.gradients)
        for gradients, wanted in zip(rank.gradients, one.gradients, strict=True):
            assert difference(wanted, gradients) < 2e-5
        assert difference(one.initial, rank.initial) == 0
        # Adam takes a full step for a gradient of any size.
        for weights, wanted in zip(rank.updates, one.updates, strict=True):
            for name, weight in wanted.items():
                assert (weight - weights[name]).abs().max() < 2e-4, name
    assert difference(ranks[0].weights, ranks[1].weights) == 0
    moved = [n for n in one.weights if (one.weights[n] - one.initial[n]).abs().max() > 5e-3]
    assert (moved == list(one.weights)) == bool(one.gradients[-1])
    assert all(value.abs().max() > 0 for value in one.gradients[-1].values())
    return one, ranks


@pytest.mark.parametrize(
    "model, shard, overrides",
    [
        ("tied", "full", ()),
        ("untied", "none", (CHECKPOINTING, SMALL, "loss.objective=sampled_token", "lora.rank=1")),
        ("untied", "full", (FULL, CHECKPOINTING)),
        ("tied", "none", (FULL, "opsd.teacher=ema", "opsd.ema_decay=0.5", SMALL)),
        ("tied", "full", (FULL, "opsd.teacher=current", "loss.token_clip=0.01")),
        ("tied", "full", (FULL, "opsd.teacher=ema", "loss.objective=top_k", "loss.top_k=8")),
        ("tied", "full", (FULL, SMALL, "method=sft")),
        ("tied", "full", (*GRPO, FULL, "updates_per_step=2", "grpo.kl_weight=0.1")),
        ("tied", "full", (*SDPO, FULL, SMALL, "grpo.kl_weight=0.1")),
    ],
)
def test_same_course(
    pair: Pair, models: Path, model: str, shard: str, overrides: tuple[str, ...]
) -> None:
    one, _ = compare(pair, Course(models, model, overrides, shard))
    if FULL in overrides and model == "untied":
        assert one.gradients[0]["lm_head.weight"].norm() > 0


def test_distill_with_a_sharded_teacher(pair: Pair, models: Path) -> None:
    compare(pair, Course(models, overrides=(*teacher(models), FULL, SMALL)))


def test_two_sharded_teachers(pair: Pair, models: Path, tmp_path: Path) -> None:
    """One of them has a problem in four: most micro-batches have none of its samples."""
    lines = [
        {"question": f"{n} + 1?", "answer": str(n), "by": "few" if n % 4 == 0 else "many"}
        for n in range(12)
    ]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    teachers = {
        "few": {"teacher": str(models / "teacher"), "dtype": "float32", "prompt": "teacher"},
        "many": {"teacher": str(models / "untied"), "dtype": "float32"},
    }
    overrides = (
        *("method=distill", f"distill={json.dumps({'teachers': teachers})}", FULL, SMALL, UNEVEN),
        *("data.source=file", f"data.path={tmp_path / 'p.jsonl'}", "data.columns.teacher=by"),
        *("data.columns.solution=null", "data.train_size=null", "data.heldout_size=0"),
    )
    compare(pair, Course(models, overrides=overrides))


def test_a_cache_that_two_ranks_write_and_read(pair: Pair, models: Path, tmp_path: Path) -> None:
    top = ("loss.objective=top_k", "loss.top_k=8", "distill.on_policy=false")
    overrides = (*teacher(models), *top, f"distill.cache={tmp_path / 'one'}")
    made = config(models / "tied", tmp_path / "run", *overrides, "evaluation.problems=0")
    two = replace(made, distill=replace(made.distill, cache=str(tmp_path / "two")))
    write_small_parts(alone(), made)
    pair.run(write_small_parts, two)
    files = sorted(file.name for file in (tmp_path / "one").iterdir())
    assert len(files) == 8  # 20 problems in parts of 3, and teacher.json
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    write_caches(replace(made, distill=replace(made.distill, cache=str(tmp_path / "c"))), alone())
    compare(pair, Course(models, overrides=(*overrides, f"distill.cache={tmp_path / 'c'}", SMALL)))


@pytest.mark.parametrize(
    "shard, overrides",
    [
        ("full", (GATE, FULL, "opsd.teacher=ema")),
        ("none", (*GRPO, "updates_per_step=2", "grpo.kl_weight=0.1")),
        ("full", ("method=star",)),
    ],
    ids=["opsd", "grpo", "star"],
)
def test_one_rank_without_a_loss_token(
    pair: Pair, models: Path, shard: str, overrides: tuple[str, ...]
) -> None:
    course = Course(models, "tied", overrides, shard, right="first", most_weighted=1)
    _, (first, second) = compare(pair, course)
    assert sum(second.trained) == 0 and sum(first.trained) > 0
    assert second.idle == first.trained


def test_ranks_with_different_numbers_of_micro_batches(pair: Pair, models: Path) -> None:
    course = Course(models, overrides=(SMALL, UNEVEN, "lora.rank=3"))
    one, (first, second) = compare(pair, course)
    assert one.trained == [5, 5] and first.trained == [3, 3] and second.trained == [2, 2]
    assert first.idle == [0, 0] and second.idle == [1, 1]


@pytest.mark.parametrize(
    "shard, overrides",
    [("full", (GATE, FULL)), ("none", GRPO), ("full", ("method=star",))],
    ids=["opsd", "grpo", "star"],
)
def test_no_rank_with_a_loss_token(
    pair: Pair, models: Path, shard: str, overrides: tuple[str, ...]
) -> None:
    one, ranks = compare(pair, Course(models, "tied", overrides, shard, right="none"))
    for outcome in (one, *ranks):
        assert outcome.gradients == [{}, {}] and difference(outcome.initial, outcome.weights) == 0


@pytest.mark.parametrize("overrides", [(), (FULL,)], ids=["lora", "full"])
def test_bfloat16(pair: Pair, models: Path, overrides: tuple[str, ...]) -> None:
    """Two ranks are no farther from float32 than one process, which rounds at other places."""
    overrides = ("method=sft", *overrides)
    course = Course(models, overrides=(*overrides, "model.dtype=bfloat16"), steps=1)
    truth = follow(alone(), Course(models, overrides=overrides, steps=1))
    one, two = follow(alone(), course), pair.run(follow, course)[0]

    def error(outcome: Outcome) -> float:
        wanted, got = (
            torch.cat([part.gradients[0][name].flatten() for name in truth.initial])
            for part in (truth, outcome)
        )
        return ((got - wanted).norm() / wanted.norm()).item()

    assert two.rows[0]["loss"] == pytest.approx(truth.rows[0]["loss"], rel=2e-3)
    assert 1e-3 < error(two) < min(1.5 * error(one), 0.1)
    values = [*two.weights.values(), *two.gradients[0].values()]
    assert all(value.dtype == torch.float32 for value in values)


METHODS = {
    "opsd": (),
    "opsd-ema": ("opsd.teacher=ema", "opsd.ema_decay=0.5"),
    "opsd-sampled": ("loss.objective=sampled_token", "opsd.teacher=current"),
    "sft": ("method=sft",),
    "grpo": (*GRPO, "updates_per_step=2", "grpo.kl_weight=0.1"),
    "star": ("method=star",),
    "context_distill": ("method=context_distill",),
    "distill": ("method=distill",),
    "distill-off": ("method=distill", "distill.on_policy=false"),
}


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["full", "none"])
@pytest.mark.parametrize("name", METHODS)
def test_whole_matrix(pair: Pair, models: Path, name: str, shard: str) -> None:
    method = METHODS[name]
    if name.startswith("distill"):
        method = (*teacher(models), *method[1:])
    axes = itertools.product(["tied", "untied"], [(), (FULL,)], [(), (CHECKPOINTING,)])
    for model, trained, checkpointing in axes:
        overrides = (*method, *trained, *checkpointing, SMALL, UNEVEN)
        compare(pair, Course(models, model, overrides, shard))
