"""Sections of the engine that generates: the keys of rollouts and evaluations, and of rollouts."""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from opsd_train.config.section import Count, NonNegativeReal, Positive, PositiveReal, section


@section
class EngineConfig:
    """The engine and its sampling: the keys that rollouts and evaluations share."""

    engine: Literal["transformers", "vllm", "vllm-server"] = "transformers"
    """Engine that generates the completions."""
    max_new_tokens: Positive
    """Longest completion, in tokens."""
    temperature: NonNegativeReal = 1.0
    """Sampling temperature; 0: greedy decoding."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus sampling: the smallest set of tokens with this probability; 1: all tokens."""
    top_k: Count = 0
    """Sample from this many most likely tokens; 0: all tokens."""
    stop_tokens: list[str] = Field(default_factory=list)
    """Tokens that end a completion, besides the model's own end tokens."""
    batch_tokens: Positive
    """engine=transformers: largest batch, in tokens of prompts plus max_new_tokens for each."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)]
    """engine=vllm: fraction of the GPU's memory that vLLM may take."""


@section
class RolloutConfig(EngineConfig):
    """Generation of completions to train on."""

    samples_per_prompt: Positive = 1
    """Completions per problem and step."""
    temperature: PositiveReal = 1.0
    """Sampling temperature."""
    vllm_memory: Annotated[float, Field(gt=0, lt=1)] = 0.3
    servers: list[str] = Field(default_factory=list)
    """engine=vllm-server: URLs of the vLLM servers, such as http://host:8000."""
    ahead: Literal[0, 1] = 0
    """engine=vllm-server: 1 generates the next step's samples while a step trains; they are then of
    the weights one step earlier. 0: each step waits for its own."""

    @model_validator(mode="after")
    def _fits_together(self) -> "RolloutConfig":
        for reason in self._conflicts():
            raise ValueError(reason)
        return self

    def _conflicts(self) -> Iterator[str]:
        if self.engine == "vllm-server" and not self.servers:
            yield "rollout.engine=vllm-server needs rollout.servers, such as [http://host:8000]"
        if self.engine != "vllm-server" and self.servers:
            yield f"rollout.servers needs rollout.engine=vllm-server; this recipe has {self.engine}"
        if self.ahead and self.engine != "vllm-server":
            yield (
                f"rollout.ahead=1 needs rollout.engine=vllm-server, which generates while a step "
                f"trains; this recipe has {self.engine}: set rollout.ahead=0"
            )
        yield from server_faults("rollout.servers", self.servers)


def server_faults(key: str, urls: Sequence[str]) -> Iterator[str]:
    """What is wrong with the URLs of servers."""
    for url in urls:
        if not _is_server(url):
            yield f"{key}: {url!r} is not of the form http://host:8000"
    if len(set(urls)) < len(urls):
        yield f"{key} names a server twice"


def _is_server(url: str) -> bool:
    """Whether this is scheme, host and perhaps port, and nothing else."""
    try:
        parts = urlsplit(url)
        return url == f"{parts.scheme}://{parts.netloc}" and (
            parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        )
    except ValueError:  # a port that is no number
        return False
