"""Families of models whose completions share their prompt, and those that must not."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import Tensor, nn

from opsd_train.data.layout import PADDED, Layout, make_batch
from opsd_train.model import families
from opsd_train.model.families import batch_layout, completion_hidden
from tests.helpers.family_models import FAMILIES, SIZES, STATEFUL, every, make_family

# ALiBi counts the tokens of the row; Inkling has convolutions.
UNSHARED = (*STATEFUL, "bloom", "inkling_text", "mpt")
PROMPTS = [[3, 120, 44, 91, 60, 28, 77]] * 3
COMPLETIONS = [[12, 99, 45], [7, 66, 23, 101, 54, 36], [88]]


def make(family: str, window: int = 64) -> nn.Module:
    """The family; layers with a window have this one."""
    model = make_family(family, torch.float32)
    if not model.config.to_dict().get("sliding_window"):
        return model
    sizes = SIZES | FAMILIES[family] | {"sliding_window": window}
    config = transformers.AutoConfig.for_model(family, **sizes)
    wider = transformers.AutoModelForCausalLM.from_config(config).eval()
    wider.load_state_dict(model.state_dict())
    return wider


def hidden(model: nn.Module, layout: Layout) -> Tensor:
    with torch.no_grad():
        return completion_hidden(model, make_batch(PROMPTS, COMPLETIONS, 0, model.device, layout))


def largest_gap(model: nn.Module, layout: Layout) -> float:
    return (hidden(model, layout) - hidden(model, PADDED)).abs().max().item()


@pytest.mark.parametrize("family", every(name for name in FAMILIES if name not in UNSHARED))
def test_completions_share_their_prompt(family: str) -> None:
    model = make(family)
    layout = replace(batch_layout(model, 0), hidden_size=10**4)  # the models are small
    assert layout.kind == "shared" and layout.runs(PROMPTS, COMPLETIONS) == [[0, 1, 2]]
    assert largest_gap(model, layout) < 1e-4


@pytest.mark.parametrize("family", every(UNSHARED))
def test_other_layers_share_nothing(family: str) -> None:
    model = make_family(family, torch.float32)
    assert batch_layout(model, 0) is PADDED and families.shared_layout(model) is None


@pytest.mark.parametrize("family", every(["mistral", "gemma3_text", "gpt_oss"]))
def test_a_sequence_beyond_a_window_shares_nothing(family: str) -> None:
    """The longest here has 13 tokens."""
    for window, runs in ((13, 1), (8, 3)):
        model = make(family, window)
        layout = families.shared_layout(model)
        assert layout is not None and layout.window == window
        layout = replace(layout, hidden_size=10**4)
        assert len(layout.runs(PROMPTS, COMPLETIONS)) == runs
        assert largest_gap(model, layout) < 1e-4
        ignored = largest_gap(model, replace(layout, window=1000))
        assert (ignored > 1e-3) == (window == 8)  # the window does something
        assert batch_layout(model, 0) is PADDED  # it is shorter than the probe


@pytest.mark.parametrize("family", ["bloom", "falcon_h1", "lfm2", "qwen3_next"])
def test_the_probe_finds_them_too(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Models whose kind would not tell that they count or carry the row's tokens."""
    monkeypatch.setattr(families, "_carries_state", lambda core: False)
    model = make_family(family, torch.float32)
    monkeypatch.setattr(type(model), "_supports_attention_backend", True)
    assert families.shared_layout(model) is not None
    assert batch_layout(model, 0) is PADDED
