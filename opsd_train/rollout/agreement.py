"""Checks that the engine samples from the distribution that the trainer computes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsd_kernels.integrations.heads import LmHead, head_logits
from opsd_train.config.errors import UserError
from opsd_train.model.policy import Policy
from opsd_train.rollout.request import Completion, Request, Sampling
from opsd_train.rollout.token_sampling import logprobs_of

TOKENS = 64  # compared at most: no other part of a run holds their (TOKENS, V) logits
# Largest mean gap that rounding makes, in nats a token: a logit of 20 is off by 0.06 in bfloat16.
ROUNDING = {torch.float32: 0.01, torch.bfloat16: 0.1}
_MOST = 1.0  # counted for one token: at the edge of top-p, rounding may make a gap infinite


def check_agreement(
    policy: Policy,
    requests: Sequence[Request],
    completions: Sequence[Completion],
    sampling: Sampling,
    engine: str,
) -> None:
    """Compare the sampler's log-probabilities with the trainer's on the longest completion.

    Losses and importance weights are wrong where they disagree. Raises UserError if the mean
    difference over the first TOKENS tokens is more than rounding. Every rank calls it, since the
    forward pass gathers sharded weights. `engine`: its name, for the error.
    """
    index = max(range(len(completions)), key=lambda i: len(completions[i].tokens))
    gap = logprob_gap(policy, requests[index].prompt, completions[index], sampling)
    if not gap <= ROUNDING[policy.dtype]:
        raise UserError(
            f"rollout.engine={engine} samples from another distribution than the trainer computes: "
            f"{gap:.2g} nats a token apart; do not train {type(policy.core).__name__} with it, "
            "and please report it"
        )


def logprob_gap(
    policy: Policy, prompt: list[int], completion: Completion, sampling: Sampling
) -> float:
    """Mean difference of sampler's and trainer's log-probabilities, in nats a token.

    Over the completion's first TOKENS tokens; at most 1 is counted for one. Every rank calls it.
    """
    tokens = completion.tokens[:TOKENS]

    def own_logprobs(hidden: Tensor, head: LmHead, target: Tensor) -> Tensor:
        return logprobs_of(head_logits(hidden, head), target, sampling)

    training = policy.model.training
    policy.model.eval()
    with torch.no_grad():
        own = policy.run([prompt], [tokens], own_logprobs)
    policy.model.train(training)
    sampled = torch.tensor(completion.logprobs[:TOKENS]).to(own)
    return (own - sampled).abs().clamp(max=_MOST).mean().item()
