"""How much is lost with a teacher that is known at its k most likely tokens.

    python -m benchmarks.real_pair        # once: SmolLM2-135M as student and as privileged teacher
    python -m benchmarks.sparse_teacher   # about two minutes on 2 cores

For each divergence and k: the value over the k tokens and the rest as one outcome, and the gradient
of the student's hidden states, against those over the whole vocabulary. In fp32, so that rounding
does not count. `without` leaves the rest out of the divergence.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.environment import ROOT, environment
from benchmarks.losses.inputs import REAL_PAIR
from opsd_kernels import fused_linear_jsd, fused_linear_logprob, fused_linear_topk, topk_divergence

OUT = ROOT / "benchmarks" / "results" / "sparse_teacher_cpu.json"
KS = (1, 8, 20, 64, 256, 1024)
BETAS = {"forward KL": 0.0, "JSD": 0.5, "reverse KL": 1.0}


def measure(pair: dict[str, Tensor], ks: tuple[int, ...]) -> list[dict[str, Any]]:
    """A row for each divergence and k; the last k is the whole vocabulary."""
    student, teacher, head = (pair[name].float() for name in ("student", "teacher", "head"))
    log_t, ids, _ = fused_linear_topk(teacher, head, len(head))
    rows = []
    for name, beta in BETAS.items():
        full = _gradient(student, lambda h, beta=beta: fused_linear_jsd(
            h, head, teacher, head, beta=beta
        ))  # fmt: skip
        for k in (*ks, len(head)):
            row = {"divergence": name, "beta": beta, "k": k}
            row["teacher_mass"] = log_t[:, :k].exp().sum(-1).mean().item()
            for kind, tail in (("with", True), ("without", False)):

                def sparse(h: Tensor, k: int = k, beta: float = beta, tail: bool = tail) -> Tensor:
                    log_s = fused_linear_logprob(h, head, ids[:, :k])
                    return topk_divergence(log_s, log_t[:, :k], beta, tail=tail).mean()

                row[kind] = _compared(_gradient(student, sparse), full)
            rows.append(row)
    return rows


def _gradient(hidden: Tensor, loss: Any) -> tuple[float, Tensor]:
    """The loss, and its gradient (N, D)."""
    leaf = hidden.detach().requires_grad_()
    value = loss(leaf)
    value.backward()
    assert leaf.grad is not None
    return value.item(), leaf.grad


def _compared(made: tuple[float, Tensor], full: tuple[float, Tensor]) -> dict[str, float]:
    (value, grad), (whole, true) = made, full
    cosine = torch.nn.functional.cosine_similarity(grad.flatten(), true.flatten(), dim=0)
    return {
        "value": value / whole,
        "grad_error": ((grad - true).norm() / true.norm()).item(),
        "grad_cosine": cosine.item(),
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(prog="benchmarks.sparse_teacher", description=__doc__)
    parser.add_argument("--tokens", type=int, default=256, help="of the captured pair (256)")
    parser.add_argument("--out", type=Path, default=OUT, help=f"the figures as JSON ({OUT})")
    options = parser.parse_args()
    if not REAL_PAIR.exists():
        raise SystemExit("no captured pair here: run python -m benchmarks.real_pair")
    pair = torch.load(REAL_PAIR, weights_only=True)
    pair = {n: t if n == "head" else t[: options.tokens] for n, t in pair.items()}
    rows = measure(pair, KS)
    result = {
        "kind": "sparse_teacher",
        "environment": environment(),
        "settings": {"tokens": len(pair["student"]), "inputs": "real"},
        "rows": rows,
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for row in rows:
        made, bare = row["with"], row["without"]
        print(
            f"{row['divergence']:11} k {row['k']:6}  value {made['value']:.3f} of the whole, "
            f"gradient off by {made['grad_error']:.2%}, without the rest {bare['grad_error']:.2%}"
        )
    print(f"\nwritten to {options.out}")


if __name__ == "__main__":
    main()
