"""Checkpoints: bit for bit, and what happens when something is damaged, full or changed."""

import json
from pathlib import Path

import pytest
import torch
from tiny import make_model

from opsd_train import sections
from opsd_train.checkpoint import Checkpoints, restore_training, training_tensors
from opsd_train.model import Policy, add_adapters
from opsd_train.world import World

ALONE = World(torch.device("cpu"))
RECIPE = "steps: 3\noptim: {lr: 0.01, schedule: constant}\n"
TENSORS = {"model": {"w": torch.arange(3000.0)}, "groups": [{"lr": 0.1}]}


class Training:
    """A tiny policy with its optimizer; steps of made-up gradients stand for training."""

    def __init__(self, full: bool = False) -> None:
        model = make_model()
        if not full:
            lora = sections.LoraConfig(rank=2, alpha=4, target_modules=["q_proj", "down_proj"])
            model = add_adapters(model, lora)
        self.policy = Policy(model, 0, torch.float32)
        self.optimizer = torch.optim.AdamW(self.policy.parameters, lr=1e-2, weight_decay=0.1)
        self.average = {"average.0": torch.zeros(3)}
        self.schedule = torch.optim.lr_scheduler.LinearLR(self.optimizer, total_iters=10)

    def step(self, number: int) -> None:
        generator = torch.Generator().manual_seed(number)
        for parameter in self.policy.parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average["average.0"] += number

    def tensors(self) -> dict:
        return training_tensors(self.policy, self.optimizer, self.average)

    def numbers(self) -> list[torch.Tensor]:
        """Everything the next step depends on."""
        found = [p.detach().clone() for p in self.policy.parameters]
        for parameter in self.policy.parameters:
            found += [value.clone() for value in self.optimizer.state[parameter].values()]
        rate = self.optimizer.param_groups[0]["lr"]
        return [*found, self.average["average.0"].clone(), torch.tensor(rate, dtype=torch.double)]


def same(one: list[torch.Tensor], two: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("stop", [0, 2])
def test_goes_on_bit_for_bit(tmp_path: Path, full: bool, stop: int) -> None:
    straight = Training(full)
    for number in range(1, 5):
        straight.step(number)

    first = Training(full)
    for number in range(1, stop + 1):
        first.step(number)
    generator = torch.Generator().manual_seed(7)
    torch.rand(3, generator=generator)
    facts = {"sampler": [3, 1, 2], "loss": 0.1 + 0.2, "schedule": first.schedule.state_dict()}
    path = Checkpoints(tmp_path, 2, ALONE).save(
        stop, first.tensors(), facts, {"rng": generator.get_state(), "python": (3, (1, 2))}, RECIPE
    )
    assert path == tmp_path / "checkpoints" / f"step_{stop:06d}"
    first.step(stop + 1)  # saving changed nothing for the run that goes on
    for number in range(stop + 2, 5):
        first.step(number)
    assert same(first.numbers(), straight.numbers())

    second = Training(full)
    loaded = Checkpoints(tmp_path, 2, ALONE).newest(RECIPE)
    assert loaded.step == stop and loaded.facts == json.loads(json.dumps(facts))
    assert loaded.rank_facts["python"] == (3, (1, 2))
    generator_two = torch.Generator()
    generator_two.set_state(loaded.rank_facts["rng"])
    assert torch.equal(torch.rand(5, generator=generator), torch.rand(5, generator=generator_two))
    tensors = second.tensors()
    loaded.fill(tensors)
    restore_training(second.policy, second.optimizer, tensors)
    second.schedule.load_state_dict(loaded.facts["schedule"])
    for number in range(stop + 1, 5):
        second.step(number)
    assert same(second.numbers(), straight.numbers())
