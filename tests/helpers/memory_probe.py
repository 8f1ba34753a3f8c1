"""Run by test_memory.py: for each line of stdin one call's extra peak memory, as a line of JSON.

Each call is measured in a process of its own, forked once torch is imported: no call has run there,
no thread has started and nothing that was freed hides a part of the peak.
"""

import argparse
import json
import os
import signal
import sys

import torch
import torch._dynamo  # what a call imports is not measured, and is imported once

from benchmarks import resident
from opsd_kernels import plan, reference
from opsd_kernels.fused_cross_entropy import fused_linear_cross_entropy
from opsd_kernels.fused_jsd import fused_linear_jsd
from opsd_kernels.fused_logprob import fused_linear_logprob
from opsd_kernels.fused_topk import fused_linear_topk

SECONDS = 300  # one call takes at most
K = 64  # of "topk"; their log-probabilities and ids are 12 bytes each

LOSSES = {
    **dict.fromkeys(("logprob", "cross_entropy", "targets"), "logprob"),
    "topk": "topk",
}


def inputs(
    args: argparse.Namespace, tokens: int, hidden: int, vocab: int
) -> dict[str, torch.Tensor]:
    dtype = getattr(torch, args.dtype)
    # Logits of standard deviation 3: wider ones underflow to denormals, which are slow to multiply.
    spread = 3 / hidden**0.5
    h = torch.randn(tokens, hidden).to(dtype)
    w = (torch.randn(vocab, hidden) * spread).to(dtype)
    h.requires_grad_(args.wrt != "nothing")
    w.requires_grad_(args.wrt == "head")
    if args.op == "topk":
        return {"input": h, "weight": w}
    labels = torch.randint(0, vocab - 8, (tokens,))
    if args.op == "targets":
        ids = torch.stack([torch.randperm(vocab)[:32] for _ in range(tokens)])
        return {"input": h, "weight": w, "target": ids}
    if args.op in ("logprob", "cross_entropy"):
        return {"input": h, "weight": w, "target": labels}
    teacher = w if args.op == "shared" else (torch.randn(vocab, hidden) * spread).to(dtype)
    return {
        "student_input": h,
        "student_weight": w,
        "teacher_input": torch.randn(tokens, hidden).to(dtype),
        "teacher_weight": teacher,
        "shift_labels": labels,
    }


def call(args: argparse.Namespace, tensors: dict[str, torch.Tensor]) -> None:
    options = {} if args.op == "reference" else {"workspace_bytes": args.workspace_mib << 20}
    if args.op == "padded":
        options["vocab_size"] = tensors["student_weight"].shape[0] - 8
    if args.op == "topk":
        fused_linear_topk(**tensors, k=K, **options)
        return
    if args.op == "logprob":
        logprob, entropy = fused_linear_logprob(**tensors, return_entropy=True, **options)
        loss = logprob + entropy
    elif args.op == "targets":
        loss = fused_linear_logprob(**tensors, **options).sum(-1)
    elif args.op == "cross_entropy":
        loss = fused_linear_cross_entropy(**tensors, reduction=args.reduction, **options)
    else:
        fn = reference.linear_jsd if args.op == "reference" else fused_linear_jsd
        loss = fn(**tensors, reduction=args.reduction, **options)
    if args.wrt != "nothing":
        loss.backward(torch.linspace(0.5, 1, loss.numel()).view_as(loss).to(loss.dtype))


def measure(args: argparse.Namespace) -> dict[str, int]:
    # Libraries load, threads start and operators register here, not in the measured call.
    call(args, inputs(args, 32, 32, 64))
    tensors = inputs(args, args.tokens, args.hidden, args.vocab)
    before = resident.resident()
    resident.reset_peak()
    call(args, tensors)
    grads = [x.grad for x in tensors.values() if x.grad is not None]
    promised = plan(
        args.tokens,
        args.hidden,
        args.vocab,
        loss=LOSSES.get(args.op, "divergence"),
        k=K if args.op == "topk" else 0,
        dtype=getattr(torch, args.dtype),
        grad_input=args.wrt != "nothing",
        grad_weight=args.wrt == "head",
        reduced=args.reduction != "none" and args.op not in ("logprob", "targets"),
        entropy_grad=args.op == "logprob" and args.wrt != "nothing",
        workspace_bytes=args.workspace_mib << 20,
    )
    return {
        "extra": resident.peak() - before,
        "outputs": sum(g.numel() * g.element_size() for g in grads),
        "planned_workspace": promised.workspace_bytes,
    }


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser()
    for name in ("op", "wrt", "reduction", "dtype"):
        made.add_argument(name)
    for name in ("workspace_mib", "tokens", "hidden", "vocab"):
        made.add_argument(name, type=int)
    return made


def main() -> None:
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            signal.alarm(SECONDS)
            print(json.dumps(measure(parser().parse_args(line.split()))), flush=True)
            os._exit(0)
        if code := os.waitpid(child, 0)[1]:
            print(json.dumps({"died": code}), flush=True)


if __name__ == "__main__":
    main()
