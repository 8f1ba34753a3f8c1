"""Two GPUs: a call on the one that is not current, and a head sharded over both."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from opsd_kernels.testing import cast, make_pair
from tests.helpers import vocabulary_shards as parallel
from tests.helpers.kernel_cases import LOSSES, move, prepare, run
from tests.helpers.triton_cases import SCHEDULES, TRAINED, policy_gradient
from tests.helpers.vocabulary_shards import SIZES, inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]


@SCHEDULES
@TRAINED
@pytest.mark.parametrize("name", LOSSES)
def test_a_device_that_is_not_current(name: str, trained: bool, schedule: str) -> None:
    pair = make_pair(96, 64, 1111, masked=9, seed=1, dtype=torch.float32)
    loss, inputs, wrt, options = prepare(name, pair, trained, None)
    if name == "policy gradient":
        fn = policy_gradient(schedule=schedule)
    else:
        fn, options = loss.fn, {**options, "schedule": schedule}
    results = []
    for device in ("cuda:0", "cuda:1"):
        values, grads = run(fn, move(inputs, device), wrt, **options)
        assert all(x.device == torch.device(device) for x in (*values, *grads.values()))
        assert torch.cuda.current_device() == 0
        results.append([*(x.cpu() for x in values), *(x.cpu() for x in grads.values())])
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-6)


def rank_main(rank: int, sizes: tuple[int, ...], schedule: str, folder: str) -> None:
    device = torch.device("cuda", rank)  # on purpose not made current
    store = f"file://{folder}/store"
    dist.init_process_group(
        "nccl", init_method=store, rank=rank, world_size=len(sizes), device_id=device
    )
    p, first = move(cast(inputs(), torch.float32), device), sum(sizes[:rank])
    for name in ("student_weight", "teacher_weight", "student_bias"):
        p[name] = p[name][first : first + sizes[rank]].clone()
    made = parallel.gradients(p, dist.group.WORLD, schedule)
    torch.save([move(x, "cpu") for x in made], Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.dist
@SCHEDULES
def test_shards_equal_the_whole(schedule: str, tmp_path: Path) -> None:
    mp.spawn(rank_main, (SIZES[2], schedule, str(tmp_path)), nprocs=2)
    parallel.compare_shards([torch.load(tmp_path / f"rank{rank}.pt") for rank in range(2)])
