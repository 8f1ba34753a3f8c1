"""The losses by themselves, each beside plain PyTorch on full logits.

Prints both values and the largest difference between their gradients, relative to the largest
gradient; then the size of the logits and what a fused loss allocates.

CPU, 1 GPU:  python examples/losses.py
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import opsd_kernels as ok


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) of full log-probabilities (N, V), mean over tokens."""
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def jsd(log_s: Tensor, log_t: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_s, log_t) + log_s.new_tensor(0.5).log()
    return (kl(log_t, log_m) + kl(log_s, log_m)) / 2


# By name: fused, from hidden states, heads and labels; plain, from log-probabilities and labels.
LOSSES = {
    "JSD": (ok.fused_linear_jsd, lambda log_s, log_t, y: jsd(log_s, log_t)),
    "reverse KL": (ok.fused_linear_reverse_kl, lambda log_s, log_t, y: kl(log_s, log_t)),
    "cross-entropy": (
        lambda h_s, w_s, h_t, w_t, y, **limit: ok.fused_linear_cross_entropy(h_s, w_s, y, **limit),
        lambda log_s, log_t, y: F.nll_loss(log_s, y),
    ),
}


def main() -> None:
    device, dtype, n, d, v = "cpu", torch.float32, 256, 128, 16384
    if torch.cuda.is_available():
        device, dtype, n, d, v = "cuda", torch.bfloat16, 4096, 1024, 151936
    torch.manual_seed(0)
    h_s, h_t = (torch.randn(n, d).to(device, dtype) for _ in range(2))
    w_s, w_t = (torch.randn(v, d).mul(3 / d**0.5).to(device, dtype) for _ in range(2))
    y = torch.randint(v, (n,), device=device)
    student = (h_s.requires_grad_(), w_s.requires_grad_())
    limit = {"workspace_bytes": n * v}  # a quarter of one model's logits; optional
    for name, (fused, plain) in LOSSES.items():
        ours = fused(h_s, w_s, h_t, w_t, y, **limit)
        log_s, log_t = (F.log_softmax((h @ w.T).float(), -1) for h, w in [(h_s, w_s), (h_t, w_t)])
        theirs = plain(log_s, log_t, y)
        grads = [torch.autograd.grad(loss, student) for loss in (ours, theirs)]
        gap = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*grads, strict=True))
        print(f"{name}: fused {ours:.6f}, plain {theirs:.6f}, gradient difference {gap:.1e}")
    print(f"logits of both models in fp32: {2 * n * v * 4 / 2**20:.0f} MiB")
    print(ok.plan(n, d, v, dtype=dtype, device=device, grad_weight=True, **limit))


if __name__ == "__main__":
    main()
