"""`LigerFusedLinearGRPOLoss` of Liger-Kernel 0.8.5 on `fused_linear_logprob`.

Everything after the log-probabilities is arithmetic on (B, T) tensors.
"""

from __future__ import annotations

import math
import warnings

import torch
from torch import Tensor, nn

from opsd_kernels import checks
from opsd_kernels.fused_logprob import fused_linear_logprob

_CLIPPED_LOSSES = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
_UNCLIPPED_LOSSES = ("cispo", "sapo", "vespo")
_LEVELS = ("token", "sequence")
_MASKED = -(2**62)  # in place of a masked token's id; no tokenizer has it


class LigerFusedLinearGRPOLoss(nn.Module):
    """Policy-gradient losses of GRPO and its relatives from hidden states and LM-head weight.

    With p, q, r the log-probabilities of a token under the policy, the old policy and the
    reference, A the advantage of its sequence, and w = exp(p - q), for level "sequence" of the mean
    of p - q over the sequence's tokens, the loss of a token is::

        grpo, bnpo, dr_grpo, dapo, luspo
                    -min(min(w, delta) A, clamp(w, 1 - epsilon_low, 1 + epsilon_high) A)
        cispo       -min(w, epsilon_high).detach() A p
        sapo        -4 / tau sigmoid(tau (w - 1)) A, tau by the sign of A
        vespo       -phi(W).detach() A p, phi(W) = W**k exp(lam (1 - W)), k and lam by the sign of A

    W is the product of w over a sequence's tokens. That loss is multiplied by `vllm_is_ratio`
    (which vespo multiplies into W instead); then beta * (exp(r - p) - (r - p) - 1) is added, times
    w if `use_bias_correction_kl`. How it is averaged: see `_average`.

    Without `old_per_token_logps`, q is p; without a reference, r is p: the KL is 0. Masked tokens
    are dropped before any product, but for luspo, whose mean counts them. `compiled` and
    `chunk_size` are ignored. The options are attributes.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        beta: float = 0.04,
        compiled: bool = True,
        use_ref_model: bool = True,
        chunk_size: int = 1,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        loss_type: str = "dapo",
        max_completion_length: int | None = None,
        importance_sampling_level: str = "token",
        sapo_temperature_pos: float = 1.0,
        sapo_temperature_neg: float = 1.05,
        temperature: float = 1.0,
        delta: float | None = None,
        use_bias_correction_kl: bool = False,
        vespo_k_pos: float = 2.0,
        vespo_lambda_pos: float = 3.0,
        vespo_k_neg: float = 3.0,
        vespo_lambda_neg: float = 2.0,
    ) -> None:
        super().__init__()
        checks.positive("sapo_temperature_pos", sapo_temperature_pos)
        checks.positive("sapo_temperature_neg", sapo_temperature_neg)
        if delta is not None:
            checks.positive("delta", delta)
        self.beta = beta
        self.compiled = compiled
        self.use_ref_model = use_ref_model
        self.chunk_size = chunk_size
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high
        self.loss_type = loss_type
        self.max_completion_length = max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.temperature = temperature
        self.delta = delta
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos = vespo_k_pos
        self.vespo_lambda_pos = vespo_lambda_pos
        self.vespo_k_neg = vespo_k_neg
        self.vespo_lambda_neg = vespo_lambda_neg

    def forward(
        self,
        _input: Tensor,  # (B, T, D)
        lin_weight: Tensor,  # (V, D)
        selected_token_ids: Tensor,  # (B, T)
        attention_mask: Tensor,  # (B, T)
        advantages: Tensor,  # (B,)
        bias: Tensor | None = None,  # (V,)
        ref_per_token_logps: Tensor | None = None,  # (B, T)
        old_per_token_logps: Tensor | None = None,  # (B, T)
        ref_input: Tensor | None = None,  # (B, T, D_r)
        ref_weight: Tensor | None = None,  # (V, D_r)
        ref_bias: Tensor | None = None,  # (V,)
        vllm_is_ratio: Tensor | None = None,  # (B,), (B, 1) or (B, T)
        num_items_in_batch: float | Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """(loss, metrics): the mean KL if beta is not 0, then the fraction of clipped tokens.

        Metrics are detached scalars, means over the tokens of the mask. `num_items_in_batch` is the
        number of tokens of all processes and accumulation steps, for dapo, cispo and vespo.

        Raises:
            ValueError: the options do not fit each other, or an argument is missing.
            TypeError, RuntimeError: as `fused_linear_logprob`.
        """
        self._check_options()
        mask = attention_mask
        keep = None if self.loss_type == "luspo" else mask != 0
        ids = selected_token_ids
        if keep is not None:
            ids = torch.where(keep, ids.long(), _MASKED)
        p = self._logprob(_input, lin_weight, ids, bias)
        ratio = _is_ratio_per_token(vllm_is_ratio, mask)
        log_w = _difference(p, old_per_token_logps, keep)  # log w of each token, (B, T)
        level_log_w = log_w  # (B, T), or (B, 1) for level "sequence"
        if self.importance_sampling_level == "sequence":
            level_log_w = (log_w * mask).sum(-1, keepdim=True) / _at_least_one(mask.sum(-1))[
                :, None
            ]
        w, advantage = level_log_w.exp(), advantages.unsqueeze(1)
        if self.loss_type in _CLIPPED_LOSSES:
            low, high = 1 - self.epsilon_low, 1 + self.epsilon_high
            bounded = w if self.delta is None else w.clamp(max=self.delta)
            loss = -torch.min(bounded * advantage, w.clamp(low, high) * advantage)
            clipped = ((w < low) & (advantage < 0)) | ((w > high) & (advantage > 0))
        elif self.loss_type == "cispo":
            loss = -w.detach().clamp(max=self.epsilon_high) * advantage * p
            clipped = (w > self.epsilon_high) & (advantage > 0)
        elif self.loss_type == "sapo":
            loss, clipped = self._sapo(w, advantage), torch.zeros_like(w)
        else:
            phi = self._vespo_weight(log_w, advantage, mask, ratio)
            loss, clipped = -phi * advantage * p, torch.zeros_like(w)
        if ratio is not None and self.loss_type != "vespo":
            loss = loss * ratio
        metrics = []
        if self.beta != 0.0:
            r = self._reference(ids, ref_per_token_logps, ref_input, ref_weight, ref_bias)
            gap = -_difference(p, r, keep)
            kl = gap.exp() - gap - 1.0
            kl = kl * level_log_w.exp() if self.use_bias_correction_kl else kl
            loss = loss + self.beta * kl
            metrics.append((kl * mask).sum().detach() / _at_least_one(mask.sum()))
        metrics.append((clipped.to(p.dtype) * mask).sum() / _at_least_one(mask.sum()))
        return self._average(loss, mask, num_items_in_batch), tuple(metrics)

    def _check_options(self) -> None:
        if self.loss_type not in (*_CLIPPED_LOSSES, *_UNCLIPPED_LOSSES):
            known = (*_CLIPPED_LOSSES, *_UNCLIPPED_LOSSES)
            raise ValueError(f"loss_type: expected one of {known}, got {self.loss_type!r}")
        level = self.importance_sampling_level
        if level not in _LEVELS:
            raise ValueError(f"importance_sampling_level: expected one of {_LEVELS}, got {level!r}")
        if level == "sequence" and self.loss_type in _UNCLIPPED_LOSSES:
            raise ValueError(
                "importance_sampling_level: Sequence-level importance sampling is not supported "
                f'with loss_type {self.loss_type!r}; pass "token"'
            )
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ValueError("max_completion_length: pass it, loss_type 'dr_grpo' divides by it")

    def _logprob(self, hidden: Tensor, weight: Tensor, ids: Tensor, bias: Tensor | None) -> Tensor:
        """(B, T) log-probability of the ids; 0 for masked ones."""
        logprob = fused_linear_logprob(
            hidden,
            weight.to(hidden.dtype),
            ids,
            bias=bias,
            temperature=self.temperature,
            ignore_index=_MASKED,
        )
        assert isinstance(logprob, Tensor)
        return logprob

    def _reference(
        self,
        ids: Tensor,
        logps: Tensor | None,
        hidden: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor | None:
        """(B, T) log-probability of the ids under the reference, or None without one."""
        if not self.use_ref_model:
            return None
        if logps is not None:
            if hidden is not None:
                warnings.warn("Using ref_per_token_logps; ref_input is not read", stacklevel=3)
            return logps
        if hidden is None or weight is None:
            raise ValueError(
                "ref_per_token_logps: pass it, or ref_input and ref_weight, or use_ref_model=False"
            )
        with torch.no_grad():
            return self._logprob(hidden, weight, ids, bias)

    def _sapo(self, w: Tensor, advantage: Tensor) -> Tensor:
        """(B, T) loss of w (B, T) and the advantage (B, 1)."""
        tau = torch.where(advantage > 0, self.sapo_temperature_pos, self.sapo_temperature_neg)
        return -4.0 / tau * torch.sigmoid(tau * (w - 1)) * advantage

    def _vespo_weight(
        self,
        log_w: Tensor,  # (B, T)
        advantage: Tensor,  # (B, 1)
        mask: Tensor,  # (B, T)
        ratio: Tensor | None,  # (B, T) or (B, 1)
    ) -> Tensor:
        """(B, 1) phi(W), 1 at W = 1; a constant."""
        lowest, highest = math.log(1e-8), 20.0
        log_product = (log_w.detach().clamp(-20.0, 20.0) * mask).sum(-1, keepdim=True)
        if ratio is not None:
            log_product = log_product + ratio.log().clamp(lowest, highest).sum(-1, keepdim=True)
        log_product = log_product.clamp(lowest, highest)
        k = torch.where(advantage >= 0, self.vespo_k_pos, self.vespo_k_neg)
        lam = torch.where(advantage >= 0, self.vespo_lambda_pos, self.vespo_lambda_neg)
        lam = lam.clamp(min=1e-4)
        phi = (lam + k * log_product - lam * log_product.exp()).exp()
        return phi.nan_to_num(nan=0.0, posinf=0.0)

    def _average(
        self, loss: Tensor, mask: Tensor, num_items_in_batch: float | Tensor | None
    ) -> Tensor:
        """(): the losses (B, T) or (B, 1) averaged.

        grpo, sapo: over the tokens of a sequence, then over sequences. bnpo: over tokens. dr_grpo:
        the sum over B * max_completion_length. dapo, cispo, vespo: over the tokens of all
        processes. luspo: over all entries, masked ones too, each times the tokens of its sequence.
        """
        if self.loss_type == "luspo":
            return (loss * mask.sum(-1, keepdim=True)).mean()
        if self.loss_type in ("grpo", "sapo"):
            return ((loss * mask).sum(-1) / _at_least_one(mask.sum(-1))).mean()
        total = (loss * mask).sum()
        if self.loss_type == "bnpo":
            return total / _at_least_one(mask.sum())
        if self.loss_type == "dr_grpo":
            assert self.max_completion_length is not None
            return total / (mask.shape[0] * self.max_completion_length)
        return total / _tokens_per_process(mask, num_items_in_batch)


def _difference(p: Tensor, other: Tensor | None, keep: Tensor | None) -> Tensor:
    """p - other, and p - p.detach() without other; 0 where a token is masked."""
    difference = p - (p.detach() if other is None else other.detach().to(p.dtype))
    return difference if keep is None else torch.where(keep, difference, 0.0)


def _is_ratio_per_token(ratio: Tensor | None, mask: Tensor) -> Tensor | None:
    """The ratio as (B, T) or (B, 1)."""
    if ratio is None:
        return None
    batch, tokens = mask.shape
    if tuple(ratio.shape) not in ((batch,), (batch, 1), (batch, tokens)):
        raise ValueError(
            f"vllm_is_ratio: expected shape ({batch},), ({batch}, 1) or ({batch}, {tokens}), got "
            f"{tuple(ratio.shape)}"
        )
    return ratio.detach().reshape(batch, -1)


def _at_least_one(count: Tensor) -> Tensor:
    return count.clamp(min=1)


def _tokens_per_process(mask: Tensor, num_items: float | Tensor | None) -> Tensor:
    """(), at least 1: tokens of all processes over their number."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    processes = torch.distributed.get_world_size() if distributed else 1
    if num_items is not None:
        tokens = torch.as_tensor(num_items, dtype=torch.float32, device=mask.device)
    else:
        tokens = mask.sum(dtype=torch.float32)
        if distributed:
            torch.distributed.all_reduce(tokens)
    return _at_least_one(tokens / processes)
