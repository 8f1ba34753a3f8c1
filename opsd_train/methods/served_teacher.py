"""A teacher behind vLLM servers: its most likely tokens, from the log-probabilities of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import torch
from torch import Tensor

from opsd_train.config.errors import UserError
from opsd_train.config.method_schema import TeacherConfig
from opsd_train.data.batches import Sample
from opsd_train.methods.distributions import TopTokens
from opsd_train.serving.vllm_client import Refused, ServerLost, VllmServer
from opsd_train.serving.vllm_servers import VllmServers

_CLAMPED = -9999.0  # how a server writes -inf, which JSON lacks


class ServedTeacher:
    """The model of `settings.servers`, asked for the `top_k` most likely tokens at each token.

    A server reads prompt and completion as token ids and returns log-probabilities at temperature
    1, of its whole vocabulary of `vocab_size` entries; the student has `student_vocab`. Raises
    UserError for a server that does not answer, serves another model or gives fewer tokens.
    """

    sharded = False

    def __init__(
        self,
        settings: TeacherConfig,
        top_k: int,
        *,
        vocab_size: int,
        student_vocab: int,
        device: torch.device,
        say: Any,  # prints a line
    ) -> None:
        self.vocab_size, self._student_vocab = vocab_size, student_vocab
        self._top_k, self._device = min(top_k, vocab_size), device
        self._prompt: Literal["student", "teacher"] = settings.prompt
        self._servers = VllmServers(settings.servers, say)
        self._names = {server: self._checked(server, settings) for server in self._servers.all}

    def distribution(self, samples: Sequence[Sample]) -> TopTokens:
        """One request a sample, spread over the servers."""
        rows = self._servers.spread(samples, self._ask)
        ids, logprobs = (torch.cat(parts).to(self._device) for parts in zip(*rows, strict=True))
        largest = int(ids.max())
        if largest >= self._student_vocab:
            raise UserError(
                f"the served teacher predicts token {largest}, and the student's vocabulary has "
                f"{self._student_vocab} entries: lower loss.top_k, or choose another teacher"
            )
        return TopTokens(ids, logprobs, min(self.vocab_size, self._student_vocab))

    def _ask(self, server: VllmServer, sample: Sample) -> tuple[Tensor, Tensor]:
        """Ids and log-probabilities (T, k) at the sample's completion."""
        prompt = sample.student_prompt if self._prompt == "student" else sample.teacher_prompt
        assert prompt is not None  # the method asks for the teacher's prompt
        return self._read(server, self._names[server], prompt, sample.completion)

    def _read(
        self, server: VllmServer, name: str, prompt: list[int], completion: list[int]
    ) -> tuple[Tensor, Tensor]:
        try:
            choice = server.complete(
                model=name, prompt=[*prompt, *completion], max_tokens=1, temperature=0.0,
                prompt_logprobs=self._top_k,
            )  # fmt: skip
        except Refused as error:
            if "logprobs" not in error.message:
                raise
            raise UserError(
                f"{server.url} gives no {self._top_k} log-probabilities a token ({error.message}): "
                f"start it with --max-logprobs {self._top_k}, or lower loss.top_k"
            ) from None
        rows = [self._largest(entries) for entries in choice["prompt_logprobs"][len(prompt) :]]
        found = torch.tensor(rows, dtype=torch.float64)  # ids are exact in it
        return found[..., 0].long(), found[..., 1].float()

    def _largest(self, entries: dict[str, dict[str, Any]]) -> list[tuple[int, float]]:
        """The largest k; a server adds the token that stands there, if it is not among them."""
        pairs = [(int(token), float(entry["logprob"])) for token, entry in entries.items()]
        pairs.sort(key=lambda pair: (-pair[1], pair[0]))
        return [
            (token, logprob if logprob > _CLAMPED else -torch.inf)
            for token, logprob in pairs[: self._top_k]
        ]

    def _checked(self, server: VllmServer, settings: TeacherConfig) -> str:
        """The name by which requests call the server's model."""
        try:
            model = server.model()
            if PurePosixPath(model.weights).name != PurePosixPath(settings.teacher).name:
                raise UserError(
                    f"{server.url} serves {model.weights}, and distill.teacher is "
                    f"{settings.teacher}: name what it serves, or start it with that model"
                )
            ids, _ = self._read(server, model.name, [0], [0])
        except ServerLost as error:
            raise UserError(
                f"{server.url} does not answer ({error}); start it there: vllm serve "
                f"{settings.teacher} --max-logprobs {self._top_k}"
            ) from None
        if ids.shape[-1] < self._top_k:
            raise UserError(
                f"{server.url} gives {ids.shape[-1]} log-probabilities a token: start it with "
                f"--max-logprobs {self._top_k}, or lower loss.top_k"
            )
        return model.name
