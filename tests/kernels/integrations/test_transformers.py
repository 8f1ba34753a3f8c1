"""fuse_loss: a causal LM's own loss and gradients, without its logits."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor, nn

from opsd_kernels.integrations import heads
from opsd_kernels.integrations.transformers import fuse_loss, unfuse_loss
from tests.helpers import devices
from tests.helpers.family_models import FAMILIES, SLOW, VOCAB, make_family


def batch(seed: int = 0) -> dict[str, Tensor]:
    """Two sequences of 8 tokens, labels shorter than either."""
    ids = torch.randint(3, VOCAB, (2, 8), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[0, :3] = labels[1, 6:] = -100
    return there({"input_ids": ids, "labels": labels})


def there(inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs, tensors on the device that the tests use."""
    return {k: v.to(devices.NAME) if isinstance(v, Tensor) else v for k, v in inputs.items()}


def loss_and_grads(model: nn.Module, **inputs: Any) -> tuple[Tensor, Tensor]:
    model.zero_grad()
    loss = model(**inputs, use_cache=False).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return loss.detach(), torch.cat([grad.flatten() for grad in grads])


def assert_same(model: nn.Module, ours: tuple, theirs: tuple) -> None:
    (loss, grads), (true_loss, true_grads) = ours, theirs
    assert loss.item() == pytest.approx(true_loss.item(), rel=1e-6)
    assert true_grads.norm() > 1e-3
    assert (grads - true_grads).norm() < 5e-6 * true_grads.norm()


def assert_fused_is_same(model: nn.Module, **inputs: Any) -> None:
    inputs = inputs or batch()
    theirs = loss_and_grads(model, **inputs)
    fuse_loss(model)
    assert_same(model, loss_and_grads(model, **inputs), theirs)
    assert model(**inputs, use_cache=False).logits is None


def make(family: str = "granite") -> nn.Module:
    torch.manual_seed(0)
    return make_family(family, torch.float32).train()


@pytest.mark.parametrize(
    "family",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in FAMILIES],
)
def test_families(family: str) -> None:
    """Loss and gradients; without labels, and unfused, the logits are the model's own."""
    model = make(family).eval() if family != "xlstm" else make(family)
    inputs = batch()
    own = model(**inputs, use_cache=False).logits
    assert_fused_is_same(model, **inputs)
    ids = inputs["input_ids"]
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, own, rtol=0, atol=0)
    unfuse_loss(model)
    torch.testing.assert_close(model(**inputs, use_cache=False).logits, own, rtol=0, atol=0)
    assert "forward" not in vars(model)


OPTIONS: dict[str, dict[str, Any]] = {
    "num_items_in_batch": {"num_items_in_batch": torch.tensor(37)},
    "shift_labels": {"shift_labels": torch.tensor([[5, -100, 9, 4, 4, 8, 1, -100]] * 2)},
    "ignore_index": {"ignore_index": 7},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_arguments_of_the_loss_function(name: str) -> None:
    inputs = batch()
    if name == "ignore_index":
        inputs["labels"] = torch.where(inputs["labels"] == -100, 7, inputs["labels"])
    assert_fused_is_same(make(), **inputs, **there(OPTIONS[name]))


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe"])
def test_with_checkpointing(family: str) -> None:
    model = make(family)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_fused_is_same(model)


def test_with_the_loss_of_experts() -> None:
    """The load-balancing loss, which the model adds itself."""
    model = make("mixtral")
    assert_fused_is_same(model, **batch(), output_router_logits=True)
    plain = model(**batch(), use_cache=False).loss
    assert abs(model(**batch(), output_router_logits=True, use_cache=False).loss - plain) > 1e-4


@pytest.mark.parametrize("wrapped_first", [False, True])
@pytest.mark.parametrize("saved", [None, ["lm_head"]])
def test_with_peft(saved: list[str] | None, wrapped_first: bool) -> None:
    config = peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=saved, init_lora_weights=False
    )
    model = make("llama")
    if not wrapped_first:
        fuse_loss(model)
    adapted = peft.get_peft_model(model, config)
    if wrapped_first:
        fuse_loss(adapted)
    reference = peft.get_peft_model(make("llama"), config)
    reference.load_state_dict(adapted.state_dict())
    theirs = loss_and_grads(reference, **batch())
    assert_same(adapted, loss_and_grads(adapted, **batch()), theirs)
    assert adapted(**batch()).logits is None


def test_an_adapted_head_is_refused() -> None:
    model = make("llama")
    fuse_loss(model)
    config = peft.LoraConfig(r=4, target_modules=["lm_head"])
    message = r"^(\w+ is not supported: )?the output layer is adapted by peft: leave lm_head out"
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(model, config)(**batch())
    with pytest.raises(ValueError, match=message):
        fuse_loss(peft.get_peft_model(make("llama"), config))


@pytest.mark.parametrize("fused_first", [False, True])
def test_with_torch_compile(fused_first: bool) -> None:
    model = make("granite")
    theirs = loss_and_grads(model, **batch())
    if fused_first:
        fuse_loss(model)
    compiled = torch.compile(model, backend="aot_eager")
    if not fused_first:
        fuse_loss(compiled)
    for _ in range(2):  # traced, then run again
        assert_same(model, loss_and_grads(compiled, **batch()), theirs)
    assert compiled(**batch()).logits is None


def test_a_tuple_and_labels_by_position() -> None:
    model, inputs = make("llama"), batch()
    loss, logits = model(**inputs, return_dict=False)[:2]
    fuse_loss(model)
    fused_loss, none = model(**inputs, return_dict=False)[:2]
    assert none is None and logits is not None
    torch.testing.assert_close(fused_loss, loss)
    by_position = model(inputs["input_ids"], None, None, None, None, inputs["labels"])
    torch.testing.assert_close(by_position.loss, loss)


def test_generation_is_untouched() -> None:
    model = make("gemma2").eval()
    ids = batch()["input_ids"]
    before = model.generate(ids, max_new_tokens=6, do_sample=False)
    fuse_loss(model)
    assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False), before)


def test_without_labels_to_count() -> None:
    model = make("llama")
    fuse_loss(model)
    inputs = batch() | there({"labels": torch.full((2, 8), -100)})
    loss, grads = loss_and_grads(model, **inputs)
    assert loss == 0 and not grads.any()


def test_bf16_is_as_right_as_the_models_own() -> None:
    truth, own = make().double(), make().bfloat16()
    truth.load_state_dict(own.state_dict())
    true_loss = truth(**batch()).loss.item()
    own_gap = abs(own(**batch()).loss.item() - true_loss)
    fuse_loss(own)
    assert abs(own(**batch()).loss.item() - true_loss) <= 2 * own_gap + 1e-2


def test_twice_and_back_twice() -> None:
    model = make("llama")
    unfuse_loss(model)
    for _ in range(2):
        fuse_loss(model)
    for _ in range(2):
        unfuse_loss(model)
    assert model(**batch()).logits is not None and "forward" not in vars(model)
    fuse_loss(model)
    assert model(**batch()).logits is None


@pytest.mark.parametrize("family", ["granite", "gemma2"])
def test_an_unknown_family_is_refused_by_name(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(heads.FAMILIES, family, heads.Family(softcap="unknown"))
    model = make(family)
    with pytest.raises(ValueError, match=rf"^{type(model).__name__} is not supported: its logits"):
        fuse_loss(model)
    assert model(**batch()).logits is not None


def test_what_is_no_causal_lm_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^model: expected a transformers causal LM, got Linear"):
        fuse_loss(nn.Linear(3, 4))
    encoder = transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
            intermediate_size=16,
        )
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"^BertForMaskedLM is not supported: "):
        fuse_loss(encoder)


def test_in_transformers_trainer(tmp_path: Path) -> None:
    """Gradient accumulation divides by the labels of the whole batch; then evaluation, loading."""
    data = [{k: v[i % 2].cpu() for k, v in batch(i // 2).items()} for i in range(16)]
    weights, losses = [], []
    for fused in (False, True):
        model = make("gemma2")
        if fused:
            fuse_loss(model)
        args = transformers.TrainingArguments(
            str(tmp_path / str(fused)), max_steps=3, per_device_train_batch_size=2,
            use_cpu=devices.ON_CPU, gradient_accumulation_steps=4, report_to="none",
            logging_steps=1, learning_rate=1e-4, disable_tqdm=True, save_steps=3,
        )  # fmt: skip
        trainer = transformers.Trainer(model, args, train_dataset=data, eval_dataset=data[:4])
        trainer.train()
        losses.append([*(log["loss"] for log in trainer.state.log_history if "loss" in log)])
        losses[-1].append(trainer.evaluate()["eval_loss"])
        saved = tmp_path / str(fused) / "checkpoint-3"
        loaded = transformers.AutoModelForCausalLM.from_pretrained(saved)
        weights.append(torch.cat([p.flatten() for p in loaded.parameters()]))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    start = torch.cat([p.flatten() for p in make("gemma2").cpu().parameters()])
    moved = (weights[0] - start).norm()
    # Adam divides by the size of the gradient: where that is rounding, so is the step.
    assert (weights[1] - weights[0]).norm() < 1e-2 * moved
