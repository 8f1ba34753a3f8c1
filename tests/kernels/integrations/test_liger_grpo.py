"""Liger's GRPO loss by its name, against the formula in float64 and against Liger's own code."""

import inspect
import math
import warnings

import pytest
import torch
from torch import Tensor

from opsd_kernels.integrations import liger_grpo
from opsd_kernels.integrations.liger import LigerFusedLinearGRPOLoss
from opsd_kernels.testing import assert_close, cast
from tests.helpers.kernel_cases import run

BATCH, TOKENS, HIDDEN, VOCAB = 5, 7, 11, 61
TRAINED = ("_input", "lin_weight", "bias")
CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
KINDS = [(loss, "token") for loss in (*CLIPPED, "cispo", "sapo", "vespo")]
KINDS += [(loss, "sequence") for loss in CLIPPED]
MAX_LENGTH = 9
# Every option once alone or with others that change other terms of the loss.
VARIANTS: dict[str, dict[str, object]] = {
    "plain": {"beta": 0.0, "use_ref_model": False},
    "no_reference": {"beta": 0.1, "use_ref_model": False, "temperature": 0.7},
    "reference": {"beta": 0.1, "delta": 1.15, "given": ("ref_per_token_logps",)},
    "reference_head": {
        "beta": 0.3,
        "temperature": 1.4,
        "given": ("ref_input", "ref_weight", "ref_bias"),
    },
    "corrected_kl": {
        "beta": 0.2,
        "use_bias_correction_kl": True,
        "delta": 1.1,
        "given": ("ref_per_token_logps", "vllm_is_ratio"),
    },
    "one_ratio_a_sequence": {
        "beta": 0.0,
        "use_ref_model": False,
        "epsilon_low": 0.05,
        "epsilon_high": 0.1,
        "given": ("vllm_is_ratio_of_sequence", "num_items_in_batch"),
    },
    "on_policy": {"beta": 0.1, "given": ("ref_per_token_logps",), "old": False},
    "gates": {
        "beta": 0.0,
        "use_ref_model": False,
        "sapo_temperature_pos": 2.0,
        "sapo_temperature_neg": 0.5,
        "vespo_k_pos": 1.0,
        "vespo_lambda_pos": 0.5,
        "vespo_k_neg": 2.0,
        "vespo_lambda_neg": 0.7,
        "given": ("vllm_is_ratio",),
    },
}


def logprob(hidden: Tensor, weight: Tensor, bias: Tensor, ids: Tensor, temperature: float):
    z = (hidden @ weight.T + bias) / temperature
    return z.log_softmax(-1).gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def inputs(temperature: float = 1.0) -> dict[str, Tensor]:
    """Ratios far enough from 1 to clip on both sides; lengths 7, 4, 1, 6 and 3."""
    g = torch.Generator().manual_seed(7)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    ids = torch.randint(0, VOCAB, (BATCH, TOKENS), generator=g)
    case = {
        "_input": normal(BATCH, TOKENS, HIDDEN),
        "lin_weight": normal(VOCAB, HIDDEN) * 0.6,
        "bias": normal(VOCAB) * 0.3,
    }
    # What bf16 inputs hold, so that clipping falls the same way in every dtype.
    case = cast(cast(case, torch.bfloat16), torch.float64)
    p = logprob(*case.values(), ids, temperature)
    return case | {
        "selected_token_ids": ids,
        "attention_mask": (
            torch.arange(TOKENS) < torch.tensor([7, 4, 1, 6, 3]).unsqueeze(1)
        ).long(),
        "advantages": torch.tensor([1.3, -0.7, -1.9, 0.4, 0.0], dtype=torch.float64),
        "old_per_token_logps": p + 0.25 * normal(BATCH, TOKENS),
        "ref_per_token_logps": p + 0.5 * normal(BATCH, TOKENS),
        "ref_input": normal(BATCH, TOKENS, HIDDEN - 2),
        "ref_weight": normal(VOCAB, HIDDEN - 2) * 0.6,
        "ref_bias": normal(VOCAB),
        "vllm_is_ratio": torch.rand(BATCH, TOKENS, generator=g, dtype=torch.float64) + 0.5,
        "vllm_is_ratio_of_sequence": torch.rand(BATCH, generator=g, dtype=torch.float64) + 0.5,
        "num_items_in_batch": torch.tensor(31),
    }


def case_of(variant: str, loss_type: str, level: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors and options of a call."""
    options = dict(VARIANTS[variant])
    given, old = options.pop("given", ()), options.pop("old", True)
    tensors = inputs(options.get("temperature", 1.0))
    names = [*TRAINED, "selected_token_ids", "attention_mask", "advantages", *given]
    chosen = {name: tensors[name] for name in names + ["old_per_token_logps"] * old}
    if "vllm_is_ratio_of_sequence" in chosen:
        chosen["vllm_is_ratio"] = chosen.pop("vllm_is_ratio_of_sequence")
    if loss_type == "cispo":
        options["epsilon_high"] = 1.1
    how = {"loss_type": loss_type, "importance_sampling_level": level}
    return chosen, options | how | {"max_completion_length": MAX_LENGTH}


def plain(
    *,
    _input: Tensor,
    lin_weight: Tensor,
    bias: Tensor,
    selected_token_ids: Tensor,
    attention_mask: Tensor,
    advantages: Tensor,
    loss_type: str,
    importance_sampling_level: str,
    max_completion_length: int,
    beta: float = 0.04,
    use_ref_model: bool = True,
    temperature: float = 1.0,
    epsilon_low: float = 0.2,
    epsilon_high: float = 0.2,
    delta: float | None = None,
    use_bias_correction_kl: bool = False,
    sapo_temperature_pos: float = 1.0,
    sapo_temperature_neg: float = 1.05,
    vespo_k_pos: float = 2.0,
    vespo_lambda_pos: float = 3.0,
    vespo_k_neg: float = 3.0,
    vespo_lambda_neg: float = 2.0,
    old_per_token_logps: Tensor | None = None,
    ref_per_token_logps: Tensor | None = None,
    ref_input: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    vllm_is_ratio: Tensor | None = None,
    num_items_in_batch: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """One sequence and one token at a time: loss, mean KL if beta is not 0, clipped fraction."""
    p = logprob(_input, lin_weight, bias, selected_token_ids, temperature)
    q = p.detach() if old_per_token_logps is None else old_per_token_logps
    r = p.detach() if not use_ref_model else ref_per_token_logps
    if use_ref_model and r is None and beta != 0:
        r = logprob(ref_input, ref_weight, ref_bias, selected_token_ids, temperature)
    lengths = attention_mask.sum(1).tolist()
    ratios = torch.ones_like(p) if vllm_is_ratio is None else vllm_is_ratio
    ratios = ratios.unsqueeze(1) if ratios.dim() == 1 else ratios
    losses, kls, clips = [], [], []  # of each sequence, a list over tokens
    for b, length in enumerate(lengths):
        a, tokens = advantages[b], range(TOKENS if loss_type == "luspo" else length)
        mean = (p[b, :length] - q[b, :length]).mean()
        up = bool(a >= 0)
        k = vespo_k_pos if up else vespo_k_neg
        lam = vespo_lambda_pos if up else vespo_lambda_neg
        product = (p[b, :length] - q[b, :length]).sum() + ratios[b].log().sum()
        phi = (product * k + lam * (1 - product.exp())).exp().detach()
        losses.append([])
        for t in tokens:
            w = (mean if importance_sampling_level == "sequence" else p[b, t] - q[b, t]).exp()
            ratio = ratios[b, t if ratios.shape[1] > 1 else 0]
            if loss_type == "cispo":
                value = -min(w.item(), epsilon_high) * a * p[b, t] * ratio
                clipped = w > epsilon_high and a > 0
            elif loss_type == "sapo":
                tau = sapo_temperature_pos if a > 0 else sapo_temperature_neg
                value = -4 / tau / (1 + (-tau * (w - 1)).exp()) * a * ratio
                clipped = False
            elif loss_type == "vespo":
                value, clipped = -phi * a * p[b, t], False
            else:
                one = w if delta is None or w < delta else torch.tensor(delta).to(w)
                two = w.clamp(1 - epsilon_low, 1 + epsilon_high)
                value = -min(one * a, two * a) * ratio
                clipped = (w < 1 - epsilon_low and a < 0) or (w > 1 + epsilon_high and a > 0)
            if beta != 0:
                kl = (r[b, t] - p[b, t]).exp() - (r[b, t] - p[b, t]) - 1
                kl = kl * w if use_bias_correction_kl else kl
                value = value + beta * kl
                kls += [kl.detach()] * (t < length)
            clips += [float(clipped)] * (t < length)
            losses[-1].append(value)
    sums, count = torch.stack([torch.stack(x).sum() for x in losses]), sum(lengths)
    if loss_type in ("grpo", "sapo"):
        loss = (sums / torch.tensor(lengths)).mean()
    elif loss_type == "luspo":
        loss = (sums * torch.tensor(lengths)).sum() / (BATCH * TOKENS)
    elif loss_type == "dr_grpo":
        loss = sums.sum() / (BATCH * max_completion_length)
    else:
        per_batch = num_items_in_batch is None or loss_type == "bnpo"
        loss = sums.sum() / (count if per_batch else num_items_in_batch)
    clip = torch.tensor(math.fsum(clips) / count, dtype=loss.dtype)
    return (loss, torch.stack(kls).mean(), clip) if beta != 0 else (loss, clip)


def of_class(cls: type, tensors: dict[str, Tensor], options: dict) -> tuple[list, dict]:
    def call(**named: Tensor) -> tuple[Tensor, ...]:
        loss, metrics = cls(**options)(**named)
        return loss, *metrics

    return run(call, tensors, TRAINED)


def compare(ours: tuple[list, dict], truth: tuple[list, dict], dtype: torch.dtype) -> None:
    """The room, relative to the largest entry, is that of sums in fp32.

    For bf16 gradients it is that of roundings by 2**-9: of the logits' gradient before the product,
    and of the product.
    """
    assert len(ours[0]) == len(truth[0])
    for i, (a, t) in enumerate(zip(ours[0], truth[0], strict=True)):
        assert a.dtype == torch.float32 and a.shape == ()
        assert_close(a, t, floor=2e-5, atol=2e-7, name=f"output {i}")
    for name in TRAINED:
        assert ours[1][name].dtype == dtype
        floor = 2e-5 if dtype == torch.float32 else 2**-7
        assert_close(ours[1][name], truth[1][name], floor=floor, name=f"gradient of {name}")


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_the_formula(loss_type: str, level: str, variant: str) -> None:
    tensors, options = case_of(variant, loss_type, level)
    truth = run(plain, tensors, TRAINED, **options)
    # Else the test would hold for a loss of 0.
    assert truth[0][0] != 0 and all(grad.abs().max() > 1e-6 for grad in truth[1].values())
    for dtype in (torch.float32, torch.bfloat16):
        ours = {name: x.to(dtype) if name in TRAINED else x for name, x in tensors.items()}
        ours |= {n: x.float() for n, x in ours.items() if x.dtype == torch.float64}
        compare(of_class(LigerFusedLinearGRPOLoss, ours, options), truth, dtype)


def test_the_cases_clip() -> None:
    """On both sides, at both levels, and not everywhere."""
    for loss_type, level in KINDS:
        tensors, options = case_of("one_ratio_a_sequence", loss_type, level)
        clipped = plain(**tensors, **options)[-1]
        assert (0 < clipped < 1) == (loss_type not in ("sapo", "vespo"))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("loss_type", "level"), KINDS)
def test_ligers_own(loss_type: str, level: str, variant: str) -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    tensors, options = case_of(variant, loss_type, level)
    tensors = cast(tensors, torch.float32)
    options["compiled"] = False
    theirs = of_class(Theirs, tensors, options)
    compare(of_class(LigerFusedLinearGRPOLoss, tensors, options), theirs, torch.float32)


def test_the_order_of_arguments_is_ligers() -> None:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss as Theirs

    for name in ("__init__", "forward"):
        ours, theirs = (
            inspect.signature(getattr(cls, name)).parameters.values()
            for cls in (LigerFusedLinearGRPOLoss, Theirs)
        )
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


@pytest.mark.parametrize("trained", [(), ("lin_weight",), ("bias",)])
def test_a_frozen_head_gets_no_gradient(trained: tuple[str, ...]) -> None:
    tensors, options = case_of("reference", "dapo", "token")
    truth = run(plain, tensors, TRAINED, **options)[1]
    leaves = cast(tensors, torch.float32)
    for name in ("_input", *trained):
        leaves[name].requires_grad_()
    loss, _ = LigerFusedLinearGRPOLoss(**options)(**leaves)
    (loss * 0.7).backward()
    for name in TRAINED:
        if name in ("_input", *trained):
            assert_close(leaves[name].grad, truth[name], floor=2e-5, name=name)
        else:
            assert leaves[name].grad is None


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dapo", "cispo", "sapo", "vespo"])
def test_nothing_masked_reaches_the_loss(loss_type: str) -> None:
    """Ids outside the vocabulary, NaN and infinity there change no bit; an empty row gives 0."""
    tensors, options = case_of("reference", loss_type, "token")
    tensors = cast(tensors, torch.float32)
    tensors["attention_mask"][1] = 0
    first = of_class(LigerFusedLinearGRPOLoss, tensors, options)
    masked = tensors["attention_mask"] == 0
    spoilt = {name: tensors[name].clone() for name in tensors}
    spoilt["selected_token_ids"][masked] = -100
    spoilt["old_per_token_logps"][masked] = -torch.inf
    spoilt["ref_per_token_logps"][masked] = torch.nan
    spoilt["_input"][masked] = torch.nan
    second = of_class(LigerFusedLinearGRPOLoss, spoilt, options)
    for a, b in zip(first[0], second[0], strict=True):
        assert a.isfinite() and a == b
    for name in TRAINED:
        assert torch.equal(first[1][name], second[1][name])
    assert (first[1]["_input"][masked] == 0).all()


def test_an_empty_batch_of_tokens_gives_0() -> None:
    for kind in KINDS:
        tensors, options = case_of("reference", *kind)
        tensors = cast(tensors, torch.float32)
        tensors["attention_mask"].zero_()
        values, grads = of_class(LigerFusedLinearGRPOLoss, tensors, options)
        assert all(value == 0 for value in values)
        assert all((grad == 0).all() for grad in grads.values())


def test_tokens_are_counted_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.ones(2, 3)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tokens: tokens.add_(20))
    assert liger_grpo._tokens_per_process(mask, None) == 26 / 4
    assert liger_grpo._tokens_per_process(mask, 40) == 10
    assert liger_grpo._tokens_per_process(mask, torch.tensor(2)) == 1


def test_a_given_logprob_goes_before_a_reference_head() -> None:
    tensors, options = case_of("reference", "grpo", "token")
    tensors = cast(tensors, torch.float32)
    both = tensors | {name: inputs()[name].float() for name in ("ref_input", "ref_weight")}
    loss_fn = LigerFusedLinearGRPOLoss(**options)
    with pytest.warns(UserWarning, match="ref_input is not read"):
        loss, _ = loss_fn(**both)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert loss == loss_fn(**tensors)[0]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"sapo_temperature_pos": 0.0}, "sapo_temperature_pos: expected a positive"),
        ({"sapo_temperature_neg": -1.0}, "sapo_temperature_neg: expected a positive"),
        ({"delta": 0.0}, "delta: expected a positive"),
        ({"loss_type": "ppo"}, "loss_type: expected one of"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level: expected one of"),
        ({"loss_type": "dr_grpo", "max_completion_length": None}, "max_completion_length: pass it"),
        ({"temperature": 0.0}, "temperature: expected a positive"),
        ({"vllm_is_ratio": torch.ones(TOKENS, BATCH)}, "vllm_is_ratio: expected shape"),
        ({"ref_per_token_logps": None}, "ref_per_token_logps: pass it, or ref_input"),
        ({"selected_token_ids": torch.full((BATCH, TOKENS), VOCAB)}, "target: expected values"),
    ],
)
def test_refusals(how: dict[str, object], message: str) -> None:
    tensors, options = case_of("reference", "grpo", "token")
    tensors = cast(tensors, torch.float32)
    (tensors if set(how) & {*tensors, "vllm_is_ratio"} else options).update(how)
    with pytest.raises(ValueError, match=message):
        LigerFusedLinearGRPOLoss(**options)(**tensors)


@pytest.mark.parametrize("loss_type", ["cispo", "sapo", "vespo"])
def test_sequence_level_fits_clipped_losses_only(loss_type: str) -> None:
    tensors, options = case_of("plain", loss_type, "sequence")
    with pytest.raises(ValueError, match=f"importance_sampling_level: .* {loss_type!r}; pass"):
        LigerFusedLinearGRPOLoss(**options)(**tensors)
