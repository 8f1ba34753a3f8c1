"""A divergence of your own without [tokens, vocabulary] logits: Rényi's, from three log-sum-exps.

    D(s || t) = log(sum s**a t**(1 - a)) / (a - 1)
              = (lse(a z_s + (1 - a) z_t) - a lse(z_s) - (1 - a) lse(z_t)) / (a - 1)

a = 1/2 is twice the Bhattacharyya distance; a -> 1 the reverse KL. The mixed logits are those of
one head on concatenated hidden states: fused_linear_logprob gives all three terms, and autograd the
exact gradients. Where student and teacher agree, the terms nearly cancel and digits are lost.

Prints the errors against fp64 on full logits, beside those of plain PyTorch in fp32.

CPU:    python examples/own_divergence.py
"""

import torch
from torch import Tensor

from opsd_kernels import fused_linear_logprob
from opsd_kernels.testing import assert_close, cast, make_pair, measure


def fused_renyi(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, y: Tensor, a: float) -> Tensor:
    """From hidden states (N, D), heads (V, D), labels (N,), -100 where a token does not count."""
    h_t, w_t = h_t.detach(), w_t.detach()

    def lse(hidden: Tensor, weight: Tensor) -> Tensor:  # (N,), 0 where the label is -100
        return fused_linear_logprob(hidden, weight, y, return_lse=True)[1]

    mixed = lse(torch.cat([a * h_s, (1 - a) * h_t], -1), torch.cat([w_s, w_t], -1))
    terms = mixed - a * lse(h_s, w_s) - (1 - a) * lse(h_t, w_t)
    return terms.sum() / (a - 1) / (y != -100).sum()


def plain_renyi(h_s: Tensor, w_s: Tensor, h_t: Tensor, w_t: Tensor, y: Tensor, a: float) -> Tensor:
    log_s, log_t = ((h @ w.T).log_softmax(-1)[y != -100] for h, w in ((h_s, w_s), (h_t, w_t)))
    return torch.logsumexp(a * log_s + (1 - a) * log_t, -1).mean() / (a - 1)


def results(renyi, dtype: torch.dtype, a: float) -> dict[str, Tensor]:
    pair = make_pair(64, 32, 5000, masked=9, dtype=torch.float32)
    h_s, w_s, h_t, w_t, y, *_ = cast(pair, dtype).values()
    loss = renyi(h_s.requires_grad_(), w_s.requires_grad_(), h_t, w_t, y, a)
    return dict(
        zip(("loss", "dh", "dw"), (loss, *torch.autograd.grad(loss, (h_s, w_s))), strict=True)
    )


def main() -> None:
    for a in (0.5, 2.0):
        truth = results(plain_renyi, torch.float64, a)
        fused, plain = (results(f, torch.float32, a) for f in (fused_renyi, plain_renyi))
        for name in truth:
            assert_close(fused[name], truth[name], plain[name], name=name)
            ours, theirs = (measure(x[name], truth[name]).maximum for x in (fused, plain))
            print(f"a = {a}, {name}: largest error {ours:.1e}, of plain PyTorch {theirs:.1e}")


if __name__ == "__main__":
    main()
