"""process_group: the head sharded by rows over ranks gives what one process gives."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import opsd_kernels as k
from tests.helpers.topk_cases import compare_topk, shard_topk
from tests.helpers.vocabulary_shards import SIZES, TOKENS, VOCAB, inputs, losses


def gradients(p: dict[str, Tensor], names: list[str], group) -> list[dict[str, Tensor]]:
    leaves = {name: p[name].requires_grad_() for name in names}
    result = []
    for value in losses(p, group):
        grads = torch.autograd.grad(value, leaves.values(), allow_unused=True)
        found = {n: g for n, g in zip(leaves, grads, strict=True) if g is not None}
        result.append({"value": value.detach(), **found})
    return result


def rank_main(rank: int, sizes: tuple[int, ...], names: list[str], folder: str) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(sizes))
    p = inputs()
    first = sum(sizes[:rank])
    for name in ("student_weight", "teacher_weight", "student_bias"):
        p[name] = p[name][first : first + sizes[rank]].clone()
    made = gradients(p, names, dist.group.WORLD)
    dtypes = (torch.float64, torch.float32)
    top = [shard_topk(rank, sizes, dist.group.WORLD, dtype) for dtype in dtypes]
    torch.save(top, Path(folder) / f"topk{rank}.pt")
    message = ""
    try:
        k.fused_linear_jsd(
            p["student_input"],
            p["student_weight"],
            p["teacher_input"],
            p["teacher_weight"],
            torch.full((TOKENS,), VOCAB),
            process_group=dist.group.WORLD,
        )
    except ValueError as error:
        message = str(error)
    torch.save((made, message), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "names"),
    [
        (3, ["student_input", "student_weight"]),
        pytest.param(2, ["student_input"], marks=pytest.mark.slow),
    ],
)
def test_shards_equal_the_whole(ranks: int, names: list[str], tmp_path: Path) -> None:
    sizes = SIZES[ranks]
    mp.spawn(rank_main, (sizes, names, str(tmp_path)), nprocs=ranks)
    for ranks_top in zip(
        *(torch.load(tmp_path / f"topk{i}.pt") for i in range(ranks)), strict=True
    ):
        compare_topk(list(ranks_top), sizes)
    whole = gradients(inputs(), names, None)
    shards = [torch.load(tmp_path / f"rank{rank}.pt") for rank in range(ranks)]
    for index, truth in enumerate(whole):
        parts = [made[index] for made, _ in shards]
        for part in parts:
            torch.testing.assert_close(part["value"], truth["value"])
            torch.testing.assert_close(part["student_input"], truth["student_input"])
        if "student_weight" in truth:
            weight = torch.cat([part["student_weight"] for part in parts])
            torch.testing.assert_close(weight, truth["student_weight"])
    for _, message in shards:
        assert f"[0, {VOCAB})" in message and f"got {VOCAB} at token 0" in message


ENDING = """
from pathlib import Path
import torch
import torch.distributed as dist
import opsd_kernels as k

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
hidden, weight = torch.randn(5, 8, requires_grad=True), torch.randn(11, 8)
k.fused_linear_logprob(
    hidden, weight, torch.arange(5), process_group=dist.group.WORLD
).sum().backward()
dist.destroy_process_group()
for task in Path("/proc/self/task").iterdir():
    print((task / "comm").read_text().strip())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are read from /proc")
def test_a_destroyed_group_leaves_no_thread() -> None:
    """A thread of gloo that asks for the GIL while Python ends aborts the process."""
    made = subprocess.run([sys.executable, "-c", ENDING], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "gloo" not in made.stdout, made.stdout
