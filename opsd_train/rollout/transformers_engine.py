"""Batched generation with transformers, from the weights that are trained, on any device."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_kernels.integrations.heads import LmHead, lm_head, probe_tokens, rounding_tolerance
from opsd_train.config.engine_schema import EngineConfig
from opsd_train.config.errors import UserError
from opsd_train.data.batches import token_batches
from opsd_train.model.families import batching_tolerance
from opsd_train.model.policy import Policy
from opsd_train.rollout.context_checks import check_batch_tokens
from opsd_train.rollout.mixture import TeacherMixture
from opsd_train.rollout.request import Completion, Request, Sampling
from opsd_train.rollout.sequences import Sequences
from opsd_train.rollout.stop import stop_ids
from opsd_train.rollout.token_sampling import sampler, uniforms


class TransformersEngine:
    """Decodes left-padded batches of prompts of similar length, each within batch_tokens.

    Every rank makes every call, since sharded weights are gathered.
    """

    def __init__(
        self,
        policy: Policy,
        tokenizer: Any,
        config: EngineConfig,
        mixture: TeacherMixture | None = None,
    ) -> None:
        """`mixture`: a teacher that samples are drawn from too; None: the policy alone."""
        self.policy, self.config, self.dtype = policy, config, policy.dtype
        self._mixture = mixture
        # The core is called directly: FSDP2 hooks that call, and PeftModel.forward bypasses it.
        self.model, self.core = policy.model, policy.core
        self.pad_id = tokenizer.pad_token_id
        self.stop = frozenset(stop_ids(tokenizer, self.core.generation_config, config))

    def sync(self) -> None:
        """Nothing to do: the engine generates with the weights that are trained."""

    @torch.no_grad()
    def generate(self, requests: Sequence[Request], sampling: Sampling) -> list[Completion]:
        """One completion per request, in their order. Each depends on its prompt and seed only.

        Raises UserError if a prompt and max_new_tokens exceed rollout.batch_tokens.
        """
        completions: dict[int, Completion] = {}
        with self._ready():
            for batch in self._batches(requests, sampling.max_new_tokens):
                made = self._decode([requests[index] for index in batch], sampling)
                completions.update(zip(batch, made, strict=True))
        return [completions[index] for index in range(len(requests))]

    @torch.no_grad()
    def prove(self, name: str) -> None:
        """Compare `generate`'s logits, of padded and cached forwards, with those of plain forwards.

        `name`: the model's, for the error. Raises UserError where they differ by more than
        rounding: the model then needs another cache, or other positions.
        """
        with self._ready():
            head = lm_head(self.core)
            try:
                fault = self._fault(head)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # a model with another cache may fail in any way
                fault = " ".join(f"{type(error).__name__}: {error}".split())[:70]
        if fault:
            raise UserError(
                f"rollout.engine=transformers cannot sample from {name} "
                f"({type(self.core).__name__}): {fault}; try vllm"
            )

    def _fault(self, head: LmHead) -> str | None:
        """What is wrong with the logits of two prompts, one mostly padding, and of a next token."""
        tokens, device = probe_tokens(head, self.pad_id), head.weight.device
        lengths = [1, len(tokens) - 1]
        prompts = [tokens[:length] for length in lengths]
        sequences = self._sequences(prompts, 1)
        logits = sequences.logits
        sequences.extend(torch.tensor([tokens[length] for length in lengths], device=device))
        found = torch.cat([logits, sequences.logits])
        whole = self.core(input_ids=torch.tensor([tokens], device=device), use_cache=False).logits
        gap = _gap(found, whole[0, [length - 1 for length in lengths] + lengths].float())
        if not gap <= batching_tolerance(head):
            return f"logits change with its cache (gap {gap:.1g})"
        # Another padding token in the same shapes: a difference is not rounding.
        gap = _gap(Sequences(self.core, prompts, 1, tokens[0], self.dtype).logits, logits)
        if not gap <= rounding_tolerance(head):
            return f"its layers read the padding before a prompt (gap {gap:.1g})"
        return None

    @contextmanager
    def _ready(self) -> Iterator[None]:
        """The model ready to generate; its training mode comes back, also after an error."""
        training = self.model.training
        self.model.eval()
        # On a CPU, a product of a view of the last position copies the head for each sequence
        # (2.3 s for 16 of SmolLM2).
        head = self.core.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
        try:
            teachers = self._mixture.policy.generating() if self._mixture else nullcontext()
            with hook, self.policy.generating(), teachers:
                yield
        finally:
            self.model.train(training)

    def _batches(self, requests: Sequence[Request], max_new_tokens: int) -> Iterator[list[int]]:
        """Indices of requests, in ascending order of length; those of one prompt are neighbours."""
        # The teacher of a mixture may read a longer prompt.
        prompts = [max(r.prompt, r.teacher_prompt or [], key=len) for r in requests]
        budget = self.config.batch_tokens
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), prompts[i]))
        for index in order:
            check_batch_tokens("rollout.batch_tokens", budget, len(prompts[index]), max_new_tokens)
        return token_batches(((i, len(prompts[i]) + max_new_tokens) for i in order), budget)

    def _decode(self, requests: list[Request], sampling: Sampling) -> list[Completion]:
        student = self._sequences([r.prompt for r in requests], sampling.max_new_tokens)
        mixed = self._mixture if sampling.temperature > 0 else None
        teacher = mixed and mixed.sequences(requests, sampling.max_new_tokens, self.pad_id)
        # A mixture is of probabilities, after the temperature.
        sample = sampler(replace(sampling, temperature=1.0) if mixed else sampling)
        numbers = uniforms(requests, sampling.max_new_tokens).to(student.logits.device)
        tokens: list[list[int]] = [[] for _ in requests]
        logprobs: list[list[float]] = [[] for _ in requests]
        live = list(range(len(requests)))
        for step in range(sampling.max_new_tokens):
            logits = student.logits
            if mixed and teacher:
                logits = mixed.logprobs(logits, teacher.logits, sampling.temperature)
            picked, picked_logprobs = sample(logits, numbers[:, step])
            for row, token, logprob in zip(
                live, picked.tolist(), picked_logprobs.tolist(), strict=True
            ):
                tokens[row].append(token)
                logprobs[row].append(logprob)
            ended = [i for i, row in enumerate(live) if tokens[row][-1] in self.stop]
            if len(ended) == len(live) or step + 1 == sampling.max_new_tokens:
                break
            if ended:
                kept = student.drop(ended)
                if teacher:
                    teacher.drop(ended)
                live = [live[i] for i in kept]
                picked, numbers = picked[kept], numbers[kept]
            student.extend(picked)
            if teacher:
                teacher.extend(picked)
        return [
            Completion(tokens[i], logprobs[i], finished=tokens[i][-1] in self.stop)
            for i in range(len(requests))
        ]

    def _sequences(self, prompts: Sequence[list[int]], room: int) -> Sequences:
        return Sequences(self.core, prompts, room, self.pad_id, self.dtype)


def _gap(found: Tensor, wanted: Tensor) -> float:
    """The largest of (N, V) logits' differences, relative to their spread."""
    spread = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
    return ((found - wanted).norm(dim=-1) / spread).max().item()
