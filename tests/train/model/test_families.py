"""Families of models: log-probabilities and gradients equal those of the model's own logits."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from opsd_kernels import fused_linear_logprob
from opsd_kernels.integrations import heads
from opsd_kernels.integrations.heads import lm_head
from opsd_train.config.errors import UserError
from opsd_train.config.schema import LoraConfig, RolloutConfig
from opsd_train.data.layout import PADDED, Layout, make_batch
from opsd_train.methods.common import head_options
from opsd_train.model import families
from opsd_train.model.adapters import add_adapters
from opsd_train.model.families import (
    batch_layout,
    check_logits,
    completion_hidden,
    supports_packing,
)
from opsd_train.model.policy import Policy
from opsd_train.rollout import Request, Sampling
from opsd_train.rollout.transformers_engine import TransformersEngine
from tests.helpers.family_models import FAMILIES, SIZES, STATEFUL, every, make_family
from tests.helpers.method_cases import (
    CASES,
    LORA,
    VOCAB,
    assert_same,
    change,
    double,
    make_method,
    make_samples,
    run,
    settings,
    truth,
)
from tests.helpers.tiny import make_tokenizer

PROMPTS = [[5, 9, 33, 70], [8, 17], [3, 120, 44, 91, 60, 28, 77]]
COMPLETIONS = [[12, 99, 45], [7, 66, 23, 101, 54, 36], [88]]
# peft refuses out_proj of Mamba, whose kernels read its weight.
TARGETS = {"mamba": ["in_proj"], "mamba2": ["in_proj"], "falcon_h1": ["q_proj", "gate_proj"]}
# They need another cache, or their state reads the padding.
NO_ROLLOUT = ("mamba", "mamba2", "recurrent_gemma", "xlstm")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_that_are_sharded(family: str) -> None:
    model = make_family(family, torch.float32)
    blocks = families.decoder_layers(model)
    assert len(blocks) == model.config.get_text_config().num_hidden_layers
    inside = sum(p.numel() for p in blocks.parameters())
    beside = {p for p in model.parameters()}.difference(blocks.parameters())
    assert inside > 0 and all(p.ndim < 3 for p in beside)  # experts and convolutions are inside


def logprobs(policy: Policy, prompts: list, completions: list) -> Tensor:
    """Log-probabilities as the methods compute them."""
    return policy.run(
        prompts,
        completions,
        lambda hidden, head, targets: fused_linear_logprob(
            hidden, head.weight, targets, **head_options(head)
        ),
    )


def own_logprobs(model: nn.Module, prompts: list, completions: list) -> Tensor:
    """Log-probabilities of each sequence alone, from the model's own logits."""
    parts = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([prompt + completion], device=model.device)
        logits = model(input_ids=ids, use_cache=False).logits[0].cpu()
        logits = logits[len(prompt) - 1 : -1].log_softmax(-1)
        parts.append(logits.gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return torch.cat(parts)


def gradient(value: Tensor, policy: Policy) -> Tensor:
    """The gradient of a weighted sum of `value` in all trained weights, as one vector."""
    policy.model.zero_grad()
    (value.cpu() * torch.linspace(-1, 2, len(value), dtype=value.dtype)).sum().backward()
    parts = [p.grad if p.grad is not None else torch.zeros_like(p) for p in policy.parameters]
    return torch.cat([part.flatten().double() for part in parts])


def adapt(model: nn.Module, family: str) -> nn.Module:
    targets = TARGETS.get(family, "all-linear")
    adapted = add_adapters(model, LoraConfig(rank=2, alpha=4, target_modules=targets))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return adapted.double()


@pytest.mark.parametrize("lora", [False, True], ids=["all weights", "lora"])
@pytest.mark.parametrize("family", every(FAMILIES))
def test_logprobs_and_gradients_are_the_models_own(family: str, lora: bool) -> None:
    torch.manual_seed(1)
    model = make_family(family)
    check_logits(model, family, 0)
    policy = Policy(adapt(model, family) if lora else model, 0, torch.float64)
    policy.model.eval()
    ours = logprobs(policy, PROMPTS, COMPLETIONS)
    theirs = own_logprobs(policy.model, PROMPTS, COMPLETIONS)
    # Some models compute a norm, a router or a state in float32 whatever their weights are.
    torch.testing.assert_close(ours.cpu(), theirs, rtol=0, atol=2e-5, check_dtype=False)
    found, wanted = gradient(ours, policy), gradient(theirs, policy)
    assert wanted.norm() > 0.1
    assert (found - wanted).norm() < 1e-4 * wanted.norm()


# --------------------------------------------------------------------------------------- generation


def engine(model: nn.Module, dtype: torch.dtype = torch.float32) -> TransformersEngine:
    model.generation_config = transformers.GenerationConfig()
    tokenizer = make_tokenizer(None)
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([0, 2])
    config = RolloutConfig(max_new_tokens=5, batch_tokens=400)
    return TransformersEngine(Policy(model, 0, dtype), tokenizer, config)


@pytest.mark.parametrize("family", every(name for name in FAMILIES if name not in NO_ROLLOUT))
def test_the_samplers_logprobs_are_the_trainers(family: str) -> None:
    """The sampler pads left and has a cache; the trainer pads right and has none."""
    model = make_family(family, torch.float32)
    engine(make_family(family, torch.bfloat16), torch.bfloat16).prove(family)
    sampler = engine(model)
    sampler.prove(family)
    prompts = [*PROMPTS, PROMPTS[1]]
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    made = sampler.generate(requests, Sampling(5, temperature=1.0))
    ours = logprobs(sampler.policy, prompts, [completion.tokens for completion in made])
    theirs = torch.tensor([p for completion in made for p in completion.logprobs])
    torch.testing.assert_close(ours.detach().cpu(), theirs, rtol=0, atol=1e-3)
    assert len({tuple(completion.tokens) for completion in made}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", every(NO_ROLLOUT))
def test_models_with_another_cache_are_not_sampled_from(family: str, dtype: torch.dtype) -> None:
    with pytest.raises(UserError) as caught:
        engine(make_family(family, dtype), dtype).prove("some/model")
    line = str(caught.value)
    name = type(make_family(family)).__name__
    assert line.startswith("rollout.engine=transformers cannot sample from some/model (" + name)
    assert len(line) < 200 and "\n" not in line


# -------------------------------------------------------------------------------- the check at load


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["cohere", "gemma2", "granitemoe", "lfm2", "minicpm3", "phi"])
def test_the_check_changes_nothing(family: str, dtype: torch.dtype) -> None:
    model = make_family(family, dtype).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    check_logits(model, family, 0)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def fault(model: nn.Module) -> str:
    with pytest.raises(UserError) as caught:
        check_logits(model, "some/model", 0)
    line = str(caught.value)
    assert line.startswith(f"model some/model ({type(model).__name__}) is not supported: ")
    assert line.endswith("; please report the class")
    assert len(line) < 200 and "\n" not in line
    return line


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "family",
    [name for name, sizes in FAMILIES.items() if name in heads.FAMILIES],
)
def test_a_family_that_the_table_forgot_is_refused(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_family(family, torch.float32 if family == "xlstm" else dtype)
    monkeypatch.delitem(heads.FAMILIES, family)
    assert "not the scaled and capped output of its head (gap" in fault(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x * 1.1,
        lambda x: x + 0.3,  # a bias that is not the head's
        lambda x: 30 * torch.tanh(x / 30),
        lambda x: x[..., :-1],
        lambda x: x.clamp(min=-20),
        lambda x: x + torch.nan,
    ],
    ids=["scale", "bias", "softcap", "shorter", "clamp", "nan"],
)
def test_logits_that_the_losses_cannot_express_are_refused(change: Any, dtype: torch.dtype) -> None:
    model = make_family("llama", dtype)
    check_logits(model, "llama", 0)
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: change(output))
    assert "its logits are" in fault(model)


def test_hidden_states_that_are_not_the_logits_are_refused() -> None:
    model = make_family("llama", torch.float32)
    model.model.register_forward_hook(
        lambda _module, inputs, output: setattr(
            output, "last_hidden_state", output.last_hidden_state.cumsum(1).flip(1)
        )
    )
    assert "hidden states change when a longer sequence is in the batch (gap" in fault(model)


SMALL = SIZES | {"head_dim": 8, "intermediate_size_mlp": 48}


@pytest.mark.parametrize(
    ("family", "settings", "reason"),
    [
        (
            "llama4_text",
            {"num_local_experts": 2, "num_hidden_layers": 1},
            "returns Llama4ForCausalLM",
        ),
        (
            "modernbert-decoder",
            {"global_attn_every_n_layers": 2},
            "returns Linear, not",
        ),
        ("bert", {"is_decoder": True}, "not the scaled and capped output"),  # a layer before it
        ("bert-generation", {}, "change when a longer sequence"),  # reads both ways
        ("electra", {"is_decoder": True, "embedding_size": 32}, "output of its head"),
    ],
)
def test_other_models_are_refused_by_name(family: str, settings: dict, reason: str) -> None:
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **(SMALL | settings))
    assert reason in fault(transformers.AutoModelForCausalLM.from_config(config))


def test_scale_before_softcap() -> None:
    """Muse has both, but transformers cannot load its text model alone, so a Llama plays it."""
    core = make_family("llama", torch.float32)
    core.config.model_type = "muse_spark_text"
    core.config.output_multiplier, core.config.final_logit_softcapping = 0.2, 3.0
    core.lm_head.register_forward_hook(lambda *args: 3 * torch.tanh(args[2] * 0.2 / 3))
    check_logits(core, "muse", 0)
    head = lm_head(core)
    assert head.logit_scale == 0.2 and head.softcap == 3.0


# ------------------------------------------------------------------------------------------ packing


def flash(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any):
    """FlashAttention as transformers calls it: positions that restart at 0 separate sequences."""
    assert mask is None
    positions, window = options.get("position_ids"), options.get("sliding_window")
    length, groups = query.shape[2], query.shape[1] // key.shape[1]
    places = torch.arange(length, device=query.device)
    seen = places[None] <= places[:, None]
    if positions is not None and len(query) == 1:
        part = (positions[0] == 0).cumsum(0)
        seen &= part[None] == part[:, None]
    if window:
        seen &= places[:, None] - places[None] < window
    key, value = (tensor.repeat_interleave(groups, 1) for tensor in (key, value))
    scale = options.get("scaling")
    output = F.scaled_dot_product_attention(query, key, value, seen, scale=scale)
    return output.transpose(1, 2).contiguous(), None


def with_flash(family: str, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    model = make_family(family, torch.float32)
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_2", flash)
    model.config._attn_implementation = "flash_attention_2"
    return model


@pytest.mark.parametrize("family", ["cohere2", "gpt2", "llama", "qwen3", "qwen3_moe", "phi3"])
def test_attention_packs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = with_flash(family, monkeypatch)
    assert supports_packing(model, 0) and batch_layout(model, 0) == Layout("packed")
    hidden = [
        completion_hidden(model, make_batch(PROMPTS, COMPLETIONS, 0, model.device, layout))
        for layout in (PADDED, Layout("packed"))
    ]
    torch.testing.assert_close(*hidden, rtol=0, atol=1e-4)
    monkeypatch.undo()
    model.config._attn_implementation = "sdpa"
    assert not supports_packing(model, 0)  # its mask is a tensor: padded batches are smaller


@pytest.mark.parametrize("family", every(STATEFUL))
def test_layers_with_a_state_do_not_pack(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their padded batches are tested above."""
    assert not supports_packing(with_flash(family, monkeypatch), 0)


def test_attention_that_never_sees_the_positions_does_not_pack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(FAMILIES, "gpt_bigcode", FAMILIES["gpt2"])
    model = with_flash("gpt_bigcode", monkeypatch)
    assert not supports_packing(model, 0)
    assert batch_layout(model, 0) is PADDED  # nor does it share prompts, which takes a mask


# ------------------------------------------------------------------------------- scales in methods


def scaled(family: str, **settings: float) -> nn.Module:
    """A model of the family with the vocabulary of the methods' samples."""
    torch.manual_seed(1)
    sizes = SIZES | {"vocab_size": VOCAB} | settings
    config = transformers.AutoConfig.for_model(family, **sizes)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("name", CASES)
def test_every_method_scales_both_heads(name: str) -> None:
    config, samples = settings(*CASES[name]), make_samples()
    student = add_adapters(scaled("granite", logits_scaling=0.3), LORA)
    policy = Policy(student, 0, torch.float32)
    change(policy, seed=1, std=0.3, only="lora_B")
    others = {}
    if config.method == "distill":
        others["teacher"] = scaled("cohere", logit_scale=2.0).requires_grad_(False)
    method = make_method(config, policy, *[Policy(t, 0, torch.float32) for t in others.values()])
    samples = method.assign_weights(samples)
    found = run(method, samples)
    its = {name: copy.deepcopy(model).double() for name, model in others.items()}
    assert_same(found, truth(config, double(policy), samples, **its), rel=1e-3)


def test_the_initial_teacher_of_a_fully_trained_model_scales_its_head() -> None:
    """The teacher's head is a copy. With the same prompt, teacher and student start out equal."""
    policy = Policy(scaled("cohere", logit_scale=4.0), 0, torch.float32)
    method = make_method(settings("loss.beta=0.0"), policy)
    assert run(method, make_samples(same_prompt=True)).loss < 1e-6
    change(policy, seed=3, std=0.05)
    assert run(method, make_samples(same_prompt=True)).loss > 1e-2
