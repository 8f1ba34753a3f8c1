"""The table of devices against measured steps, and the time model against closed forms."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import median

import pytest
import torch
from transformers import LlamaConfig, Qwen3Config

from opsd_kernels import plan
from opsd_train.config.schema import LoraConfig, ModelConfig
from opsd_train.dry_run.devices import DEVICES, Device, Protocol, Seconds
from opsd_train.dry_run.largest_step import MicroBatch, PlannedStep, Rows
from opsd_train.dry_run.memory import Setup
from opsd_train.dry_run.operations import CountedLayer, Operation, Recorder
from opsd_train.dry_run.setup import sizes_without_weights
from opsd_train.dry_run.step_time import ADAMW, Reader, Run, loss_seconds, predict_seconds
from tests.helpers.tiny import make_tokenizer

ROOT = Path(__file__).parents[3]
H100, A100 = DEVICES["h100"], DEVICES["a100"]
ALL = [f"{part}_proj" for part in ("q", "k", "v", "o", "gate", "up", "down")]
# Every rate 1 unit a second, so that seconds are operations and bytes.
PLAIN = Device(
    "plain", 1e12, {2: 1.0, 4: 1.0}, {2: 1.0, 4: 1.0}, 1.0, 1.0, 1.0, 8, (Protocol(1, 0, 0, 0),)
)


def model(folder: Path, config: object, checkpointing: bool = True) -> ModelConfig:
    config.save_pretrained(folder)
    tokenizer = make_tokenizer()
    tokenizer.eos_token = "<|end|>"
    tokenizer.save_pretrained(folder)
    return ModelConfig(
        name_or_path=str(folder),
        device="cpu",
        dtype="bfloat16",
        attention="sdpa",
        gradient_checkpointing=checkpointing,
    )


def test_a_whole_step_on_an_h100(tmp_path: Path) -> None:
    """benchmarks/gpu_report/step.py: Qwen3-1.7B's shape with LoRA, 8 sequences at once."""
    rows = json.loads((ROOT / "benchmarks/results/gpu_second_h100_2.json").read_text())["rows"]
    (row,) = (r for r in rows if r["id"] == "opsd_kernels, 8 at once")
    measured = {name: median(each) for name, each in row["found"]["phases"].items()}
    config = Qwen3Config(
        vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28,
        num_attention_heads=16, num_key_value_heads=8, head_dim=128,
    )  # fmt: skip
    lora = LoraConfig(rank=64, alpha=128, target_modules=ALL)
    layer = CountedLayer(model(tmp_path, config), lora, sharded=False)
    forward, backward = layer.training(Rows(8, 1280, False))
    loss = plan(8192, 2048, 151936, dtype=torch.bfloat16, device="cuda")
    predicted = {
        "teacher forward": H100.work(layer.reading(Rows(8, 2048, False), False)) * 28,
        "student forward": H100.work(forward) * 28,
        "backward": H100.work(backward) * 28,
        "loss": loss_seconds(H100, loss, 2, 2),
    }
    for name, seconds in predicted.items():
        assert seconds.total == pytest.approx(measured[name], rel=0.2), name


LLAMA_8B = LlamaConfig(
    vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
    num_attention_heads=32, num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
LLAMA_70B = LlamaConfig(
    vocab_size=128256, hidden_size=8192, intermediate_size=28672, num_hidden_layers=80,
    num_attention_heads=64, num_key_value_heads=8, tie_word_embeddings=False,
)  # fmt: skip
HBM2E = replace(H100, bandwidth=H100.bandwidth * 2.4 / 3.35)  # the H100s of those runs


@pytest.mark.parametrize(
    ("config", "device", "ranks", "sequences", "checkpointed", "tokens"),
    [
        # pytorch/torchtitan, docs/performance.md, FSDP2 without torch.compile, 8,192 tokens a
        # sequence: tokens/s of a GPU. 8B checkpoints some operations, so both bounds are asked.
        (LLAMA_70B, A100, 64, 1, [True], 331),
        (LLAMA_8B, A100, 64, 1, [True, False], 2973),
        (LLAMA_8B, HBM2E, 8, 2, [True, False], 5762),
    ],
    ids=["70b-a100", "8b-a100", "8b-h100"],
)
def test_published_runs(
    config: LlamaConfig,
    device: Device,
    ranks: int,
    sequences: int,
    checkpointed: list[bool],
    tokens: int,
    tmp_path: Path,
) -> None:
    rates = []
    for checkpointing in checkpointed:
        run = sft(model(tmp_path, config, checkpointing), device, ranks, sequences, 8192)
        total = sum(phase.total for phase in predict_seconds(run).values())
        rates.append(sequences * 8192 / total)
    assert sum(rates) / len(rates) == pytest.approx(tokens, rel=0.2)


def sft(made: ModelConfig, device: Device, ranks: int, sequences: int, width: int) -> Run:
    """Full fine-tuning on sequences all of whose tokens count; one micro-batch."""
    sizes = sizes_without_weights(made, None)
    loss = {"loss": "logprob", "dtype": torch.bfloat16, "device": torch.device("cuda")}
    setup = Setup(2, 0, made.gradient_checkpointing, loss, shards=ranks, processes=ranks)
    reader = Reader(sizes, CountedLayer(made, None, sharded=ranks > 1), 2, ranks)
    rows = Rows(sequences, width, False)
    batch = MicroBatch(rows, rows, rows.tokens)
    step = PlannedStep((), (batch,), (), rows.tokens * ranks, 1, 1)
    return Run(step, setup, reader, (), False, False, 1, False, device)


SMALL = LlamaConfig(
    vocab_size=512, hidden_size=64, intermediate_size=160, num_hidden_layers=3,
    num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False,
)  # fmt: skip
LAYER_WEIGHTS = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 160


@pytest.mark.parametrize("checkpointing", [False, True], ids=["whole", "checkpointed"])
def test_a_layers_arithmetic_in_closed_form(tmp_path: Path, checkpointing: bool) -> None:
    """2 operations a weight and token forward, 4 backward, 2 again to recompute; attention 2
    products of half of all pairs, and 5."""
    layer = CountedLayer(model(tmp_path, SMALL, checkpointing), None, sharded=True)
    rows = Rows(3, 20, False)
    forward, backward = layer.training(rows)
    products, pairs = 2 * 60 * LAYER_WEIGHTS, 3 * 4 * 20 * 20 * 16
    # Recomputing stops before down_proj, since backward needs no result of it.
    again = products - 2 * 60 * 64 * 160 if checkpointing else 0
    assert flops(forward, "product") == flops(layer.reading(rows, True), "product") == products
    assert flops(backward, "product") == 2 * products + again
    assert flops(forward, "attention") == 2 * pairs
    assert flops(backward, "attention") == 5 * pairs + (2 * pairs if checkpointing else 0)


def test_frozen_weights_have_no_gradient_products(tmp_path: Path) -> None:
    lora = LoraConfig(rank=4, alpha=8, target_modules=ALL)
    layer = CountedLayer(model(tmp_path, SMALL, False), lora, sharded=True)
    forward, backward = layer.training(Rows(1, 30, False))
    adapters = 4 * (4 * 64 + 64 + 32 + 32 + 64 + 3 * (64 + 160))
    assert flops(forward, "product") == 2 * 30 * (LAYER_WEIGHTS + adapters)
    assert flops(backward, "product") == 2 * 30 * (LAYER_WEIGHTS + 2 * adapters)
    off = layer.reading(Rows(1, 30, False), False)
    assert flops(off, "product") == 2 * 30 * LAYER_WEIGHTS


def flops(operations: tuple[Operation, ...], kind: str) -> float:
    return sum(operation.flops for operation in operations if operation.kind == kind)


def test_bytes_of_operations_are_what_they_read_and_write() -> None:
    one, two = torch.ones(6, 5), torch.ones(6, 5)
    with Recorder() as found:
        three = one * two  # 2 tensors read, 1 written
        three.mul_(2.0)  # read and written
        three.t().view(5, 6).expand(4, 5, 6)  # no bytes
        torch.nn.functional.embedding(torch.tensor([1]), torch.ones(9, 5))  # a row
        torch.mm(one, two.t())
    kinds = [(o.kind, o.bytes) for o in found.found if o.bytes > 8]
    assert ("memory", 360) in kinds and ("memory", 240) in kinds
    assert kinds[-1] == ("product", 4 * (30 + 30 + 36)) and found.found[-1].flops == 2 * 6 * 5 * 6


def test_adamws_bytes_are_what_torch_moves() -> None:
    weight = torch.nn.Parameter(torch.ones(1000, 100))
    optimizer = torch.optim.AdamW([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        with Recorder() as found:
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
    assert sum(o.bytes for o in found.found) / weight.numel() == pytest.approx(ADAMW, rel=0.05)


def test_a_ring() -> None:
    """NCCL: (n - 1) / n of the bytes; n - 1 steps, of which those between nodes are slower."""
    ring = replace(PLAIN, link=100.0, network=10.0, protocols=(Protocol(1.0, 5.0, 0.5, 2.0),))
    assert ring.gathering(800.0, 1) == 0
    assert ring.gathering(800.0, 8) == 700 / 100 + 5 + 7 * 0.5
    # 8 adapters of 10 are 80 together, slower than the link.
    assert ring.gathering(800.0, 16) == 750 / 80 + 5 + 14 * 0.5 + 1 * 2.0
    assert replace(ring, reduction=3.0).scattering(800.0, 8) == 3 * ring.gathering(800.0, 8)
    faster = replace(ring, protocols=(*ring.protocols, Protocol(0.5, 0.0, 0.0, 0.0)))
    assert faster.gathering(800.0, 8) == 14
    assert (
        H100.gathering(1e9, 512)
        > H100.gathering(1e9, 64)
        > H100.gathering(1e9, 8)
        > 0.875e9 / 371e9
    )


def test_communication_hides_behind_computation(tmp_path: Path) -> None:
    """Free: what is gathered and reduced beside nothing. Slow links: everything but the first."""
    made = model(tmp_path, SMALL, False)
    gathered, head = 2 * LAYER_WEIGHTS, 2 * (2 * 512 * 64 + 7 * 64)
    alone = student(made, replace(PLAIN, link=1e30), 4)
    hidden, half = student(made, replace(PLAIN, link=1e3), 4), 0.75 / 1e3
    beside_nothing = half * (head + 2 * head + 2 * gathered + 2 * gathered)
    assert hidden.communication == pytest.approx(beside_nothing, rel=0.01)
    assert hidden.arithmetic == alone.arithmetic and hidden.memory == alone.memory
    waiting = student(made, replace(PLAIN, link=1e3, overlaps=False), 4).communication
    assert waiting == pytest.approx(half * (3 * head + 3 * 4 * gathered), rel=0.01)
    assert student(made, PLAIN, 1).communication == 0


def test_gathered_weights_are_copied(tmp_path: Path) -> None:
    """A rank's share is read and written once, the whole again: 3 layers twice, and the head."""
    made = model(tmp_path, SMALL, False)
    gathered, head = 2 * LAYER_WEIGHTS, 2 * (2 * 512 * 64 + 7 * 64)
    four, eight = (student(made, PLAIN, ranks).memory for ranks in (4, 8))
    assert four - eight == pytest.approx(2 * (1 / 4 - 1 / 8) * (2 * 3 * gathered + head), rel=0.01)


def test_products_that_bytes_limit() -> None:
    slow = replace(PLAIN, thin_products=0.5)
    operations = [Operation(kind, 60, 100, 4) for kind in ("product", "attention", "memory")]
    assert [slow.work([o]).memory for o in operations] == [200, 100, 100]
    assert slow.work([Operation("product", 300, 100, 4)]) == Seconds(arithmetic=300)


def student(made: ModelConfig, device: Device, ranks: int) -> Seconds:
    return predict_seconds(sft(made, device, ranks, 2, 16))["student"]
