"""Distillation and RL losses from hidden states and LM-head weights, without the logits."""

from opsd_kernels.fused_advantage import fused_linear_advantage, policy_gradient_loss
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import FusedLinearJSD, fused_linear_jsd
from opsd_kernels.fused_kl import fused_linear_forward_kl, fused_linear_reverse_kl
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.plan import Plan, plan

__all__ = [
    "FusedLinearJSD",
    "Plan",
    "fused_linear_advantage",
    "fused_linear_cross_entropy",
    "fused_linear_forward_kl",
    "fused_linear_jsd",
    "fused_linear_logprob",
    "fused_linear_reverse_kl",
    "plan",
    "policy_gradient_loss",
]
