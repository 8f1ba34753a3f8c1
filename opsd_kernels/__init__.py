"""Distillation and RL losses from hidden states and LM-head weights, without the logits.

Losses:
    fused_linear_jsd            generalized Jensen-Shannon divergence of student and teacher
    fused_linear_forward_kl     KL(teacher | student)
    fused_linear_reverse_kl     KL(student | teacher)
    fused_linear_cross_entropy  cross-entropy, with label smoothing, class weights and z-loss
    fused_linear_logprob        log-probability of each token, entropy and log-sum-exp
    fused_linear_advantage      log t(y) - log s(y) of sampled tokens, for policy_gradient_loss
    fused_linear_topk           the k most likely ids of each token, for sparse teachers
    topk_divergence             divergence over those k entries and the rest of the vocabulary
    FusedLinearJSD              fused_linear_jsd as a module

How they are computed:
    plan, Plan                  schedule, blocks, number of GEMMs and bytes of a call

For tests:
    opsd_kernels.reference      the same losses in plain PyTorch over full logits
    opsd_kernels.testing        comparison with a float64 truth, and test inputs
"""

from opsd_kernels.fused_advantage import fused_linear_advantage, policy_gradient_loss
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import FusedLinearJSD, fused_linear_jsd
from opsd_kernels.fused_kl import fused_linear_forward_kl, fused_linear_reverse_kl
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.fused_topk import fused_linear_topk
from opsd_kernels.plan import Plan, plan
from opsd_kernels.sparse_divergence import topk_divergence

__version__ = "0.2.0"  # pyproject.toml reads it

__all__ = [
    "FusedLinearJSD",
    "Plan",
    "__version__",
    "fused_linear_advantage",
    "fused_linear_cross_entropy",
    "fused_linear_forward_kl",
    "fused_linear_jsd",
    "fused_linear_logprob",
    "fused_linear_reverse_kl",
    "fused_linear_topk",
    "plan",
    "policy_gradient_loss",
    "topk_divergence",
]
