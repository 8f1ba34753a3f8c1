"""A model that is built without weights and then read is the one that from_pretrained loads."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from opsd_train.model.families import decoder_layers
from opsd_train.model.sharded_weights import (
    empty_weights,
    read_weights,
    weights_folder,
    without_weights,
)
from tests.helpers.family_models import FAMILIES, every, make_family

CPU = torch.device("cpu")
# Their tensors are converted as they are loaded: experts are put together, and GPT-NeoX's head has
# another name in its files. Every rank loads them whole.
CONVERTED = {
    *("deepseek_v3", "gpt_neox", "granitemoe", "granitemoehybrid", "jamba", "mixtral"),
    *("qwen2_moe", "qwen3_moe", "qwen3_next"),
}


@pytest.mark.parametrize("family", every(FAMILIES))
def test_weights_and_buffers_are_those_of_from_pretrained(family: str, tmp_path: Path) -> None:
    make_family(family, torch.float32).save_pretrained(tmp_path)
    folder = weights_folder(str(tmp_path))
    assert folder == tmp_path
    config = AutoConfig.from_pretrained(folder)
    made = without_weights(config, folder, torch.float32, None)
    assert (made is None) == (family in CONVERTED)
    if made is None:
        return
    empty_weights(made)
    assert all(parameter.is_meta for parameter in made.parameters())
    read_weights(made, decoder_layers(made), folder, CPU)
    true = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for kind in ("named_parameters", "named_buffers"):
        found, wanted = dict(getattr(made, kind)()), dict(getattr(true, kind)())
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            assert torch.equal(found[name], tensor), name


def test_other_files_beside_the_models(tmp_path: Path) -> None:
    """Some repositories hold the weights twice, in another format's names."""
    make_family("llama", torch.float32).save_pretrained(tmp_path)
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    assert weights_folder(str(tmp_path)) is None
    (tmp_path / "consolidated.safetensors").unlink()
    (tmp_path / "model.safetensors").unlink()
    assert weights_folder(str(tmp_path)) is None
