"""Every loss and gradient of the package in plain PyTorch over full logits: the tests' reference.

No operator calls these functions, and they are not fast; only `topk_divergence`, which is plain
PyTorch, takes `divergence` from here. They compute in the dtype of their inputs:
with float64 they are the truth, with bfloat16 they are what a user would write by hand. `ls` and
`lt` are log-probabilities of student and teacher, (..., V).

The log-probability of a banned entry is -inf, and 0 * log 0 = 0 in the value and in autograd. So
each torch.where also replaces its unused operands; their gradient would be 0 * inf = NaN.
"""

from opsd_kernels.reference.gradients import (
    cross_entropy_grad,
    divergence_grad,
    entropy_grad,
    forward_kl_grad,
    jsd_grad,
    logprob_grad,
    reverse_kl_grad,
)
from opsd_kernels.reference.losses import (
    kept_rows,
    linear_advantage,
    linear_cross_entropy,
    linear_jsd,
    linear_logprob,
    linear_topk,
    reduce_tokens,
    spread,
)
from opsd_kernels.reference.rows import (
    advantage,
    clipped_entries,
    clipped_mass,
    cross_entropy,
    divergence,
    entries,
    entropy,
    forward_kl,
    forward_kl_entries,
    jsd,
    jsd_entries,
    log_mixture,
    log_probs,
    logits,
    logprob,
    reverse_kl,
    reverse_kl_entries,
    weighted_log_ratio,
)

__all__ = [
    "advantage",
    "clipped_entries",
    "clipped_mass",
    "cross_entropy",
    "cross_entropy_grad",
    "divergence",
    "divergence_grad",
    "entries",
    "entropy",
    "entropy_grad",
    "forward_kl",
    "forward_kl_entries",
    "forward_kl_grad",
    "jsd",
    "jsd_entries",
    "jsd_grad",
    "kept_rows",
    "linear_advantage",
    "linear_cross_entropy",
    "linear_jsd",
    "linear_logprob",
    "linear_topk",
    "log_mixture",
    "log_probs",
    "logits",
    "logprob",
    "logprob_grad",
    "reduce_tokens",
    "reverse_kl",
    "reverse_kl_entries",
    "reverse_kl_grad",
    "spread",
    "weighted_log_ratio",
]
