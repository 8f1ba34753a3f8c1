"""The transformers engine against `generate`, full forward passes and the distribution itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GenerationConfig

from opsd_train.config.errors import UserError
from opsd_train.config.schema import RolloutConfig
from opsd_train.model.policy import Policy
from opsd_train.rollout import Completion, Request, Sampling
from opsd_train.rollout.mixture import TeacherMixture
from opsd_train.rollout.stop import stop_ids
from opsd_train.rollout.token_sampling import draw
from opsd_train.rollout.transformers_engine import TransformersEngine
from tests.helpers.tiny import make_model, make_tokenizer

PROMPTS = [[7, 30, 91], [5], [40, 2, 200, 13, 77, 120, 9], [61, 62, 63, 64], [99, 18, 3]]
SAMPLED = Sampling(max_new_tokens=12, temperature=1.0)


def tokenizer() -> Any:
    made = make_tokenizer()
    made.eos_token = made.pad_token = "<|end|>"
    return made


def config(**values: Any) -> RolloutConfig:
    return RolloutConfig(**{"max_new_tokens": 12, "batch_tokens": 1000, **values})


def engine(
    model: nn.Module,
    dtype: torch.dtype = torch.float32,
    mixture: TeacherMixture | None = None,
    **values: Any,
) -> TransformersEngine:
    policy = Policy(model, tokenizer().pad_token_id, dtype)
    return TransformersEngine(policy, tokenizer(), config(**values), mixture)


def with_adapters(model: nn.Module, dropout: float = 0.0) -> nn.Module:
    lora = LoraConfig(
        r=4, target_modules=["q_proj", "down_proj"], lora_dropout=dropout, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(model, lora)
    torch.manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return adapted


def gemma() -> nn.Module:
    """Capped logits, and every other layer with a window shorter than the completions."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "vocab_size": 261}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    settings = {"sliding_window": 6, "final_logit_softcapping": 3.0, "initializer_range": 0.3}
    settings |= {"tie_word_embeddings": False, "attn_implementation": "eager"}
    made = Gemma2ForCausalLM(Gemma2Config(**sizes, **heads, **settings))
    made.generation_config = GenerationConfig()
    return made


MODELS = {"plain": make_model, "adapters": lambda: with_adapters(make_model()), "gemma": gemma}


def requests(prompts: list[list[int]] = PROMPTS, seed: int = 100) -> list[Request]:
    return [Request(prompt, seed + index) for index, prompt in enumerate(prompts)]


def full_logits(model: nn.Module, prompt: list[int], tokens: list[int]) -> torch.Tensor:
    """(len(tokens), V) logits that predict them, from one forward pass without a cache."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt + tokens]), use_cache=False).logits[0]
    return logits[len(prompt) - 1 : -1].float()


def forward_shapes(model: nn.Module) -> list[tuple[int, ...]]:
    """Filled with the shape of the tokens of each forward pass from now on."""
    shapes: list[tuple[int, ...]] = []
    core = model.get_base_model() if hasattr(model, "get_base_model") else model
    core.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


def reference_greedy(model: nn.Module, prompt: list[int], stop: list[int]) -> list[int]:
    output = model.eval().generate(
        input_ids=torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        generation_config=GenerationConfig(
            max_new_tokens=12, do_sample=False, eos_token_id=stop, pad_token_id=0
        ),
    )
    return output[0, len(prompt) :].tolist()


@pytest.mark.parametrize("kind", MODELS)
def test_greedy_is_generate_with_stop_tokens(kind: str) -> None:
    model = MODELS[kind]()
    free = [reference_greedy(model, prompt, [999]) for prompt in PROMPTS]
    stop = [free[1][8], free[2][4]]  # so that sequences end at different times
    model.generation_config.eos_token_id = stop
    made = engine(model).generate(requests(), Sampling(12))
    wanted = [reference_greedy(model, prompt, [260, *stop]) for prompt in PROMPTS]
    assert [completion.tokens for completion in made] == wanted
    assert len({len(tokens) for tokens in wanted}) > 2
    for completion in made:
        assert completion.finished == (completion.tokens[-1] in [260, *stop])


@pytest.mark.parametrize("kind", MODELS)
def test_alone_or_in_a_batch(kind: str) -> None:
    model = MODELS[kind]()
    asked = requests([*PROMPTS, PROMPTS[2], PROMPTS[0], PROMPTS[2]])
    model.generation_config.eos_token_id = list(range(0, 261, 9))
    together = engine(model).generate(asked, SAMPLED)
    alone = [engine(model).generate([request], SAMPLED)[0] for request in asked]
    small = engine(model, batch_tokens=40).generate(asked, SAMPLED)
    assert [c.tokens for c in together] == [c.tokens for c in alone] == [c.tokens for c in small]
    assert together[2].tokens != together[5].tokens != together[7].tokens
    assert len({len(c.tokens) for c in together}) > 2
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


def allowed(logits: torch.Tensor, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """(N, V) log-probabilities by the definition, one token after the other."""
    rows = []
    for row in logits / temperature:
        order = row.argsort(descending=True)[: top_k or len(row)]
        mass = row[order].softmax(-1).cumsum(-1)
        kept = order[: int((mass < top_p).sum()) + 1]
        rows.append(torch.full_like(row, -torch.inf).index_copy(0, kept, row[kept].log_softmax(-1)))
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(0.0, 0, 1.0), (1.0, 0, 1.0), (0.7, 0, 1.0), (3.0, 5, 1.0), (2.0, 0, 0.6), (3.0, 8, 0.5)],
)
def test_logprobs(temperature: float, top_k: int, top_p: float) -> None:
    model = with_adapters(make_model())
    asked = requests(PROMPTS * 3)
    made = engine(model).generate(asked, Sampling(12, temperature, top_p, top_k))
    for request, completion in zip(asked, made, strict=True):
        logits = full_logits(model, request.prompt, completion.tokens)
        wanted = allowed(logits, temperature or 1.0, top_k, top_p)
        wanted = wanted.gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 1.4])
def test_a_mixture_of_student_and_teacher(temperature: float) -> None:
    """Drawn from 0.7 s + 0.3 t, the teacher wider, padded otherwise and with its own prompts."""
    student, other = with_adapters(make_model()), make_model(288, hidden_size=48)
    its_prompts = [[9, 9, *prompt, 4] for prompt in PROMPTS[::-1]]
    asked = [
        replace(request, teacher_prompt=prompt)
        for request, prompt in zip(requests(PROMPTS * 3), its_prompts * 3, strict=True)
    ]
    teacher = Policy(other.requires_grad_(False), 0, torch.float32)
    mixed = engine(student, mixture=TeacherMixture(teacher, 0.3))
    made = mixed.generate(asked, Sampling(12, temperature))
    gaps = []
    for request, completion in zip(asked, made, strict=True):
        own = full_logits(student, request.prompt, completion.tokens) / temperature
        own = own.softmax(-1)
        its = full_logits(other, request.teacher_prompt, completion.tokens) / temperature
        its = its[:, :261].softmax(-1)
        chosen = torch.tensor(completion.tokens)[:, None]
        wanted = (0.7 * own + 0.3 * its).gather(-1, chosen)[:, 0].log()
        assert completion.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)
        gaps.append((own.gather(-1, chosen)[:, 0].log() - wanted).abs().max().item())
    assert max(gaps) > 0.5 and len({len(completion.tokens) for completion in made}) > 1
    greedy = mixed.generate(requests(), Sampling(12))  # an evaluation is of the student alone
    assert greedy == engine(with_adapters(make_model())).generate(requests(), Sampling(12))


@pytest.mark.parametrize("top_k", [0, 6])
def test_frequencies(top_k: int) -> None:
    count = 4000
    model = make_model(vocab_size=261)
    model.lm_head.weight.data *= 0.3  # many tokens with a share
    asked = [Request(PROMPTS[0], seed) for seed in range(count)]
    sampling = Sampling(1, temperature=1.3, top_k=top_k)
    made = engine(model, batch_tokens=10 * count).generate(asked, sampling)
    seen = torch.bincount(torch.tensor([c.tokens[0] for c in made]), minlength=261).double()
    chance = allowed(full_logits(model, PROMPTS[0], [0]), 1.3, top_k, 1.0)[0].double().exp()
    assert seen[chance == 0].sum() == 0
    expected = count * chance / chance.sum()
    common = expected >= 5
    chi2 = ((seen - expected)[common] ** 2 / expected[common]).sum()
    free = int(common.sum()) - 1
    assert free > 4 and chi2 < free + 4 * (2 * free) ** 0.5


def test_draw_never_takes_the_impossible() -> None:
    logits = torch.tensor([-torch.inf, 1.0, -torch.inf, 0.0, -torch.inf]).expand(4, -1)
    p = 1 / (1 + math.exp(-1))
    numbers = torch.tensor([0, p - 1e-6, p + 1e-6, 1 - 2**-53], dtype=torch.float64)
    tokens, logprobs = draw(logits, numbers)
    assert tokens.tolist() == [1, 1, 3, 3]
    assert logprobs.tolist() == pytest.approx([math.log(p)] * 2 + [math.log(1 - p)] * 2, abs=1e-6)
    assert draw(logits, torch.ones(4, dtype=torch.float64))[0].tolist() == [1] * 4  # rounded up


def test_finished_sequences_are_not_computed() -> None:
    model = make_model()
    model.generation_config.eos_token_id = list(range(0, 261, 7))
    shapes = forward_shapes(model)
    made = engine(model).generate(requests(PROMPTS * 3), SAMPLED)
    lengths = [len(completion.tokens) for completion in made]
    assert len(set(lengths)) > 3
    live = [sum(length > step for length in lengths) for step in range(1, max(lengths))]
    # One row per distinct prompt, then one per completion that still needs a token.
    assert shapes == [(len(PROMPTS), 7), *((rows, 1) for rows in live)]


def test_batches_stay_within_the_budget() -> None:
    model = make_model()
    shapes = forward_shapes(model)
    asked = requests([*PROMPTS, [3] * 9, [4] * 10])
    made = engine(model, batch_tokens=48).generate(asked, SAMPLED)
    assert len(made) == len(asked)
    prefills = [shape for shape in shapes if shape[1] > 1]
    assert sum(rows for rows, _ in prefills) == len(asked)
    assert all(rows * (width + 12) <= 48 for rows, width in prefills) and len(prefills) < len(asked)
    with pytest.raises(UserError, match=r"rollout\.batch_tokens=21 .* 10 tokens and 12 new"):
        engine(model, batch_tokens=21).generate(asked, SAMPLED)


def test_training_state_neither_disturbs_nor_is_disturbed() -> None:
    wanted = engine(with_adapters(make_model())).generate(requests(), SAMPLED)
    model = with_adapters(make_model(), dropout=0.5)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    shapes = forward_shapes(model)
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    assert engine(model).generate(requests(), SAMPLED) == wanted
    assert torch.equal(state, torch.random.get_rng_state())
    assert shapes[1][1] == 1  # the cache is used
    assert model.training and all(module.training for module in model.modules())
    assert not model.get_base_model().lm_head._forward_pre_hooks


@pytest.mark.parametrize("full", [False, True])
def test_bfloat16_beside_trained_float32(full: bool) -> None:
    exact = make_model() if full else with_adapters(make_model())
    model = make_model() if full else with_adapters(make_model(dtype=torch.bfloat16))
    for module in model.modules():
        if hasattr(module, "cast_input_dtype_enabled"):
            module.cast_input_dtype_enabled = False
    made: list[Completion] = engine(model, torch.bfloat16).generate(requests(), Sampling(6))
    for request, completion in zip(requests(), made, strict=True):
        logits = full_logits(exact, request.prompt, completion.tokens)
        wanted = logits.log_softmax(-1).gather(-1, torch.tensor(completion.tokens)[:, None])[:, 0]
        assert completion.logprobs == pytest.approx(wanted.tolist(), abs=0.3)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("own", "named", "wanted"),
    [
        (None, [], [260]),
        (258, [], [258, 260]),
        ([258, 260], ["a"], [258, 260, "a"]),
        (None, ["<|user|>", "\n"], [260, "<|user|>", "\n"]),
    ],
)
def test_stop_ids(own: Any, named: list[str], wanted: list[Any]) -> None:
    tok = tokenizer()
    ids = [tok.encode(w, add_special_tokens=False)[0] if isinstance(w, str) else w for w in wanted]
    made = stop_ids(tok, GenerationConfig(eos_token_id=own), config(stop_tokens=named))
    assert made == sorted(ids)


def test_stop_token_of_several_tokens() -> None:
    with pytest.raises(UserError, match=r"rollout\.stop_tokens: 'ab' is not one token"):
        engine(make_model(), stop_tokens=["ab"])
