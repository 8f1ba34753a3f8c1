"""TRL's trainers: losses, gradients and metrics of `fused(Trainer)` are those of the trainer."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM
from trl import DPOTrainer, SFTTrainer
from trl.experimental.gold import GOLDConfig, GOLDTrainer
from trl.trainer import distillation_trainer
from trl.trainer import utils as trl_utils

from opsd_kernels.integrations import trl
from opsd_kernels.integrations.trl import fused, use_fused_losses, version
from tests.helpers import trl_runs
from tests.helpers.trl_runs import TRAINERS, Record, assert_same_run, build, flat, run

ROOT = Path(__file__).parents[3]


def assert_fused_is_same(
    kind: str, family: str, folder: Path, lora: bool = False, **options: Any
) -> Record:
    theirs = run(*build(kind, family, folder / "theirs", lora=lora, **options))
    trainer, record = build(
        kind, family, folder / "ours", fused(TRAINERS[kind][0]), lora=lora, **options
    )
    ours = run(trainer, record)
    assert_same_run(ours, theirs)
    return ours


# Every family with every trainer; LoRA and accumulation alternate, because they meet the loss in
# the same two places (what needs a gradient, and the divisor) whatever the family.
GRID = [
    pytest.param(
        kind,
        family,
        (row + column) % 2 == 1,
        4 if (row // 2 + column) % 2 else 1,
        # Its head is Llama's; test_ranks.py has it with every trainer.
        marks=pytest.mark.exhaustive if family == "qwen3" else (),
    )
    for row, kind in enumerate(TRAINERS)
    for column, family in enumerate(trl_runs.MODELS)
]


@pytest.mark.parametrize(("kind", "family", "lora", "accumulation"), GRID)
def test_families(kind: str, family: str, lora: bool, accumulation: int, tmp_path: Path) -> None:
    assert_fused_is_same(
        kind, family, tmp_path, lora,
        gradient_accumulation_steps=accumulation, per_device_train_batch_size=2,
    )  # fmt: skip


LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo", "luspo", "vespo")
# They average the same terms in other ways, after the log-probabilities.
ALIKE = ("bnpo", "dr_grpo", "dapo", "luspo", "vespo")
VARIANTS: list[tuple[str, bool, dict[str, Any]]] = [
    ("sft", False, {"loss_type": "dft"}),
    ("sft", True, {"packing": True, "max_length": 32}),
    ("grpo", False, {"entropy_coef": 0.3}),
    ("grpo", True, {"entropy_coef": 0.3}),
    ("grpo", True, {"top_entropy_quantile": 0.5, "entropy_coef": 0.1}),
    ("grpo", False, {"beta": 0.2, "temperature": 0.7}),
    ("grpo", True, {"beta": 0.2, "num_iterations": 2}),
    *[
        ("grpo", index % 2 == 0, {"loss_type": loss, "num_iterations": 2})
        for index, loss in enumerate(LOSS_TYPES)
    ],
    ("grpo", False, {"importance_sampling_level": "sequence", "num_iterations": 2}),
    ("rloo", False, {"beta": 0.0, "temperature": 1.3}),
    ("distillation", False, {"beta": 0.0}),
    ("distillation", True, {"beta": 0.5, "temperature": 0.8}),
    ("gkd", False, {"beta": 0.0, "lmbda": 0.0}),
    ("gkd", True, {"beta": 1.0, "seq_kd": True, "lmbda": 0.3}),
    ("sdft", False, {"distillation_alpha": 0.0, "temperature": 1.7}),
    ("sdft", True, {"distillation_alpha": 1.0, "num_loss_tokens_to_skip": 2}),
    ("sdft", False, {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    ("sdft", True, {"teacher_model_kind": "ema", "teacher_update_rate": 0.5}),
    ("sdft", False, {"teacher_model_kind": "ema", "teacher_update_rate": 0.5}),
    ("sdft", True, {"num_iterations": 3, "distillation_is_clip": 1.5}),
    ("sdpo", False, {"distillation_mode": "sampled_token", "distillation_alpha": 1.0}),
    ("sdpo", True, {"distillation_weight": 0.5}),
    ("sdpo", False, {"distillation_weight": 0.0}),
]


def mark_alike(variant: tuple[str, bool, dict[str, Any]]) -> Any:
    alike = variant[2].get("loss_type") in ALIKE
    return pytest.param(*variant, marks=pytest.mark.exhaustive if alike else ())


@pytest.mark.parametrize(("kind", "lora", "options"), [mark_alike(v) for v in VARIANTS], ids=str)
def test_options(kind: str, lora: bool, options: dict[str, Any], tmp_path: Path) -> None:
    assert_fused_is_same(kind, "gemma2", tmp_path, lora, **options)


def test_an_entropy_bonus_has_a_gradient(tmp_path: Path) -> None:
    """Not the metric alone: an entropy without gradient would log the same."""
    trainer = fused(TRAINERS["grpo"][0])
    plain, bonus = (
        run(*build("grpo", "llama", tmp_path / str(c), trainer, lora=True, entropy_coef=c))
        for c in (0.0, 5.0)
    )
    assert (flat(plain.grads[0]) - flat(bonus.grads[0])).norm() > 0.1 * flat(plain.grads[0]).norm()


# Each way of reaching the loss once with all weights, once with LoRA.
@pytest.mark.parametrize(
    ("kind", "lora"),
    [("sft", False), ("grpo", True), ("gkd", False), ("sdft", True), ("distillation", False)],
)
def test_mixed_precision(kind: str, lora: bool, tmp_path: Path) -> None:
    """Under accelerate's bf16 autocast the first gradient is as near to float32's as TRL's own.

    The optimizer steps and the samples of trainers that generate in bf16 drift apart after it.
    """
    options = {"max_steps": 1, **({"lmbda": 0.0} if kind == "gkd" else {})}
    true, theirs = (
        run(*build(kind, "gemma2", tmp_path / str(bf16), lora=lora, bf16=bf16, **options))
        for bf16 in (False, True)
    )
    pair = build(
        kind, "gemma2", tmp_path / "ours", fused(TRAINERS[kind][0]), lora=lora, bf16=True, **options
    )
    ours = run(*pair)
    truth, norm = flat(true.grads[0]), flat(true.grads[0]).norm()
    found, own = flat(ours.grads[0]), flat(theirs.grads[0])
    assert (found - truth).norm() < 2 * (own - truth).norm() + 1e-3 * norm
    assert (found - own).norm() < 0.1 * norm


@pytest.mark.parametrize("kind", ["dpo", "kto"])
@pytest.mark.parametrize("lora", [False, True])
def test_preference_trainers_reached_by_the_process(kind: str, lora: bool, tmp_path: Path) -> None:
    """DPO and KTO look up the function that use_fused_losses replaces."""
    theirs = run(*build(kind, "granite", tmp_path / "theirs", lora=lora))
    with use_fused_losses():
        ours = run(*build(kind, "granite", tmp_path / "ours", lora=lora))
    assert_same_run(ours, theirs)


def test_gold_with_one_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TRAINERS, "gold", (GOLDTrainer, GOLDConfig))
    options = {**trl_runs.OPTIONS["gkd"], "max_completion_length": 7, "temperature": 1.5}
    del options["max_new_tokens"]
    monkeypatch.setitem(trl_runs.OPTIONS, "gold", options)
    assert_fused_is_same("gold", "granite", tmp_path, use_uld_loss=False)


@pytest.mark.parametrize("kind", ["sdft", "gkd", "sft"])
def test_no_step_asks_the_head_for_logits(kind: str, tmp_path: Path) -> None:
    options = {"lmbda": 0.0} if kind == "gkd" else {}
    trainer, record = build(kind, "llama", tmp_path, fused(TRAINERS[kind][0]), **options)
    compute_loss, calls = trainer.compute_loss, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        head = trainer.model.get_output_embeddings()
        with head.register_forward_hook(lambda m, i, output: calls.append(output.shape[-1])):
            return compute_loss(*args, **kwargs)

    trainer.compute_loss = watched
    run(trainer, record)
    assert len(record.grads) == 2 and 261 not in calls


def test_evaluation_with_metrics_gets_logits(tmp_path: Path) -> None:
    shapes = []
    trainer, _ = build("gkd", "llama", tmp_path, fused(TRAINERS["gkd"][0]))
    trainer.compute_metrics = lambda result: shapes.append(result.predictions.shape) or {}
    trainer.evaluate()
    assert shapes[0][-1] == 261


def test_saved_and_resumed(tmp_path: Path) -> None:
    """A checkpoint holds the trainer's own model, and a run resumed from it goes on alike."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    trainers = {
        name: build("sft", "llama", tmp_path / name, cls, **options)
        for name, cls in (("ours", fused(SFTTrainer)), ("theirs", SFTTrainer))
    }
    whole = {name: run(*pair) for name, pair in trainers.items()}
    assert_same_run(whole["ours"], whole["theirs"])
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name / "checkpoint-4") for name in trainers
    )
    ids = torch.arange(20)[None]
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    resumed = {
        name: run(
            *build("sft", "llama", tmp_path / f"{name}-again", cls, **options),
            checkpoint=tmp_path / name / "checkpoint-2",
        )
        for name, cls in (("ours", fused(SFTTrainer)), ("theirs", SFTTrainer))
    }
    assert len(resumed["ours"].grads) == 2
    assert_same_run(resumed["ours"], resumed["theirs"])


def test_for_the_process_and_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (trl_utils._ChunkedLogProbFunction, distillation_trainer._chunked_divergence_loss)
    theirs = run(*build("sft", "llama", tmp_path / "theirs"))
    patches = use_fused_losses()
    try:
        use_fused_losses().close()  # a second call changes nothing
        assert trl_utils._ChunkedLogProbFunction is not before[0]
        assert_same_run(run(*build("sft", "llama", tmp_path / "ours")), theirs)
    finally:
        patches.close()
    after = (trl_utils._ChunkedLogProbFunction, distillation_trainer._chunked_divergence_loss)
    assert after == before
    with use_fused_losses():
        assert trl_utils._ChunkedLogProbFunction is not before[0]
    assert trl_utils._ChunkedLogProbFunction is before[0]


def test_mean_logits_and_what_has_no_fused_form() -> None:
    """DPO and KTO log the mean logit; their options that need more are refused by name."""
    torch.manual_seed(0)
    hidden, weight, bias = torch.randn(5, 8), torch.randn(30, 8), torch.randn(30)
    targets = (hidden @ weight.T + bias).argmax(-1)
    targets[:2] = 7
    with use_fused_losses():
        apply = trl_utils._ChunkedLogProbFunction.apply
        names = ("mean_logits", "is_top1")
        result = apply(hidden, weight, bias, targets, 0.7, 64, None, 0.3, names)
        with pytest.raises(ValueError, match=r"^log_sum_sq_probs "):
            apply(hidden, weight, bias, targets, 1.0, 64, None, 1.0, ("log_sum_sq_probs",))
        with pytest.raises(ValueError, match=r"^mean_logits .*softcap"):
            apply(hidden, weight, bias, targets, 1.0, 64, 5.0, 1.0, ("mean_logits",))
    logits = 0.3 * (hidden @ weight.T + bias) / 0.7
    torch.testing.assert_close(result[3], logits.mean(-1))
    torch.testing.assert_close(result[4], logits.argmax(-1) == targets)
    assert result[1] is None and result[2] is None


def test_another_version_of_trl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(version, "KNOWN_VERSIONS", ("1.2.3", "1.2.4"))
    for call in (use_fused_losses, lambda: fused(SFTTrainer)):
        with pytest.raises(ImportError, match=r"^trl 1\.16\.0 is not known .*1\.2\.3, 1\.2\.4"):
            call()


def test_nothing_of_trl_is_imported_before_its_version_is_checked() -> None:
    """Another version may lack the modules: the line must come before their ImportError."""
    code = (
        "import sys; sys.modules['trl'] = None\n"
        "from opsd_kernels.integrations.trl import fused, use_fused_losses, version\n"
        "version.KNOWN_VERSIONS = ('1.2.3',)\n"
        "use_fused_losses()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stderr.splitlines()[-1].startswith("ImportError: trl 1.16.0 is not known")


def test_refusals_name_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(
        TypeError, match=r"^trainer: expected one of TRL's DistillationTrainer, .*DPO"
    ):
        fused(DPOTrainer)
    with pytest.raises(ValueError, match=r"^distillation_mode: 'topk_logits' .*'full_logits'"):
        build(
            "sdft", "llama", tmp_path, fused(TRAINERS["sdft"][0]), distillation_mode="topk_logits"
        )
    assert trl.KNOWN_VERSIONS == ("1.16.0",)


def test_an_adapted_head_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    targets = ["q_proj", "lm_head"]
    adapter = peft.LoraConfig(r=4, target_modules=targets, init_lora_weights=False)
    monkeypatch.setattr(trl_runs.peft, "LoraConfig", lambda **_: adapter)
    pair = build("sdft", "llama", tmp_path, fused(TRAINERS["sdft"][0]), lora=True)
    with pytest.raises(ValueError, match=r"^the output layer is adapted by peft: leave lm_head"):
        run(*pair)


@pytest.mark.parametrize("kind", ["gkd", "sdft"])
def test_a_head_that_is_saved_whole(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """peft's modules_to_save trains a copy of the head beside the adapters."""
    config = peft.LoraConfig
    monkeypatch.setattr(
        trl_runs.peft,
        "LoraConfig",
        lambda **options: config(**options, modules_to_save=["lm_head"]),
    )
    assert_fused_is_same(kind, "llama", tmp_path, lora=True)
