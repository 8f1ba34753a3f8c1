"""The Triton backend with the head sharded over ranks, against one process in float64."""

import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from kernel_cases import STUDENT
from test_vocab_parallel import SIZES, TOKENS, inputs, losses
from torch import Tensor

from opsd_kernels.testing import assert_close, cast


def gradients(
    p: dict[str, Tensor], group: dist.ProcessGroup | None, schedule: str
) -> list[dict[str, Tensor]]:
    names = STUDENT[:2]
    leaves = {name: p[name].requires_grad_() for name in names}
    result = []
    for value in losses(p, group, schedule):
        grads = torch.autograd.grad(value, leaves.values())
        result.append({"value": value.detach(), **dict(zip(names, grads, strict=True))})
    return result


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


def compare_shards(shards: list[list[dict[str, Tensor]]]) -> None:
    """Each rank's values and gradients of each loss, against one process."""
    rounded = cast(inputs(), torch.float32)
    truths = gradients(cast(rounded, torch.float64), None, "auto")
    plains = gradients(rounded, None, "auto")  # blocked PyTorch in fp32
    for index, (truth, plain) in enumerate(zip(truths, plains, strict=True)):
        parts = [made[index] for made in shards]
        assert all(torch.equal(x["value"], parts[0]["value"]) for x in parts)
        whole = torch.cat([x["student_weight"] for x in parts])
        found = {**parts[0], "student_weight": whole}
        for name, true in truth.items():
            rule = {"max_factor": 4.0, "atol": TOKENS * 1e-6 if name == "value" else 0.0}
            assert_close(found[name], true, plain[name], **rule, name=f"{index} {name}")
