"""Context distillation's samples are the untrained model's, also by servers that get adapters."""

from typing import Any

import pytest

from opsd_train.rollout import Request, Sampling
from opsd_train.rollout.transformers_engine import TransformersEngine
from tests.helpers.served_trainer import (
    STEPS,
    by_transformers,
    follow,
    make_trainer,
    served_by,
    trained,
)

GREEDY = Sampling(12)
PROMPT = [1, 2, 3]


@pytest.mark.parametrize("ahead", [0, 1])
def test_training_samples_the_untrained_model_and_evaluation_the_present_one(
    tiny_folder, tmp_path, doubles, ahead
) -> None:
    method = ("method=context_distill", *served_by(*doubles, ahead=ahead))
    trainer = make_trainer(tiny_folder, tmp_path, *method)
    engine = TransformersEngine(trainer.policy, trainer.tokenizer, trainer.config.rollout)
    untrained, step = trained(trainer), trainer.step
    (at_first,) = engine.generate([Request(PROMPT, seed=0)], GREEDY)

    def evaluated(number: int) -> Any:
        made = step(number)
        (served,) = trainer.trajectories.greedy([PROMPT], GREEDY.max_new_tokens)
        (own,) = engine.generate([Request(PROMPT, seed=0)], GREEDY)
        assert served.tokens == own.tokens
        return made

    trainer.step = evaluated
    course = follow(trainer)
    (at_last,) = engine.generate([Request(PROMPT, seed=0)], GREEDY)
    assert at_last.tokens != at_first.tokens
    assert not any("sample_age" in row for row in course.rows)  # which is of the student's samples
    for number, rollout in enumerate(course.rollouts, 1):
        wanted = by_transformers(trainer, untrained, number)
        assert [s.completion for s in rollout.own] == [c.tokens for c in wanted]
    present = by_transformers(trainer, course.weights[-1], STEPS)
    assert [c.tokens for c in present] != [c.tokens for c in wanted]
