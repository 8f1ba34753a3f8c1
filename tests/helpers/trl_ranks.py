"""Two ranks train with TRL, transformers and FSDP2, plain and fused; each writes what it computed.

python -m tests.helpers.trl_ranks FOLDER
"""

import gc
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
import transformers
from torch.distributed.fsdp import fully_shard

from opsd_kernels.integrations.transformers import fuse_loss
from opsd_kernels.integrations.trl import fused
from tests.helpers.trl_runs import TRAINERS, Record, build, make_causal_lm, run

RANKS = 2
KINDS = ("sft", "grpo", "distillation", "gkd", "sdft", "sdpo")


def transformers_run(folder: Path, is_fused: bool) -> Record:
    """transformers' own Trainer, whose divisor counts the labels of both ranks."""
    model, record = make_causal_lm("gemma2"), Record()
    if is_fused:
        fuse_loss(model)
    ids = torch.randint(3, 250, (16, 12), generator=torch.Generator().manual_seed(0))
    labels = torch.where(torch.arange(12) < torch.arange(16)[:, None] % 7, -100, ids)
    data = [{"input_ids": x, "labels": y} for x, y in zip(ids, labels, strict=True)]
    args = transformers.TrainingArguments(
        str(folder), max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
    )  # fmt: skip
    trainer: Any = transformers.Trainer(model, args, train_dataset=data, eval_dataset=data[:4],
                                        callbacks=[record])  # fmt: skip
    return run(trainer, record)


def fsdp2_run(is_fused: bool) -> Record:
    """A plain loop over a model sharded by layer and as a whole, each rank with its own data."""
    model, record = make_causal_lm("granite"), Record()
    if is_fused:
        fuse_loss(model)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    for _ in range(2):
        ids = torch.randint(3, 250, (2, 12), generator=generator)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        record.logs.append({"loss": loss.item()})
        named = model.named_parameters()
        record.grads.append({n: p.grad.full_tensor() for n, p in named if p.grad is not None})
        model.zero_grad()
    return record


def run_rank(rank: int, port: int, folder: Path) -> None:
    """Each kind, plain then fused, in one process group."""
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": RANKS, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in names.items()} | {"MASTER_ADDR": "127.0.0.1"}
    for is_fused in (False, True):
        for kind in (*KINDS, "transformers", "fsdp2"):
            name = f"{kind}-{'fused' if is_fused else 'plain'}"
            own = folder / f"{name}-{rank}"
            if kind == "transformers":
                record = transformers_run(own, is_fused)
            elif kind == "fsdp2":
                record = fsdp2_run(is_fused)
            else:
                trainer = fused(TRAINERS[kind][0]) if is_fused else TRAINERS[kind][0]
                options = {"source": folder / "model", "gradient_accumulation_steps": 2}
                record = run(*build(kind, "qwen3", own, trainer, **options))
            torch.save({"grads": record.grads, "logs": record.logs}, folder / f"{name}-{rank}.pt")


def main() -> None:
    """Fork the ranks from this process, which has imported everything and run nothing."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    gc.freeze()
    mp.start_processes(run_rank, (port, Path(sys.argv[1])), nprocs=RANKS, start_method="fork")


if __name__ == "__main__":
    main()
