"""The method itself, against plain PyTorch on full logits."""

import pytest
import torch
from tiny import config, make_model

from opsd_kernels import reference
from opsd_train.batches import Sample, make_batch, micro_batches
from opsd_train.data import Problem
from opsd_train.errors import UserError
from opsd_train.methods.opsd import student_loss, teacher_view
from opsd_train.model import add_adapters, completion_hidden, initial_policy, lm_head
from opsd_train.sections import LoraConfig, LossConfig

PAD = 0
OBJECTIVES = [
    LossConfig(beta=0.0),
    LossConfig(beta=0.5, temperature=1.3),
    LossConfig(beta=1.0),
    LossConfig(objective="sampled_token"),
]


def adapted(dtype: torch.dtype = torch.float32, trained: bool = True):
    """The tiny model with adapters; `trained` gives them weights, so that they do something."""
    lora = LoraConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
    model = add_adapters(make_model(dtype=dtype), lora)
    if trained:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.normal_(std=0.3)
    return model


def make_samples(count: int = 8, same_prompt: bool = False) -> list[Sample]:
    generator = torch.Generator().manual_seed(2)

    def tokens(low: int, high: int) -> list[int]:
        size = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(1, 261, (size,), generator=generator).tolist()

    samples = []
    for index in range(count):
        student, teacher, completion = tokens(3, 12), tokens(5, 20), tokens(1, 9)
        problem = Problem(f"p{index}", "", "", "")
        teacher = student if same_prompt else teacher
        samples.append(Sample(problem, student, teacher, completion))
    return samples


def loss_of(model, samples, loss: LossConfig, budget: int = 10**6):
    """Loss, statistics and adapter gradients over as many micro-batches as the budget makes."""
    model.zero_grad()
    num_tokens = sum(len(sample.completion) for sample in samples)
    total, columns = 0.0, []
    for group in micro_batches(samples, budget):
        view = teacher_view(model, group, PAD)
        value, stats = student_loss(model, group, view, PAD, loss, num_tokens)
        if value.requires_grad:
            value.backward()
        total += value.item()
        columns.append(stats["divergence"])
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return total, torch.cat(columns), grads


def logits_alone(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Logits that predict the completion, of one sample run by itself through the whole model."""
    ids = torch.tensor([[*prompt, *completion]])
    logits = model(input_ids=ids).logits[0]
    return logits[len(prompt) - 1 : -1].double()


def plain_loss(model, samples, loss: LossConfig) -> torch.Tensor:
    """Equations 6-9 written down over full logits, sample by sample."""
    values = []
    for sample in samples:
        student = logits_alone(model, sample.student_prompt, sample.completion)
        with torch.no_grad(), initial_policy(model):
            teacher = logits_alone(model, sample.teacher_prompt, sample.completion)
        ls = torch.log_softmax(student / loss.temperature, -1)
        lt = torch.log_softmax(teacher / loss.temperature, -1)
        if loss.objective == "full_vocabulary":
            values.append(reference.divergence(ls, lt, loss.beta))
        else:
            y = torch.tensor(sample.completion)[:, None]
            advantage = (lt - ls).detach().gather(1, y)
            values.append(-(advantage * ls.gather(1, y)).squeeze(1))
    return torch.cat(values).mean()


@pytest.mark.parametrize("loss", OBJECTIVES, ids=str)
def test_loss_and_gradient_equal_full_logits(loss: LossConfig) -> None:
    model, samples = adapted(), make_samples()
    truth = plain_loss(model, samples, loss)
    truth.backward()
    wanted = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    value, _, grads = loss_of(model, samples, loss)
    assert value == pytest.approx(truth.item(), rel=1e-5)
    assert grads.keys() == wanted.keys() and len(grads) == 12
    for name, grad in grads.items():
        size = wanted[name].abs().max()
        assert size > 0, name
        assert (grad - wanted[name]).abs().max() < 1e-4 * size, name


@pytest.mark.parametrize("loss", OBJECTIVES, ids=str)
def test_one_micro_batch_or_eight(loss: LossConfig) -> None:
    model, samples = adapted(), make_samples()
    longest = max(sample.longest for sample in samples)
    assert len(list(micro_batches(samples, longest))) >= 6
    one, _, grads_of_one = loss_of(model, samples, loss)
    many, _, grads_of_many = loss_of(model, samples, loss, budget=longest)
    assert one == pytest.approx(many, rel=1e-5)
    for name, grad in grads_of_one.items():
        assert (grad - grads_of_many[name]).abs().max() < 1e-5 * grad.abs().max(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("loss", OBJECTIVES, ids=str)
def test_same_prompt_means_no_divergence_before_training(loss, dtype) -> None:
    model = adapted(dtype, trained=False)
    _, divergence, _ = loss_of(model, make_samples(same_prompt=True), loss)
    assert divergence.abs().max() < 1e-6


def test_another_prompt_means_divergence() -> None:
    _, divergence, _ = loss_of(adapted(trained=False), make_samples(), LossConfig(beta=0.5))
    assert (divergence > 1e-4).all()


def test_padding_separates_no_prompt_from_its_completion() -> None:
    model, samples = adapted(), make_samples()
    prompts = [sample.student_prompt for sample in samples]
    completions = [sample.completion for sample in samples]
    batch = make_batch(prompts, completions, PAD, torch.device("cpu"))
    hidden = completion_hidden(model, batch)
    logits = hidden @ lm_head(model).weight.T
    alone = torch.cat(
        [logits_alone(model, p, c) for p, c in zip(prompts, completions, strict=True)]
    )
    assert batch.targets.tolist() == [token for completion in completions for token in completion]
    assert (logits.double() - alone).abs().max() < 1e-4 * alone.abs().max()


def test_adapters_off_is_the_base_model_bit_for_bit() -> None:
    base, model = make_model(), adapted()
    ids = torch.arange(1, 20)[None]
    with initial_policy(model):
        off = model(input_ids=ids).logits
    assert torch.equal(off, base(input_ids=ids).logits)
    assert not torch.equal(model(input_ids=ids).logits, off)


def test_micro_batches_keep_to_the_budget_and_lose_nobody() -> None:
    samples = make_samples(20)
    groups = list(micro_batches(samples, 60))
    assert sorted(s.problem.id for g in groups for s in g) == sorted(s.problem.id for s in samples)
    assert all(len(g) * max(s.longest for s in g) <= 60 for g in groups)
    with pytest.raises(UserError, match=r"micro_batch_tokens=10 .* problem p\d+ has \d+ tokens"):
        list(micro_batches(samples, 10))


def test_adapters_are_float32_beside_bfloat16_weights() -> None:
    model = adapted(torch.bfloat16)
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if "lora_" in name else torch.bfloat16
        assert parameter.dtype == wanted and parameter.requires_grad == ("lora_" in name), name


@pytest.mark.parametrize(
    ("targets", "message"),
    [(["lm_head"], "lm_head cannot have an adapter"), (["q_pro"], "no module 'q_pro'")],
)
def test_wrong_targets(targets: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add_adapters(make_model(), LoraConfig(rank=2, alpha=2, target_modules=targets))


def test_tiny_recipe_is_a_config(tmp_path) -> None:
    assert config("model", tmp_path, "steps=7").steps == 7
