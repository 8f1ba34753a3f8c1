"""Two real vLLM servers on the CPU: `make vllm`, then `make test-vllm`."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from threading import Timer
from types import SimpleNamespace

import pytest
import torch

from opsd_train.config.errors import UserError
from opsd_train.config.method_schema import TeacherConfig
from opsd_train.config.schema import RolloutConfig
from opsd_train.data.batches import Sample
from opsd_train.data.problems import Problem
from opsd_train.methods.served_teacher import ServedTeacher
from opsd_train.model.policy import Policy, load_model, load_tokenizer, unpack
from opsd_train.rollout import Completion, Request, Sampling
from opsd_train.rollout.agreement import logprob_gap
from opsd_train.rollout.transformers_engine import TransformersEngine
from opsd_train.rollout.vllm_server_engine import VllmServerEngine
from opsd_train.serving.vllm_client import ServerLost, VllmServer
from tests.helpers.pair import alone
from tests.helpers.smollm import ALL_LINEAR, MODEL, adapted, prompts, set_adapter

pytestmark = pytest.mark.vllm
MAX_MODEL_LEN = 320
GREEDY = Sampling(32)
SAMPLED = Sampling(64, temperature=1.0)
START = 900  # seconds for two servers on two busy cores


class Process:
    """A server as docs/vllm.md starts it."""

    def __init__(self, model: Path, folder: Path, core: int, adapters: bool = True) -> None:
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}", folder / f"server-{core}.log"
        own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
        own |= {"VLLM_CPU_OMP_THREADS_BIND": str(core), "VLLM_LOGGING_LEVEL": "WARNING"}
        options = f"""--model {model} --host 127.0.0.1 --port {port} --dtype float32 --enforce-eager
            --max-model-len {MAX_MODEL_LEN} --max-logprobs 64""".split()
        if adapters:
            more = "--enable-lora --max-lora-rank 8 --logprobs-mode processed_logprobs"
            options += more.split()
        with self.log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options],
                env=os.environ | own,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def wait(self) -> None:
        """Until it answers."""
        for _ in range(START):
            try:
                VllmServer(self.url).check_health(1.0)
                return
            except ServerLost:
                assert self._process.poll() is None, self.log.read_text()[-3000:]
                time.sleep(1)
        raise AssertionError(f"{self.url} does not start: {self.log.read_text()[-3000:]}")

    def signal(self, number: int) -> None:
        """To the server itself; its engine is a process of its own."""
        os.kill(self._process.pid, number)

    def end(self) -> None:
        """All its processes."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[SimpleNamespace]:
    """Model, prompts and an engine with two servers, which take minutes to start."""
    pytest.importorskip("vllm", reason="make vllm")
    folder = tmp_path_factory.mktemp("servers")
    tokenizer = load_tokenizer(MODEL)
    unpack(MODEL, tokenizer, torch.float32, folder / "model")
    cores = max(os.cpu_count() or 1, 1)
    processes = [Process(folder / "model", folder, number % cores) for number in range(2)]
    try:
        for process in processes:
            process.wait()
        model = adapted(load_model(MODEL, tokenizer, torch.float32), target_modules=ALL_LINEAR)
        policy = Policy(model, tokenizer.pad_token_id, torch.float32)
        settings = RolloutConfig(
            engine="vllm-server",
            servers=[process.url for process in processes],
            max_new_tokens=64,
            batch_tokens=8192,
            stop_tokens=[":"],
        )
        engine = VllmServerEngine(
            policy,
            tokenizer,
            settings,
            model_name=str(folder / "model"),
            scratch=folder,
            max_model_len=MAX_MODEL_LEN,
            context=alone(),
        )
        yield SimpleNamespace(
            policy=policy,
            engine=engine,
            own=TransformersEngine(policy, tokenizer, settings),
            prompts=prompts(tokenizer),
            processes=processes,
        )
    finally:
        for process in processes:
            process.end()


def requests(served, seed: int = 0) -> list[Request]:
    return [Request(prompt, seed + index) for index, prompt in enumerate(served.prompts)]


def tokens(completions: list[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


def test_greedy_tokens_are_those_of_transformers_before_and_after_a_sync(served):
    fresh = served.engine.generate(requests(served), GREEDY)
    wanted = served.own.generate(requests(served), GREEDY)
    found = {"fresh": (tokens(fresh), tokens(wanted))}
    assert [c.finished for c in fresh] == [c.finished for c in wanted]
    assert {c.finished for c in fresh} == {True, False}
    set_adapter(served.policy.model, 1)
    assert tokens(served.engine.generate(requests(served), GREEDY)) == tokens(fresh)  # not before
    for seed in (1, 2):
        set_adapter(served.policy.model, seed)
        served.engine.sync()
        made = served.engine.generate(requests(served), GREEDY)
        found[f"adapter {seed}"] = (
            tokens(made),
            tokens(served.own.generate(requests(served), GREEDY)),
        )
    for name, (ours, theirs) in found.items():
        same = sum(a == b for a, b in zip(ours, theirs, strict=True))
        print(f"{name}: {same} of {len(theirs)} completions are those of transformers")
        assert ours == theirs
    assert found["fresh"][0] != found["adapter 1"][0] != found["adapter 2"][0]


def test_each_server_has_the_newest_adapter_only(served):
    for process in served.processes:
        models = VllmServer(process.url)._ask("GET", "/v1/models", None, 8.0).decode()
        assert models.count('"parent":"') == 1 and served.engine._adapter in models


@pytest.mark.parametrize(
    "sampling",
    [Sampling(32, 0.7), Sampling(32, 1.2, top_p=0.9), Sampling(32, 1.5, top_k=20), GREEDY],
    ids=["temperature", "top_p", "top_k", "greedy"],
)
def test_logprobs_are_those_of_the_distribution_sampled_from(served, sampling):
    made = served.engine.generate(requests(served), sampling)
    truth = sampling if sampling.temperature else Sampling(32, 1.0)
    gaps = [
        logprob_gap(served.policy, request.prompt, completion, truth)
        for request, completion in zip(requests(served), made, strict=True)
    ]
    print(f"{sampling}: {sum(gaps) / len(gaps):.1e} nats a token apart, at most {max(gaps):.1e}")
    assert max(gaps) < 1e-3
    assert all(len(completion.logprobs) == len(completion.tokens) for completion in made)


def test_any_server_gives_the_tokens_of_a_seed(served):
    engine = served.engine
    complete = partial(engine._complete, sampling=SAMPLED, adapter=engine._adapter)

    def ask(server: VllmServer) -> list[list[int]]:
        return [complete(server, request).tokens for request in requests(served)[:4]]

    one, two = engine._servers.each(ask).values()
    assert one == two and len(set(map(tuple, one))) == 4
    assert one == tokens(engine.generate(requests(served), SAMPLED))[:4]
    assert one != tokens(engine.generate(requests(served, seed=50), SAMPLED))[:4]


def test_kill_9_in_the_middle_of_a_rollout_loses_nothing(served, capsys):
    start = time.perf_counter()
    undisturbed = served.engine.generate(requests(served), SAMPLED)
    seconds = time.perf_counter() - start
    Timer(seconds / 3, served.processes[1].signal, [signal.SIGKILL]).start()
    made = served.engine.generate(requests(served), SAMPLED)
    (line,) = capsys.readouterr().out.splitlines()
    print(f"{seconds:.1f} s undisturbed; {line}")
    assert tokens(made) == tokens(undisturbed)
    assert line.startswith(f"warning: {served.processes[1].url} is gone: connection lost; its ")
    assert line.endswith(" go to the others")
    for ours, theirs in zip(made, undisturbed, strict=True):
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-3)
    served.engine.sync()
    assert tokens(served.engine.generate(requests(served), SAMPLED)) != tokens([])


def test_a_stopped_server_is_noticed_within_ten_seconds(served):
    served.processes[0].signal(signal.SIGSTOP)
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"no vLLM server is left .*no answer for 8 s") as error:
        served.engine.generate(requests(served), SAMPLED)
    seconds = time.perf_counter() - start
    print(f"noticed after {seconds:.1f} s: {error.value}")
    assert seconds < 10.5 and "\n" not in str(error.value)


def test_a_teacher_behind_a_server(tmp_path):
    """Its most likely tokens, beside the full logits of transformers."""
    pytest.importorskip("vllm", reason="make vllm")
    tokenizer = load_tokenizer(MODEL)
    model = load_model(MODEL, tokenizer, torch.float32).eval()
    policy = Policy(model, tokenizer.pad_token_id, torch.float32)
    unpack(MODEL, tokenizer, torch.float32, tmp_path / "model")
    questions = prompts(tokenizer)
    completions = [prompt[4:24] for prompt in reversed(questions)]  # some text or other
    problem = Problem(id="p", question="", answer="", solution="")
    samples = [
        Sample(problem, prompt, None, completion)
        for prompt, completion in zip(questions, completions, strict=True)
    ]
    process = Process(tmp_path / "model", tmp_path, 0, adapters=False)
    try:
        process.wait()
        rows = model.get_input_embeddings().num_embeddings
        teacher = ServedTeacher(
            TeacherConfig(teacher=str(tmp_path / "model"), servers=[process.url]),
            64,
            vocab_size=rows,
            student_vocab=rows,
            device=torch.device("cpu"),
            say=print,
        )
        found = teacher.distribution(samples)
    finally:
        process.end()

    def log_probs(hidden, head, _):
        return (hidden @ head.weight.T).log_softmax(-1)

    with torch.no_grad():
        wanted = policy.run(questions, completions, log_probs)
    assert found.ids.shape == (sum(map(len, completions)), 64)
    at_ids = (found.logprob - wanted.gather(-1, found.ids)).abs().max().item()
    in_order = (found.logprob - wanted.topk(64).values).abs().max().item()
    print(f"{len(found.ids)} tokens: log-probabilities {max(at_ids, in_order):.1e} nats apart")
    assert max(at_ids, in_order) < 1e-3
