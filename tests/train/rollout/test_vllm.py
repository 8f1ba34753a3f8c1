"""The vLLM engine: `make vllm`, then `make test-vllm`. What needs no vLLM runs everywhere."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch

from opsd_train.config import schema
from opsd_train.config.errors import UserError
from opsd_train.rollout import Request, Sampling
from opsd_train.rollout.vllm_engine import VllmEngine
from tests.helpers.smollm import ALL_LINEAR, MODEL, adapted, prompts, set_adapter
from tests.helpers.tiny import make_model

ROLLOUT = schema.RolloutConfig(
    engine="vllm",
    max_new_tokens=32,
    batch_tokens=4096,
    stop_tokens=[":"],
    vllm_memory=0.3,
)
MAX_MODEL_LEN = 320


def engine_for(model, tokenizer, scratch):
    return VllmEngine(
        model,
        tokenizer,
        ROLLOUT,
        model_config=MODEL,
        scratch=scratch,
        max_model_len=MAX_MODEL_LEN,
        seed=0,
    )


def test_full_fine_tuning_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"lora: null.*rollout.engine=transformers"):
        engine_for(make_model(), None, tmp_path)


def test_without_vllm_the_fix_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm", None)
    model = adapted(make_model(), target_modules=["q_proj"])
    with pytest.raises(UserError, match=r"engine=vllm needs vLLM.*pip install.*make vllm"):
        engine_for(model, None, tmp_path)


@pytest.fixture(scope="module")
def smollm(tmp_path_factory):
    """Model, tokenizer, prompts and one engine: it takes half a minute to start."""
    pytest.importorskip("vllm", reason="make vllm")
    from opsd_train.model.policy import load_model, load_tokenizer

    tokenizer = load_tokenizer(MODEL)
    model = adapted(load_model(MODEL, tokenizer, torch.float32), target_modules=ALL_LINEAR)
    engine = engine_for(model, tokenizer, tmp_path_factory.mktemp("vllm"))
    asked = prompts(tokenizer)
    yield SimpleNamespace(model=model, tokenizer=tokenizer, prompts=asked, engine=engine)
    engine.close()


def sampled(smollm, temperature, seeds, **options):
    requests = [Request(prompt, seed) for prompt, seed in zip(smollm.prompts, seeds, strict=False)]
    return smollm.engine.generate(requests, Sampling(32, temperature, **options))


def greedy(smollm):
    return [completion.tokens for completion in sampled(smollm, 0.0, range(16))]


@torch.no_grad()
def greedy_by_transformers(smollm):
    stop = [smollm.tokenizer.eos_token_id, smollm.tokenizer.encode(":")[0]]
    completions = []
    for prompt in smollm.prompts:
        ids = torch.tensor([prompt])
        output = smollm.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=32,
            do_sample=False,
            eos_token_id=stop,
            pad_token_id=stop[0],
        )
        completions.append(output[0, len(prompt) :].tolist())
    return completions


@torch.no_grad()
def logprobs_by_transformers(smollm, prompt, completion, temperature):
    logits = smollm.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    logprobs = (logits / temperature).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0]


def agreement(ours, theirs):
    """Share of sequences that are the same, and of tokens up to the first that differs."""
    same = [a == b for a, b in zip(ours, theirs, strict=True)]
    prefix = sum(
        next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), len(b))
        for a, b in zip(ours, theirs, strict=True)
    )
    return sum(same) / len(same), prefix / sum(map(len, theirs))


@pytest.mark.vllm
def test_what_it_generates_follows_the_adapter_at_each_sync(smollm, record_property):
    fresh = greedy(smollm)  # B is zero
    expected = {"fresh": greedy_by_transformers(smollm)}
    set_adapter(smollm.model, 1)
    assert greedy(smollm) == fresh  # not before sync
    found = {"fresh": fresh}
    for seed in (1, 2):
        set_adapter(smollm.model, seed)
        smollm.engine.sync()
        found[seed], expected[seed] = greedy(smollm), greedy_by_transformers(smollm)
    for key in found:
        sequences, tokens = agreement(found[key], expected[key])
        record_property(f"greedy_{key}", [sequences, tokens])
        print(f"adapter {key}: {sequences:.3f} of sequences, {tokens:.3f} of tokens match")
        assert sequences >= 0.8 and tokens >= 0.9
    # The prompts differ from adapter to adapter, the one that fills cache blocks too.
    assert agreement(found[1], found["fresh"])[0] < 0.3
    assert agreement(found[2], found[1])[0] < 0.3
    assert found["fresh"][-1] != found[1][-1] != found[2][-1]


@pytest.mark.vllm
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_logprobs_are_those_of_the_distribution_sampled_from(smollm, temperature, record_property):
    set_adapter(smollm.model, 3)
    smollm.engine.sync()
    differences = []
    for prompt, made in zip(smollm.prompts, sampled(smollm, temperature, range(16)), strict=True):
        assert len(made.logprobs) == len(made.tokens)
        truth = logprobs_by_transformers(smollm, prompt, made.tokens, temperature or 1)
        differences.append((truth - torch.tensor(made.logprobs)).abs())
    mean, worst = torch.cat(differences).mean().item(), torch.cat(differences).max().item()
    print(f"temperature {temperature}: mean |Δlogprob| {mean:.2e}, largest {worst:.2e}")
    assert mean < 1e-4 and worst < 1e-2


@pytest.mark.vllm
@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}], ids=["top_k", "top_p"])
def test_of_one_allowed_token_the_likeliest_is_certain(smollm, options):
    made = sampled(smollm, 1.0, range(16), **options)
    assert [completion.tokens for completion in made] == greedy(smollm)
    assert all(logprob == 0 for completion in made for logprob in completion.logprobs)


@pytest.mark.vllm
def test_a_stop_token_ends_a_completion_and_belongs_to_it(smollm):
    set_adapter(smollm.model, 4)
    for parameter in smollm.model.parameters():
        parameter.data.mul_(0 if parameter.requires_grad else 1)  # what it says makes sense
    smollm.engine.sync()
    own, recipe = smollm.tokenizer.eos_token_id, smollm.tokenizer.encode(":")[0]
    made = sampled(smollm, 0.0, range(16))
    assert {c.tokens[-1] for c in made if c.finished} == {own, recipe}
    for completion in made:
        assert not {own, recipe} & set(completion.tokens[:-1])
        assert completion.finished or len(completion.tokens) == 32
    assert not all(completion.finished for completion in made)


@pytest.mark.vllm
def test_a_completion_depends_on_its_seed(smollm):
    prompt = smollm.prompts[4]
    sampling = Sampling(24, 1.0)

    def tokens(seeds):
        made = smollm.engine.generate([Request(prompt, seed) for seed in seeds], sampling)
        return [completion.tokens for completion in made]

    first = tokens([1, 2, 3, 4])
    assert len(set(map(tuple, first))) == 4
    assert tokens([1, 2, 3, 4]) == first
    assert tokens([2**32 - 1, 3]) == [tokens([2**32 - 1])[0], first[2]]


@pytest.mark.vllm
def test_what_does_not_fit_is_refused(smollm):
    request = Request([5] * MAX_MODEL_LEN, 0)
    with pytest.raises(UserError, match=r"320 tokens.*prompts.max_prompt_tokens"):
        smollm.engine.generate([request], Sampling(1))
    assert smollm.engine.generate([], Sampling(1)) == []
    fits = Request(request.prompt[1:], 0)
    (completion,) = smollm.engine.generate([fits], Sampling(1))
    assert len(completion.tokens) == 1 and math.isfinite(completion.logprobs[0])
