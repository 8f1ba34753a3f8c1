"""The plugin for ms-swift against the loss of ms-swift's own trainer, from its wheel.

`make` installs the wheel without its dependencies. Its gkd_trainer.py, gkd_loss.py and the class
that redirects a forward are the real ones; the rest of ms-swift and TRL's trainers are stubs, and
the trainer is made without its __init__: no data, no generation, no command line.
"""

import ast
import contextlib
import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from opsd_kernels.testing import assert_close

ROOT = Path(__file__).parents[2]
WHEEL = Path(sys.prefix) / "swift" / "swift"
SIZES = {
    "vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
    "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3,
}  # fmt: skip


def tiny(seed: int, **options: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**SIZES | options))


def load(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def only(path: Path, name: str) -> object:
    """One class or function of a module that needs more than it."""
    tree = ast.parse(path.read_text())
    tree.body = [node for node in tree.body if getattr(node, "name", "") == name]
    space = {"nn": nn, "Any": object, "contextmanager": contextlib.contextmanager,
             "PreTrainedModel": nn.Module, "Optional": Callable, "Dict": dict}  # fmt: skip
    source = "from __future__ import annotations\n" + ast.unparse(tree)
    exec(compile(source, str(path), "exec"), space)
    return space[name]


@pytest.fixture(scope="module")
def swift() -> Iterator[SimpleNamespace]:
    """ms-swift's trainer module, its loss with logits, and the plugin."""
    if not WHEEL.exists():
        pytest.skip("ms-swift's wheel is not installed beside the environment: make")
    trl = MagicMock(__version__="1.0.0")
    for name in ("SFTTrainer", "GKDTrainer"):
        setattr(trl, name, type(name, (), {"__init__": lambda self: None}))
    trl.experimental.gkd.GKDTrainer = type("Base", (), {"__init__": lambda self: None})
    utils = MagicMock(
        _ForwardRedirection=only(WHEEL / "rlhf_trainers/utils.py", "_ForwardRedirection"),
        profiling_decorator=lambda function: function,
    )
    trainers = MagicMock(
        SwiftMixin=type("SwiftMixin", (), {}),
        disable_gradient_checkpointing=only(
            WHEEL / "trainers/utils.py", "disable_gradient_checkpointing"
        ),
    )
    shared = MagicMock(is_wandb_available=lambda: False, is_swanlab_available=lambda: False)
    mixin = MagicMock(RolloutTrainerMixin=type("RolloutTrainerMixin", (), {}))
    package, rlhf = ModuleType("swift"), ModuleType("swift.rlhf_trainers")
    package.__path__, rlhf.__path__ = [], []
    stubs = {
        "trl": trl, "trl.trainer": trl.trainer, "trl.trainer.utils": trl.trainer.utils,
        "trl.experimental": trl.experimental, "trl.experimental.gkd": trl.experimental.gkd,
        "swift": package, "swift.rlhf_trainers": rlhf, "swift.trainers": trainers,
        "swift.utils": shared, "swift.template": MagicMock(), "swift.rl_core": MagicMock(),
        "swift.rl_core.data": MagicMock(), "swift.rlhf_trainers.gkd_helpers": MagicMock(),
        "swift.rlhf_trainers.utils": utils, "swift.rlhf_trainers.rollout_mixin": mixin,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, module in stubs.items():
            patch.setitem(sys.modules, name, module)
        for name in ("version", "rlhf_trainers.gkd_loss", "rlhf_trainers.gkd_trainer"):
            patch.delitem(sys.modules, f"swift.{name}", raising=False)
            load(f"swift.{name}", WHEEL / f"{name.replace('.', '/')}.py")
        rlhf.gkd_trainer = sys.modules["swift.rlhf_trainers.gkd_trainer"]
        own = rlhf.gkd_trainer.GKDTrainer.compute_loss
        plugin = load("ms_swift_plugin", ROOT / "examples/plugins/ms_swift.py")
        yield SimpleNamespace(gkd=rlhf.gkd_trainer, own=own, plugin=plugin)
        for name in ("version", "rlhf_trainers.gkd_loss", "rlhf_trainers.gkd_trainer"):
            del sys.modules[f"swift.{name}"]


def make_trainer(swift: SimpleNamespace, model: nn.Module, teacher: nn.Module | None, **changes):
    """The real class with what `__init__` would have set, and prepared."""
    options = {"beta": 0.5, "temperature": 1.0, "sft_alpha": 0, "liger": False, "no_lora": False}
    options |= {"topk": None, "server": False, "parallel": 1} | changes
    trainer = object.__new__(swift.gkd.GKDTrainer)
    trainer.model, trainer.teacher_model = model, teacher
    trainer.beta, trainer.temperature = options["beta"], options["temperature"]
    trainer.accelerator = SimpleNamespace(
        unwrap_model=lambda x: x, state=SimpleNamespace(deepspeed_plugin=None)
    )
    trainer.args = SimpleNamespace(
        sft_alpha=options["sft_alpha"], use_liger_kernel=options["liger"],
        gradient_checkpointing_kwargs=None, offload_teacher_model=False,
    )  # fmt: skip
    trainer.template = SimpleNamespace(sequence_parallel_size=options["parallel"])
    trainer.is_fsdp_enabled, trainer.use_teacher_api = False, options["server"]
    trainer.gkd_logits_topk = options["topk"]
    trainer._is_self_distillation = teacher is None
    trainer._teacher_use_disable_adapter = options["no_lora"]
    trainer.load_teacher_model_context = contextlib.nullcontext
    trainer.get_use_logits_to_keep = lambda default: False
    trainer._prepare_liger_loss()
    return trainer


def make_batch(opsd: bool, kept: bool = True) -> dict[str, object]:
    """Two sequences; OPSD's teacher has other prompts before the same answers."""
    torch.manual_seed(5)
    answers = [torch.randint(97, (n,)) for n in (5, 3)]
    sides = []
    for prompts in ((4, 6), (9, 7) if opsd else (4, 6)):
        torch.manual_seed(7 if prompts == (4, 6) else 8)
        side = {"input_ids": torch.zeros(2, 16, dtype=torch.long)}
        side["labels"] = torch.full((2, 16), -100)
        side["attention_mask"] = torch.zeros(2, 16, dtype=torch.long)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = prompt + len(answer)
            side["input_ids"][row, :end] = torch.cat([torch.randint(97, (prompt,)), answer])
            side["attention_mask"][row, :end] = 1
            if kept:
                side["labels"][row, prompt:end] = answer
        sides.append(side)
    batch = SimpleNamespace(data_source="student")
    return {"model_inputs": sides[0], "teacher_model_inputs": sides[1], "gkd_batch": batch}


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_as_swift(swift: SimpleNamespace, trainer, opsd: bool, kept: bool = True) -> None:
    """Loss and gradients of the plugin are those of ms-swift's compute_loss, with logits."""
    assert trainer.fused
    model = trainer.model
    theirs = swift.own(trainer, model, copy.deepcopy(make_batch(opsd, kept)))
    true = gradients(model, theirs)
    seen = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: seen.append(1))
    ours = trainer.compute_loss(model, copy.deepcopy(make_batch(opsd, kept)))
    mine = gradients(model, ours)
    hook.remove()
    assert not seen, "the plugin made logits"
    assert_close(ours.detach(), theirs.detach(), floor=2e-6, name="loss")
    assert (theirs.abs() > 1e-3) == kept
    assert set(mine) == set(true)
    for name, grad in true.items():
        assert_close(mine[name], grad, floor=2e-5, name=name)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("opsd", [False, True])
def test_local_teacher(swift: SimpleNamespace, beta: float, opsd: bool) -> None:
    teacher = tiny(2, hidden_size=32, head_dim=16).eval()
    trainer = make_trainer(swift, tiny(1), teacher, beta=beta, temperature=1.7)
    assert_as_swift(swift, trainer, opsd)
    assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("no_lora", [False, True])
def test_self_distillation_with_lora(swift: SimpleNamespace, no_lora: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    model = peft.get_peft_model(tiny(3), config)
    assert_as_swift(swift, make_trainer(swift, model, None, no_lora=no_lora, liger=True), opsd=True)


def test_self_distillation_of_all_weights(swift: SimpleNamespace) -> None:
    assert_as_swift(swift, make_trainer(swift, tiny(4), None), opsd=True)


def test_without_labels_the_loss_is_zero(swift: SimpleNamespace) -> None:
    assert_as_swift(swift, make_trainer(swift, tiny(1), tiny(2)), opsd=False, kept=False)


def softcapped() -> nn.Module:
    torch.manual_seed(6)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0))


def lora_on_the_head() -> nn.Module:
    return peft.get_peft_model(tiny(3), peft.LoraConfig(r=4, target_modules=["lm_head"]))


OTHERS = {
    "softcap": (softcapped, {}),
    "two vocabularies": (lambda: tiny(1, vocab_size=101), {}),
    "LoRA on the head": (lora_on_the_head, {}),
    "sft_alpha": (lambda: tiny(1), {"sft_alpha": 0.5}),
    "top-k": (lambda: tiny(1), {"topk": 8}),
    "a server": (lambda: tiny(1), {"server": True}),
    "sequence parallel": (lambda: tiny(1), {"parallel": 2}),
}


@pytest.mark.parametrize("case", OTHERS)
def test_others_keep_the_loss_of_swift(swift: SimpleNamespace, case: str) -> None:
    model, changes = OTHERS[case]
    trainer = make_trainer(swift, model(), tiny(2), **changes)
    assert not trainer.fused and not trainer.use_liger_gkd_loss
    if case == "softcap":
        batch = make_batch(False)
        ours = trainer.compute_loss(trainer.model, copy.deepcopy(batch))
        assert torch.equal(ours, swift.own(trainer, trainer.model, copy.deepcopy(batch)))
    with pytest.raises(ValueError, match="leave out --use_liger_kernel"):
        make_trainer(swift, model(), tiny(2), liger=True, **changes)


def test_another_version_is_refused(
    swift: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["swift.version"], "__version__", "4.7.0")
    with pytest.raises(ImportError, match=r"knows ms-swift 4\.6\.0, not 4\.7\.0"):
        load("ms_swift_plugin_again", ROOT / "examples/plugins/ms_swift.py")
