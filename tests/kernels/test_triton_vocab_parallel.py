"""The Triton backend with the head sharded over ranks, against one process in float64."""

import importlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from opsd_kernels.testing import cast
from tests.helpers.topk_cases import compare_topk, shard_topk
from tests.helpers.vocabulary_shards import SIZES, compare_shards, gradients, inputs

SCHEDULES = ("streaming", "blocked")


def rank_main(rank: int, sizes: tuple[int, ...], folder: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    importlib.import_module("tests.helpers.interpreter").prepare()
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(sizes))
    p, first = cast(inputs(), torch.float32), sum(sizes[:rank])
    for name in ("student_weight", "teacher_weight", "student_bias"):
        p[name] = p[name][first : first + sizes[rank]].clone()
    for schedule in SCHEDULES:
        made = gradients(dict(p), dist.group.WORLD, schedule)
        torch.save(made, Path(folder) / f"{schedule}{rank}.pt")
    top = shard_topk(rank, sizes, dist.group.WORLD, torch.float32, schedule="blocked")
    torch.save(top, Path(folder) / f"topk{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors in the interpreter")
@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shards_equal_the_whole(ranks: int, tmp_path: Path) -> None:
    """Both schedules in the same processes, which take longer to start than to compute."""
    pytest.importorskip("triton")
    mp.spawn(rank_main, (SIZES[ranks], str(tmp_path)), nprocs=ranks)
    for schedule in SCHEDULES:
        shards = [torch.load(tmp_path / f"{schedule}{rank}.pt") for rank in range(ranks)]
        compare_shards(shards)
    compare_topk([torch.load(tmp_path / f"topk{rank}.pt") for rank in range(ranks)], SIZES[ranks])
