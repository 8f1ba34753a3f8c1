"""A server in a thread that speaks vLLM's HTTP protocol; what it answers is a function."""

from __future__ import annotations

import copy
import json
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Lock, Thread
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from safetensors.torch import load_file

from opsd_train.config.schema import RolloutConfig
from opsd_train.model.policy import Policy
from opsd_train.rollout import Completion, Request, Sampling
from opsd_train.rollout.transformers_engine import TransformersEngine
from tests.helpers.tiny import make_model, make_tokenizer

Answer = Callable[[dict[str, Any], str | None], Completion]
"""From a request to /v1/completions and the folder of its adapter to a completion."""


def made_up(body: dict[str, Any], _: str | None = None) -> Completion:
    """Tokens that follow from prompt and seed."""
    numbers = random.Random(f"{body['prompt']} {body.get('seed')}")
    tokens = [numbers.randrange(100) for _ in range(body["max_tokens"])]
    return Completion(tokens, [-numbers.random() for _ in tokens], finished=False)


# Models are computed by a few threads.
_ONE_AT_A_TIME = Lock()


class TinyModel:
    """Answers as the transformers engine does, with a model and the adapter of each request.

    Threads of the server draw nothing from torch's global generator, which a trainer may be using,
    and change nothing that its thread sees: peft's low_cpu_mem_usage would put layers that another
    thread makes on the meta device.
    """

    def __init__(self, make_model: Callable[[], Any], tokenizer: Any, config: Any) -> None:
        self._model, self._tokenizer, self._config = make_model(), tokenizer, config
        self._engines: dict[str, TransformersEngine] = {}

    def __call__(self, body: dict[str, Any], folder: str | None) -> Completion:
        assert folder is not None
        top_k = max(body["top_k"], 0)
        sampling = Sampling(body["max_tokens"], body["temperature"], body["top_p"], top_k)
        with _ONE_AT_A_TIME:
            if folder not in self._engines:
                self._engines[folder] = self._engine(folder)
            engine = self._engines[folder]
            engine.stop = frozenset(body["stop_token_ids"])
            (made,) = engine.generate([Request(body["prompt"], body["seed"])], sampling)
        return made

    def _engine(self, folder: str) -> TransformersEngine:
        base = copy.deepcopy(self._model)
        with torch.device("meta"):  # of this thread alone
            model = get_peft_model(base, LoraConfig.from_pretrained(folder))
        weights = load_file(Path(folder) / "adapter_model.safetensors")
        set_peft_model_state_dict(model, weights, low_cpu_mem_usage=True)
        policy = Policy(model, self._tokenizer.pad_token_id, torch.float32)
        return TransformersEngine(policy, self._tokenizer, self._config)


def tiny() -> TinyModel:
    """The model of tests/helpers/tiny.py."""
    tokenizer = make_tokenizer()
    tokenizer.eos_token = tokenizer.pad_token = "<|end|>"
    return TinyModel(make_model, tokenizer, RolloutConfig(max_new_tokens=12, batch_tokens=1000))


class Predictions:
    """The log-probabilities of a prompt's tokens under a model, as vLLM's `prompt_logprobs`."""

    def __init__(self, model: Any) -> None:
        self._model = model.eval()

    @torch.no_grad()
    def __call__(self, prompt: list[int], count: int) -> list[dict[str, Any] | None]:
        with _ONE_AT_A_TIME:
            logits = self._model(input_ids=torch.tensor([prompt])).logits[0]
        rows: list[dict[str, Any] | None] = [None]  # nothing predicts the first token
        for token, row in zip(prompt[1:], logits.float().log_softmax(-1), strict=False):
            largest = row.topk(min(count, len(row)))
            found = dict(zip(largest.indices.tolist(), largest.values.tolist(), strict=True))
            found = {token: row[token].item(), **found}
            rows.append({str(i): {"logprob": max(x, -9999.0)} for i, x in found.items()})
        return rows


class VllmDouble:
    """A server with its options, and a record of what it was asked."""

    def __init__(self, answer: Answer = made_up, **options: Any) -> None:
        self.answer = answer
        self.max_model_len = options.get("max_model_len", 4096)
        self.weights = options.get("weights", "tiny")
        self.takes_adapters = options.get("takes_adapters", True)  # at run time
        self.max_rank = options.get("max_rank", 64)
        self.sees_folders = options.get("sees_folders", True)
        self.processed = options.get("processed", True)
        self.predict: Callable[[list[int], int], list[Any]] | None = options.get("predict")
        self.max_logprobs = options.get("max_logprobs", 10**6)
        self.ends_with: str | None = None  # instead of the true finish_reason
        self.bodies: list[dict[str, Any]] = []  # of completions that were answered
        self.adapters: dict[str, str] = {}  # their folders by name
        self.events: list[str] = []  # "load NAME", "unload NAME"
        self.most_at_once = 0
        self.held = Event()  # set: completions wait
        self.hung = Event()  # set: nothing is answered
        self._at_once, self._lock = 0, Lock()
        self._start(0)
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def kill(self) -> None:
        """As kill -9 does: connections end, and new ones are refused."""
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._http.connections):
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def restart(self) -> None:
        """At the same port, without adapters."""
        self.adapters.clear()
        self.held.clear()
        self._start(self._http.server_address[1])

    def wait_for(self, count: int) -> None:
        """Until so many completions are in flight."""
        for _ in range(1000):
            if self._at_once >= count:
                return
            Event().wait(0.01)
        raise AssertionError(f"{self._at_once} in flight, not {count}")

    def hold_until(self, count: int) -> None:
        """Completions wait until so many are in flight."""
        self.held.set()
        Thread(target=lambda: (self.wait_for(count), self.held.clear()), daemon=True).start()

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            while self.held.is_set() or self.hung.is_set():
                Event().wait(0.01)
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def _start(self, port: int) -> None:
        self._http = _Http(("127.0.0.1", port), _Handler)
        self._http.double = self
        Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024
    double: VllmDouble

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.connections: set[socket.socket] = set()

    def process_request(self, request: Any, client_address: Any) -> None:
        self.connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.connections.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: _Http

    def do_GET(self) -> None:
        double = self.server.double
        while double.hung.is_set():
            Event().wait(0.01)
        if self.path == "/health":
            self._send(200, {})
        else:
            base = {"id": "base", "root": double.weights, "parent": None}
            base["max_model_len"] = double.max_model_len
            adapters = [{"id": n, "root": p, "parent": "base"} for n, p in double.adapters.items()]
            self._send(200, {"data": [base, *adapters]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/completions":
            with self.server.double.in_flight():
                self._complete(body)
        elif self.path == "/v1/load_lora_adapter":
            self._load(body)
        else:
            self._unload(body)

    def _complete(self, body: dict[str, Any]) -> None:
        double = self.server.double
        if body["model"] not in {"base", *double.adapters}:
            self._send_error(404, f"The model `{body['model']}` does not exist.")
            return
        if len(body["prompt"]) + body["max_tokens"] > double.max_model_len:
            self._send_error(400, "maximum context length")
            return
        made = double.answer(body, double.adapters.get(body["model"]))
        reason = double.ends_with or ("stop" if made.finished else "length")
        logprobs = made.logprobs
        if body.get("top_k") == 1:
            logprobs = [0.0 if double.processed else -0.25 for _ in made.tokens]
        choice = {"token_ids": made.tokens, "finish_reason": reason}
        count = body.get("prompt_logprobs")
        if count is not None and count > double.max_logprobs:
            message = f"Requested prompt logprobs of {count}, which is greater than max allowed"
            self._send_error(400, message)
            return
        if count is not None and double.predict is not None:
            choice["prompt_logprobs"] = double.predict(body["prompt"], count)
        double.bodies.append(body)
        self._send(200, {"choices": [choice | {"logprobs": {"token_logprobs": logprobs}}]})

    def _load(self, body: dict[str, Any]) -> None:
        double, name, folder = self.server.double, body["lora_name"], body["lora_path"]
        settings = Path(folder) / "adapter_config.json"
        if not double.takes_adapters:
            self._send(404, {"detail": "Not Found"})
        elif not double.sees_folders or not settings.is_file():
            self._send_error(404, f"No adapter found for {name} at {folder}")
        elif json.loads(settings.read_text())["r"] > double.max_rank:
            self._send_error(500, f"LoRA rank is greater than max_lora_rank {double.max_rank}.")
        elif name in double.adapters:
            self._send_error(400, f"The lora adapter '{name}' has already been loaded.")
        else:
            double.adapters[name] = folder
            double.events.append(f"load {name}")
            self._send(200, "Success")

    def _unload(self, body: dict[str, Any]) -> None:
        double, name = self.server.double, body["lora_name"]
        if name not in double.adapters:
            self._send_error(404, f"The lora adapter '{name}' cannot be found.")
            return
        del double.adapters[name]
        double.events.append(f"unload {name}")
        self._send(200, "Success")

    def _send_error(self, status: int, message: str) -> None:
        self._send(status, {"error": {"message": message, "code": status}})

    def _send(self, status: int, answer: Any) -> None:
        text = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        """Nothing."""
