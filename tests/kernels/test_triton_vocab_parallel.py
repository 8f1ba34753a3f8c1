"""The Triton backend with the head sharded over ranks, against one process in float64."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from opsd_kernels.testing import cast
from tests.helpers.vocabulary_shards import SIZES, compare_shards, gradients, inputs


def rank_main(rank: int, sizes: tuple[int, ...], schedule: str, folder: str) -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(sizes))
    p, first = cast(inputs(), torch.float32), sum(sizes[:rank])
    for name in ("student_weight", "teacher_weight", "student_bias"):
        p[name] = p[name][first : first + sizes[rank]].clone()
    made = gradients(p, dist.group.WORLD, schedule)
    torch.save(made, Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.skipif(torch.cuda.is_available(), reason="CPU tensors in the interpreter")
@pytest.mark.parametrize(
    ("ranks", "schedule"),
    [
        (2, "streaming"),
        (2, "blocked"),
        pytest.param(3, "blocked", marks=pytest.mark.slow),
        pytest.param(3, "streaming", marks=pytest.mark.slow),
    ],
)
def test_shards_equal_the_whole(ranks: int, schedule: str, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    mp.spawn(rank_main, (SIZES[ranks], schedule, str(tmp_path)), nprocs=ranks)
    compare_shards([torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)])
