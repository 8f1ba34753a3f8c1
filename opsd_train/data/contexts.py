"""What the teacher sees of a rollout: a successful sibling, and the check of the sample's answer.

The teacher's prompt is then made after the rollout, for each sample. A sample with nothing to show
has a `context` of () and its student's prompt in place of the teacher's, which the methods leave
out of the divergence.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.data.prompts import PromptBuilder, RolloutContext
from opsd_train.data.seeds import stable_seed

TOO_LONG = "too long"
"""Among a sample's `context`: a text was left out, as the prompt would have been too long."""


class TeacherContexts:
    """Makes the teacher's prompts of a step from its graded samples, as prompts.teacher_context
    says. Every rank makes those of all samples, so that all have the same."""

    def __init__(self, config: Config, prompts: PromptBuilder) -> None:
        self._prompts, self._seed = prompts, config.seed
        self._sees = config.prompts.teacher_context
        self._limit = config.prompts.max_prompt_tokens
        self._size = config.rollout.samples_per_prompt

    def add(self, step: int, samples: Sequence[Sample]) -> list[Sample]:
        """The samples with teacher's prompts; those of a problem are side by side."""
        texts = self._prompts.tokenizer.batch_decode(
            [sample.completion for sample in samples], skip_special_tokens=True
        )
        made = []
        for index, sample in enumerate(samples):
            first = index - index % self._size
            group = range(first, first + self._size)
            siblings = [
                texts[other] for other in group if other != index and samples[other].correct
            ]
            # Seeded by the sample's place in the step: the same on any number of ranks.
            random.Random(stable_seed(self._seed, "sibling", step, index)).shuffle(siblings)
            made.append(self._with_prompt(sample, texts[index], siblings))
        return made

    def _with_prompt(self, sample: Sample, text: str, siblings: Sequence[str]) -> Sample:
        """With the first prompt that is short enough: of any sibling, without one, of neither."""
        shown = siblings if "sibling" in self._sees else []
        feedback = feedback_on(sample) if "feedback" in self._sees else None
        too_long = False
        for sibling in [*shown, None]:
            if sibling is None and feedback is None:
                break
            context = RolloutContext(text, sibling, feedback)
            prompt, shown_in_it = self._prompts.teacher_after(sample.problem, context)
            if len(prompt) <= self._limit:
                seen = (*shown_in_it, *[TOO_LONG] * (too_long and sibling is None))
                return replace(sample, teacher_prompt=prompt, context=seen)
            too_long = True
        return replace(sample, teacher_prompt=sample.student_prompt, context=(TOO_LONG,) * too_long)


def feedback_on(sample: Sample) -> str | None:
    """The check of a wrong answer in words; None for a right one, as in SDPO, or unchecked ones."""
    if sample.correct is not False or sample.check_failed is not None:
        return None
    if sample.answer is not None:
        verdict = f"The answer {sample.answer} is wrong."
    elif sample.finished:
        verdict = "There is no answer."
    else:
        verdict = "It was cut off before it came to an answer."
    return f"{verdict} The right answer is {sample.problem.answer}."


def has_context(sample: Sample) -> bool:
    """Whether the teacher sees something that the student does not."""
    return sample.context is None or any(name != TOO_LONG for name in sample.context)


def context_metrics(samples: Sequence[Sample]) -> dict[str, Any]:
    """Shares of the samples by what their teacher sees; empty where it is the problem's alone."""
    seen = [sample.context for sample in samples if sample.context is not None]
    if not seen:
        return {}
    shares = {
        "context_sibling": sum("sibling" in names for names in seen),
        "context_feedback": sum("feedback" in names for names in seen),
        "context_none": sum(not has_context(sample) for sample in samples),
        "context_too_long": sum(TOO_LONG in names for names in seen),
    }
    return {name: count / len(seen) for name, count in shares.items()}
