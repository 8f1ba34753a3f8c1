"""Rollouts by vLLM servers, on other GPUs or machines, with our adapter.

Rank 0 writes the adapter to a folder that the servers see too, and has them load it under a new
name at each sync. Each rank then spreads its own requests over all servers.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from opsd_kernels.integrations.heads import lm_head, probe_tokens
from opsd_train.config.engine_schema import RolloutConfig
from opsd_train.config.errors import UserError
from opsd_train.distributed.context import DistributedContext
from opsd_train.model.policy import Policy
from opsd_train.rollout.adapter_folders import AdapterFolders
from opsd_train.rollout.agreement import ROUNDING, logprob_gap
from opsd_train.rollout.request import Completion, Request, Sampling
from opsd_train.rollout.stop import stop_ids
from opsd_train.rollout.vllm_model import check_lengths, sampling_options
from opsd_train.serving.vllm_client import Refused, ServerLost, VllmServer
from opsd_train.serving.vllm_servers import VllmServers

# The model's own defaults, which a server uses for what a request does not name.
_NO_PENALTIES = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
_PROBE = Sampling(max_new_tokens=16, temperature=1.0)
_RETURN = 1.0  # seconds for a lost server to say that it is back


@dataclass(frozen=True)
class _Probe:
    """What a new server answered."""

    weights: str  # the folder or hub name of its model
    completion: Completion  # of the probe


@dataclass(frozen=True)
class _Handover:
    """What rank 0 tells the others after a sync."""

    adapter: str  # its name at the servers
    lost: dict[str, str | None]  # of each server's URL, why
    probes: dict[str, _Probe]  # of the new servers' URLs


class VllmServerEngine:
    """The servers of `config.servers`, with the adapter of the policy in training.

    `model_name`: of the recipe. `scratch`: a folder that all servers see under the same path.
    `max_model_len`: tokens of a prompt and its completion. Every rank makes every call. Raises
    UserError without an adapter, and for a server that does not answer, serves another model or
    lacks an option.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        config: RolloutConfig,
        *,
        model_name: str,
        scratch: Path,
        max_model_len: int,
        context: DistributedContext,
    ) -> None:
        self._adapters = AdapterFolders(policy.model, scratch, config.engine, context.is_main)
        self._policy, self._context, self._model_name = policy, context, model_name
        self._max_model_len = max_model_len
        self._stop_ids = stop_ids(tokenizer, policy.core.generation_config, config)
        self._probe = Request(probe_tokens(lm_head(policy.core), tokenizer.pad_token_id), seed=0)
        self._servers = VllmServers(config.servers, self._say)
        self._run = uuid.uuid4().hex[:8]  # a server may have adapters of other runs
        self._adapter = ""  # its name at the servers
        # On rank 0: the adapters that a server has, and the servers that have passed the checks.
        self._loaded: dict[VllmServer, list[str]] = {server: [] for server in self._servers.all}
        self._checked: set[VllmServer] = set()
        self._started = False  # from then on a server with a fault is left out
        self._thread = ThreadPoolExecutor(1)
        self._generating: Future[tuple[list[Completion], float]] | None = None  # in that thread
        self.sync()
        self._started = True

    def sync(self) -> None:
        """Hand the adapter over as it is now, and use the servers that are back.

        It first waits for what `start` began, which needs the adapter that is unloaded here.
        """
        if self._generating is not None:
            wait([self._generating])
        folder, number = self._adapters.write()
        lost = self._context.all_gather({server.url: server.lost for server in self._servers.all})
        outcome: _Handover | UserError | None = None
        if self._context.is_main:
            try:
                outcome = self._hand_over(folder, f"opsd-{self._run}-{number}", lost)
            except UserError as error:
                outcome = UserError(str(error))  # a subclass may not be pickled
        outcome = self._context.broadcast(outcome)
        if isinstance(outcome, UserError):
            raise outcome
        assert outcome is not None
        self._adapter = outcome.adapter
        for server in self._servers.all:
            server.lost = outcome.lost[server.url]
            if server.url in outcome.probes:
                self._check_weights(server, outcome.probes[server.url])
                self._servers.report_back(server)
        self._servers.refuse_none()
        self._adapters.remove_old()

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in their order, all with the adapter of the last sync.

        Raises UserError if no server is left, or if a request does not fit into max_model_len.
        """
        check_lengths(requests, sampling, self._max_model_len)
        complete = partial(self._complete, sampling=sampling, adapter=self._adapter)
        return self._servers.spread(requests, complete)

    def start(
        self, requests: Sequence[Request], sampling: Sampling
    ) -> Future[tuple[list[Completion], float]]:
        """`generate` in a thread, with the seconds it took; call it after a sync."""

        def timed() -> tuple[list[Completion], float]:
            start = time.perf_counter()
            return self.generate(requests, sampling), time.perf_counter() - start

        self._generating = self._thread.submit(timed)
        return self._generating

    def close(self) -> None:
        """End what `start` began; the engine generates nothing more."""
        self._servers.end()
        self._thread.shutdown()

    def _complete(
        self, server: VllmServer, request: Request, sampling: Sampling, adapter: str
    ) -> Completion:
        options = sampling_options(request, sampling, self._stop_ids) | _NO_PENALTIES
        try:
            choice = server.complete(model=adapter, prompt=request.prompt, **options)
        except Refused as error:
            if error.status == 404:
                raise ServerLost("it was started again, without the adapter") from None
            raise
        reason = choice["finish_reason"]
        if reason not in ("stop", "length"):  # "abort": it is shutting down
            raise ServerLost(f"it ended a request with {reason!r}")
        logprobs = choice["logprobs"]["token_logprobs"]
        return Completion(choice["token_ids"], logprobs, finished=reason == "stop")

    def _hand_over(
        self, folder: Path, adapter: str, lost: Sequence[dict[str, str | None]]
    ) -> _Handover:
        """On rank 0: have every server load the adapter. `lost`: of each rank."""
        for server in self._servers.all:
            reason = next((part[server.url] for part in lost if part[server.url]), None)
            if reason is not None:
                server.lose(reason)
                self._servers.report(server, 0)
                self._try_again(server)
        probes = self._servers.each(partial(self._load, folder=folder, adapter=adapter))
        return _Handover(
            adapter,
            {server.url: server.lost for server in self._servers.all},
            {server.url: probe for server, probe in probes.items() if probe is not None},
        )

    def _try_again(self, server: VllmServer) -> None:
        """Use a lost server if it answers; it is checked anew."""
        with suppress(ServerLost, Refused):
            server.check_health(_RETURN)
            server.lost = None
            self._checked.discard(server)

    def _load(self, server: VllmServer, folder: Path, adapter: str) -> _Probe | None:
        """Have a server load the adapter and forget older ones; a probe if it is new."""
        try:
            return self._checked_load(server, folder, adapter)
        except ServerLost as error:
            if self._started:
                raise
            raise UserError(
                f"{server.url} does not answer ({error}); start it there: {self._command()}"
            ) from None
        except UserError as error:
            if self._started:
                raise ServerLost(str(error)) from None
            raise

    def _checked_load(self, server: VllmServer, folder: Path, adapter: str) -> _Probe | None:
        new, weights = server not in self._checked, ""
        if new:
            served = server.model()
            weights = served.weights
            if served.max_model_len < self._max_model_len:
                raise UserError(
                    f"{server.url} takes {served.max_model_len} tokens, and prompts and "
                    f"completions have up to {self._max_model_len}: start it with "
                    f"--max-model-len {self._max_model_len}"
                )
        try:
            server.load_adapter(adapter, str(folder))
        except Refused as error:
            raise UserError(self._why_not_loaded(server, error, folder)) from None
        while self._loaded[server]:
            server.unload_adapter(self._loaded[server].pop())
        self._loaded[server].append(adapter)
        if not new:
            return None
        self._check_logprobs(server, adapter)
        self._checked.add(server)
        return _Probe(weights, self._complete(server, self._probe, _PROBE, adapter))

    def _why_not_loaded(self, server: VllmServer, error: Refused, folder: Path) -> str:
        if error.message == "Not Found":  # there is no such path
            fix = "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment"
            return f"{server.url} loads no adapters: {fix}"
        if error.status == 404:
            return (
                f"{server.url} does not see {folder}: it must be there on the server's machine "
                "under the same path; choose another output_dir"
            )
        options = f"--enable-lora --max-lora-rank {self._adapters.rank}"
        return f"{server.url} does not load the adapter ({error.message}): it needs {options}"

    def _check_logprobs(self, server: VllmServer, adapter: str) -> None:
        """Of one allowed token the log-probability is 0, if it is of what was sampled from."""
        only = Sampling(max_new_tokens=4, temperature=1.0, top_k=1)
        if any(self._complete(server, self._probe, only, adapter).logprobs):
            raise UserError(
                f"{server.url} returns log-probabilities of another distribution than it samples "
                "from: start it with --logprobs-mode processed_logprobs"
            )

    def _check_weights(self, server: VllmServer, probe: _Probe) -> None:
        """Every rank calls it, since the forward pass gathers sharded weights."""
        gap = logprob_gap(self._policy, self._probe.prompt, probe.completion, _PROBE)
        if gap <= ROUNDING[self._policy.dtype]:
            return
        fault = (
            f"it serves {probe.weights}, whose log-probabilities are not those of "
            f"model.name_or_path={self._model_name}"
        )
        if not self._started:
            raise UserError(f"{server.url}: {fault}; start it with that model")
        server.lose(fault)
        self._servers.report(server, 0)

    def _command(self) -> str:
        return (
            f"VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve {self._model_name} --enable-lora "
            f"--max-lora-rank {self._adapters.rank} --max-model-len {self._max_model_len} "
            "--logprobs-mode processed_logprobs"
        )

    def _say(self, line: str) -> None:
        if self._context.is_main:
            print(f"warning: {line}", flush=True)
