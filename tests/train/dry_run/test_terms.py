"""What terms beside the divergence, and a sampler of two models, add to the predictions."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opsd_kernels import plan
from opsd_train.config.errors import UserError
from opsd_train.config.schema import Config
from opsd_train.dry_run.devices import DEVICES
from opsd_train.dry_run.plan import dry_run
from opsd_train.dry_run.prediction import Prediction, predict_run
from opsd_train.dry_run.setup import setup_of
from opsd_train.dry_run.step_time import loss_seconds
from opsd_train.methods import objective
from tests.helpers import method_cases, tiny

H100 = DEVICES["h100"]
FORWARD_KL = ("loss.beta=1.0", "loss.forward_kl={min_entropy: 0.8}")
CASES = method_cases.TERMS | {
    "opsd": (),
    "opsd sampled token": ("loss.objective=sampled_token",),
    "opsd, more where unsure": FORWARD_KL,
    "opsd long term and policy gradient": (
        *("rollout.samples_per_prompt=4", "loss.beta=1.0", "loss.long_term=1.0", "grpo={}"),
    ),
}


def count(monkeypatch: pytest.MonkeyPatch, config: Config) -> list[str]:
    """The losses with a gradient that a micro-batch's loss calls."""
    calls: list[str] = []

    def noted(name: str, original: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            if torch.is_grad_enabled():
                calls.append(name)
            return original(*args, **options)

        return call

    for function in ("jsd", "advantage", "logprob"):
        name = f"fused_linear_{function}"
        kind = "divergence" if function == "jsd" else "logprob"
        monkeypatch.setattr(objective, name, noted(kind, getattr(objective, name)))
    method = method_cases.make_method(config, method_cases.make_policy())
    samples = method.assign_weights(method_cases.make_samples())
    method_cases.run(method, samples)
    return calls


@pytest.mark.parametrize("case", CASES)
def test_every_pass_over_the_logits_is_counted(
    case: str, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = (f"distill.teacher={tiny_folder}",) if "distill" in case else ()
    config = tiny.config(tiny_folder, "never-made", *CASES[case], *teacher)
    setup, _ = setup_of(config, "none", 1, torch.device("cpu"))
    assert sorted([setup.loss["loss"], *setup.beside]) == sorted(count(monkeypatch, config))


def predicted(folder: Path, *changes: str) -> Prediction:
    options = ("lora=null", "model.device=cpu", *changes)
    return predict_run(tiny.config(folder, "never-made", *options), device=H100)


def test_a_forward_kl_takes_as_long_as_its_pass(tiny_folder: Path) -> None:
    alone = predicted(tiny_folder, "loss.beta=1.0")
    both = predicted(tiny_folder, *FORWARD_KL)
    sizes, loss, extra = both.sizes, both.setup.loss, 0.0
    assert not loss["two_passes"]
    for batch in both.step.micro_batches:
        made = plan(batch.loss_tokens, sizes.hidden, sizes.vocab, grad_weight=True, **loss)
        extra += loss_seconds(H100, made, both.setup.itemsize, heads=2).total
    grown = both.seconds["student"].total - alone.seconds["student"].total
    assert grown == pytest.approx(extra) and extra > 0


def distilled(folder: Path, share: float) -> tuple[str, ...]:
    teacher = f"teacher: {json.dumps(str(folder))}, dtype: float32, prompt: teacher"
    weight = ("loss.token_weight.importance_cap=2.0",) if share else ()
    return ("method=distill", f"distill={{{teacher}, sampler_share: {share}}}", *weight)


def test_a_mixture_generates_with_both_models(tiny_folder: Path) -> None:
    """Both read the teacher's prompt, the longer; the models are one, so all is there twice."""
    prompt = "prompts.teacher={{ problem.question }} {{ problem.solution }} Solve it."
    both = predicted(tiny_folder, *distilled(tiny_folder, 0.2), prompt)
    (batch,), sizes = both.step.generations, both.sizes
    assert batch.prompt == both.step.longest_prompt
    cache = 2 * sizes.layers * batch.rows * (batch.prompt + batch.new) * sizes.keys * 4
    parts = both.most["rollout"].parts
    assert parts["the teacher's KV cache"] == parts["KV cache"] == cache
    alone = predicted(tiny_folder, *distilled(tiny_folder, 0.0), f"prompts.student={prompt[16:]}")
    assert alone.step.generations == both.step.generations
    assert both.seconds["rollout"].total == pytest.approx(2 * alone.seconds["rollout"].total)


def test_a_budget_below_the_mixtures_prompt(tiny_folder: Path) -> None:
    """Refused as the engine would refuse it in the run's first step."""
    room = ("rollout.batch_tokens=80", "evaluation.problems=0")
    predicted(tiny_folder, *distilled(tiny_folder, 0.0), *room)
    with pytest.raises(UserError, match=r"rollout\.batch_tokens=80 is less than one sequence"):
        dry_run(tiny.config(tiny_folder, "never-made", *distilled(tiny_folder, 0.2), *room))
