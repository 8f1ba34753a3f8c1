"""A rank's memory while it loads: at most its part of the weights, one layer and a little more."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import resident
from tests.helpers.tiny import make_tokenizer

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc/self/clear_refs"
)


def make_files(folder: Path, layers: int) -> dict[str, int]:
    """A model in bfloat16 of `layers` decoder layers; bytes of all its weights and of a layer."""
    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=layers,
        num_attention_heads=8, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    rotary = LlamaForCausalLM(LlamaConfig(**{**config.to_dict(), "num_hidden_layers": 0})).model
    model.to_empty(device="cpu").model.rotary_emb = rotary.rotary_emb
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        block = torch.randn(1024, generator=generator).mul_(0.03).to(torch.bfloat16)
        parameter.data.view(-1, 1024).copy_(block)
        parameter.data.view(-1)[0] = 1.0
    model.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    count = {
        "all": sum(p.numel() for p in model.parameters()),
        "layer": sum(p.numel() for p in model.model.layers[0].parameters()),
    }
    return {name: 2 * numbers for name, numbers in count.items()}


def load(rank: int, ranks: int, port: int, folder: str, out: str) -> None:
    from opsd_train.config.schema import LoraConfig, ModelConfig
    from opsd_train.distributed.context import init_distributed
    from opsd_train.model.policy import load_policy, load_tokenizer

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    context = init_distributed("cpu")
    config = ModelConfig(name_or_path=folder, device="cpu")
    tokenizer = load_tokenizer(config)
    before = resident.resident()
    resident.reset_peak()
    lora = LoraConfig(rank=4, alpha=8, target_modules=["q_proj"])
    policy = load_policy(config, lora, tokenizer, context, "full")
    extra = resident.peak() - before
    value = policy.run([[5, 6]], [[7, 8, 9]], lambda hidden, head, target: hidden.float().sum())
    Path(out, f"{rank}.json").write_text(json.dumps({"extra": extra, "value": value.item()}))
    context.shutdown()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "layers", "slack"),
    [
        (2, 13, 150),  # of less, so that the model is small
        pytest.param(1, 26, 200, marks=pytest.mark.slow),
        pytest.param(2, 26, 200, marks=pytest.mark.slow),
        pytest.param(4, 26, 200, marks=pytest.mark.slow),
    ],
)
def test_a_rank_loads_its_own_part(
    ranks: int, layers: int, slack: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in resident.WORKER_ENV.items():
        monkeypatch.setenv(name, value)
    sizes = make_files(tmp_path / "model", layers)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    mp.spawn(load, (ranks, port, str(tmp_path / "model"), str(tmp_path)), nprocs=ranks)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(ranks)]
    bound = sizes["all"] // ranks + sizes["layer"] + slack * 2**20
    assert ranks == 1 or bound < sizes["all"]  # a rank that loads all of it would fail
    assert all(each["extra"] <= bound for each in found), (found, bound)
