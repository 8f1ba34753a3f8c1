"""Policy: batches, packing, adapters switched off and on, weights swapped and restored."""

import functools
import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from opsd_kernels.integrations.heads import lm_head
from opsd_train.config.errors import UserError
from opsd_train.data.batches import balanced_micro_batches, micro_batches
from opsd_train.data.layout import PADDED, Layout, make_batch
from opsd_train.distributed.context import DistributedContext
from opsd_train.distributed.fsdp import Snapshot
from opsd_train.model.adapters import add_adapters
from opsd_train.model.families import completion_hidden
from opsd_train.model.policy import Policy, load_policy, load_tokenizer
from tests.helpers import devices
from tests.helpers.method_cases import (
    LORA,
    assert_same,
    change,
    double,
    logits_alone,
    make_method,
    make_policy,
    make_samples,
    run,
    settings,
)
from tests.helpers.tiny import make_model

CPU = DistributedContext(torch.device("cpu"))
PACKED = Layout("packed")
LAYOUTS = pytest.mark.parametrize("layout", [PADDED, PACKED], ids=["padded", "packed"])


def hidden_of(policy: Policy, prompts: list, completions: list) -> Tensor:
    with torch.no_grad():
        return policy.run(prompts, completions, lambda hidden, head, targets: hidden)


def texts(count: int = 8) -> tuple[list, list]:
    samples = make_samples(count)
    return [s.student_prompt for s in samples], [s.completion for s in samples]


# ------------------------------------------------------------------------------------------ batches


@LAYOUTS
def test_logits_are_those_of_each_sample_alone(layout: Layout) -> None:
    """Like FlashAttention, transformers' sdpa separates packed sequences by their positions."""
    policy = make_policy()
    policy.layout = layout
    prompts, completions = texts()
    hidden = hidden_of(policy, prompts, completions)
    logits = (hidden.double() @ lm_head(policy.core).weight.double().T).cpu()
    model = double(policy)
    with torch.no_grad():
        alone = torch.cat(
            [logits_alone(model, p, c) for p, c in zip(prompts, completions, strict=True)]
        )
    assert (logits - alone).abs().max() < 1e-4 * alone.abs().max()


def test_packed_layout() -> None:
    batch = make_batch([[1, 2], [3]], [[4, 5], [6, 7, 8]], 0, CPU.device, PACKED)
    assert batch.input_ids.tolist() == [[1, 2, 4, 5, 3, 6, 7, 8]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert batch.rows.tolist() == [0] * 5 and batch.columns.tolist() == [1, 2, 4, 5, 6]
    assert batch.targets.tolist() == [4, 5, 6, 7, 8]


def test_padded_layout() -> None:
    batch = make_batch([[1, 2, 3], [3]], [[4, 5], [6]], 9, CPU.device)
    assert batch.input_ids.tolist() == [[1, 2, 3, 4, 5], [3, 6, 9, 9, 9]]
    assert batch.position_ids[1, :2].tolist() == [0, 1]
    assert batch.rows.tolist() == [0, 0, 1] and batch.columns.tolist() == [2, 3, 0]
    assert batch.targets.tolist() == [4, 5, 6]


@LAYOUTS
def test_sequences_do_not_see_each_other(layout: Layout) -> None:
    policy = make_policy()
    policy.layout = layout
    prompts, completions = texts(3)
    others = [[200, *prompts[0][1:]], prompts[1], [*prompts[2][:-1], 201]]
    size = [len(completion) for completion in completions]
    before = hidden_of(policy, prompts, completions).split(size)
    after = hidden_of(policy, others, completions).split(size)
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0], after[0]) and not torch.equal(before[2], after[2])


def test_positions_separate_packed_sequences() -> None:
    """The comparisons above would notice a leak: without restarts it is all one sequence."""
    core = make_model()
    batch = make_batch(*texts(3), 0, CPU.device, PACKED)
    running = replace(batch, position_ids=torch.arange(batch.input_ids.shape[1])[None])
    with torch.no_grad():
        gap = completion_hidden(core, batch) - completion_hidden(core, running)
    assert gap.abs().max() > 0.1


def test_packed_or_padded_same_loss_and_gradient() -> None:
    config, policy, samples = settings("loss.temperature=1.3"), make_policy(), make_samples()
    padded = run(make_method(config, policy), samples)
    policy.layout = PACKED
    assert_same(run(make_method(config, policy), samples), padded, rel=1e-5)


@LAYOUTS
def test_micro_batches_keep_to_the_budget_and_lose_nobody(layout: Layout) -> None:
    samples = make_samples(20)

    def size(group: list) -> int:
        lengths = [sample.longest for sample in group]
        return sum(lengths) if layout is PACKED else len(group) * max(lengths)

    groups = list(micro_batches(samples, 60, layout))
    assert sorted(s.problem.id for g in groups for s in g) == sorted(s.problem.id for s in samples)
    assert all(size(group) <= 60 for group in groups)
    for group, following in itertools.pairwise(groups):  # none could be longer
        assert size([*group, following[0]]) > 60
    with pytest.raises(UserError, match=r"micro_batch_tokens=10 .* problem p\d+ has \d+ tokens"):
        list(micro_batches(samples, 10, layout))


def test_packed_batches_hold_more() -> None:
    samples = [
        replace(sample, teacher_prompt=None, student_prompt=[1] * size, completion=[1])
        for sample, size in zip(make_samples(4), (9, 9, 19, 39), strict=True)
    ]
    sizes = [[len(g) for g in micro_batches(samples, 80, layout)] for layout in (PADDED, PACKED)]
    assert sizes == [[3, 1], [4]]


class Pair(DistributedContext):
    """Two ranks; the other one has three micro-batches."""

    def max(self, value: float) -> float:
        return max(value, 3)


def test_a_rank_with_fewer_micro_batches_runs_idle_ones() -> None:
    samples = make_samples()
    groups = balanced_micro_batches(samples, samples[2:], 10**6, Pair(CPU.device, size=2))
    assert groups[0] == sorted(samples[2:], key=lambda sample: sample.longest)
    for group in groups[1:]:
        (idle,) = group
        assert idle.weight == 0 and idle.completion == samples[0].completion[:1]
        assert len(idle.logprobs) == 1
    assert (
        len(groups) == 3
        and len(balanced_micro_batches(samples, [], 10**6, Pair(CPU.device, size=2))) == 3
    )
    assert balanced_micro_batches(samples, [], 10**6, CPU) == []


# ----------------------------------------------------------------------------------------- adapters


def test_adapters_off_is_the_base_model_bit_for_bit() -> None:
    base, policy = Policy(make_model().to(devices.NAME), 0, torch.float32), make_policy()
    before = {n: p.detach().clone() for n, p in policy.model.named_parameters()}
    with policy.without_adapters():
        off = hidden_of(policy, *texts())
    assert torch.equal(off, hidden_of(base, *texts()))
    assert not torch.equal(hidden_of(policy, *texts()), off)
    for name, parameter in policy.model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == ("lora_" in name)


def test_adapters_come_back_after_an_error() -> None:
    policy = make_policy()
    on = hidden_of(policy, *texts())
    with pytest.raises(ZeroDivisionError), policy.without_adapters():
        raise ZeroDivisionError
    assert torch.equal(hidden_of(policy, *texts()), on)


def test_adapters_are_float32_beside_bfloat16_weights() -> None:
    policy = make_policy(dtype=torch.bfloat16)
    for name, parameter in policy.model.named_parameters():
        wanted = torch.float32 if "lora_" in name else torch.bfloat16
        assert parameter.dtype == wanted and parameter.requires_grad == ("lora_" in name), name
    assert hidden_of(policy, *texts()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["lm_head"], "lm_head cannot have an adapter"), (["q_pro"], "no module 'q_pro'")],
)
def test_wrong_targets(targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapters(make_model(), replace(LORA, target_modules=targets))


# ------------------------------------------------------------------------------ weights and loading


@pytest.mark.parametrize("lora", [True, False], ids=["lora", "all weights"])
def test_what_is_trained_is_float32_and_computed_in_bfloat16(lora: bool, tiny_folder) -> None:
    config = settings("model.dtype=bfloat16")
    model = replace(config.model, name_or_path=str(tiny_folder))
    adapters = config.lora if lora else None
    policy = load_policy(model, adapters, load_tokenizer(model), CPU, "none")
    assert policy.has_adapters == lora
    assert all(p.dtype == torch.float32 for p in policy.parameters)
    frozen = [p for p in policy.model.parameters() if not p.requires_grad]
    assert all(p.dtype == torch.bfloat16 for p in frozen) and bool(frozen) == lora
    names = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert len(names) == len(policy.parameters) and (not lora or all("lora_" in n for n in names))
    seen = []
    for module in policy.model.modules():
        if isinstance(module, torch.nn.Linear) and module is not policy.core.lm_head:
            module.register_forward_hook(lambda _, given, result: seen.append(result.dtype))
    hidden_of(policy, *texts())
    assert len(seen) >= 14 and set(seen) == {torch.bfloat16}


def test_gradient_checkpointing_changes_no_gradient(tiny_folder) -> None:
    config, samples, found, calls = settings(), make_samples(), [], []
    for checkpointing in (False, True):
        model = replace(
            config.model, name_or_path=str(tiny_folder), gradient_checkpointing=checkpointing
        )
        torch.manual_seed(0)
        policy = load_policy(model, config.lora, load_tokenizer(model), CPU, "none")
        change(policy, 5, std=0.2)
        policy.model.train()
        seen: list[bool] = []
        layer = policy.core.model.layers[0].mlp
        layer.register_forward_pre_hook(functools.partial(_note, seen))
        found.append(run(make_method(config, policy), samples))
        calls.append(len(seen))
    assert calls == [2, 3]  # teacher, student and, for the gradient, the student again
    assert_same(found[1], found[0], rel=1e-6)


def _note(seen: list[bool], *_: object) -> None:
    seen.append(True)


def test_generation_has_all_weights_in_the_compute_dtype_and_gives_them_back() -> None:
    policy = make_policy(lora=False, dtype=torch.bfloat16)
    before = [p.detach().clone() for p in policy.parameters]
    with policy.generating():
        assert all(p.dtype == torch.bfloat16 for p in policy.model.parameters())
        assert policy.core.lm_head.weight is policy.core.model.embed_tokens.weight
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters, before, strict=True))


def test_snapshot_swaps_and_averages() -> None:
    policy = make_policy(lora=False)
    start = [p.detach().clone() for p in policy.parameters]
    snapshot = Snapshot(policy.core, policy.parameters)
    change(policy, 5)
    changed = [p.detach().clone() for p in policy.parameters]
    with pytest.raises(ZeroDivisionError), snapshot.applied():
        assert all(torch.equal(p, q) for p, q in zip(policy.parameters, start, strict=True))
        raise ZeroDivisionError
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters, changed, strict=True))
    assert all(torch.equal(v, q) for v, q in zip(snapshot.values, start, strict=True))
    snapshot.blend(0.75)
    for value, first, last in zip(snapshot.values, start, changed, strict=True):
        torch.testing.assert_close(value, 0.75 * first + 0.25 * last)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters, changed, strict=True))
