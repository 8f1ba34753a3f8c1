"""JSD from hidden states on a CPU: ours, TRL's two, Liger's chunked one and the bare GEMM floor.

    python benchmarks/jsd_cpu.py                     # the README's table, about three minutes
    python benchmarks/jsd_cpu.py --vocab 151936      # another shape
    python benchmarks/jsd_cpu.py --dtype float32

Forward and backward to the student's hidden states, frozen head, mean over tokens, all contenders
on the same inputs. They run in turn, one call each per round, so a slow second hits all of them;
times are medians over the rounds, and the ratio is to the floor of the same run. The loss and the
gradient of the first rows are compared with float64 over full logits. Peak extra memory is the
growth of the resident set over one warm call in a fresh process (Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from opsd_kernels import fused_linear_jsd, reference  # noqa: E402

BETA = 0.5
CHECKED_ROWS = 64


class Inputs:
    """Hidden states and a head whose logits spread as a language model's; the teacher is close."""

    def __init__(self, tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        student = torch.randn(tokens, hidden)
        self.teacher = (student + 0.3 * torch.randn(tokens, hidden)).to(dtype)
        self.student = student.to(dtype).requires_grad_()
        self.head = (torch.randn(vocab, hidden) * (3 / hidden**0.5)).to(dtype)
        self.other_head = self.head.clone()  # the same numbers, not recognisable as one tensor
        self.labels = torch.randint(vocab, (tokens,))


def ours(x: Inputs) -> Tensor:
    return fused_linear_jsd(x.student, x.head, x.teacher, x.other_head, beta=BETA)


def ours_shared(x: Inputs) -> Tensor:
    return fused_linear_jsd(x.student, x.head, x.teacher, x.head, beta=BETA)


def trl_eager(x: Inputs) -> Tensor:
    from trl.experimental.gkd import GKDTrainer

    student, teacher = x.student @ x.head.T, x.teacher @ x.other_head.T
    return GKDTrainer.generalized_jsd_loss(student, teacher, beta=BETA)


def trl_kernels(x: Inputs) -> Tensor:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    divergence, _ = ChunkedDivergenceFunction.apply(
        x.student, x.head, None, x.teacher, x.other_head, None, BETA
    )
    return divergence.mean()


def liger_chunked(x: Inputs) -> Tensor:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    # Its beta weighs the other way round from TRL's and ours; at 0.5 they agree.
    loss = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=BETA, compiled=False
    )
    return loss(x.student, x.head, x.teacher, x.other_head, x.labels)


CONTENDERS: dict[str, Callable[[Inputs], Tensor]] = {
    "opsd_kernels": ours,
    "opsd_kernels, shared head": ours_shared,
    "TRL generalized_jsd_loss": trl_eager,
    "TRL ChunkedDivergenceFunction": trl_kernels,
    "Liger LigerFusedLinearJSDLoss": liger_chunked,
}


def floor(x: Inputs) -> None:
    """The products nobody can avoid: two logits, one gradient."""
    with torch.no_grad():
        logits = x.student @ x.head.T
        x.teacher @ x.other_head.T
        logits @ x.head


def step(contender: Callable[[Inputs], Tensor], x: Inputs) -> tuple[float, Tensor]:
    x.student.grad = None
    loss = contender(x)
    loss.backward()
    return loss.item(), x.student.grad


def measure_times(x: Inputs, names: list[str], rounds: int) -> dict[str, list[float]]:
    runs = {"floor": lambda: floor(x)} | {n: lambda n=n: step(CONTENDERS[n], x) for n in names}
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number > 0:  # the first round warms up
                times[name].append(time.perf_counter() - start)
    return times


def measure_errors(x: Inputs, names: list[str]) -> dict[str, dict[str, float]]:
    """Relative error of the loss, and of the first rows' gradient (RMS), against float64."""
    rows, tokens = slice(CHECKED_ROWS), x.student.shape[0]
    head = x.head.double()
    values = []
    for part in range(0, tokens, CHECKED_ROWS):
        chunk = slice(part, part + CHECKED_ROWS)
        log_s = torch.log_softmax(x.student[chunk].detach().double() @ head.T, -1)
        log_t = torch.log_softmax(x.teacher[chunk].double() @ head.T, -1)
        values.append(reference.divergence(log_s, log_t, BETA))
    truth = torch.cat(values).mean().item()
    hidden = x.student[rows].detach().double().requires_grad_()
    log_s = torch.log_softmax(hidden @ head.T, -1)
    log_t = torch.log_softmax(x.teacher[rows].double() @ head.T, -1)
    (reference.divergence(log_s, log_t, BETA).sum() / tokens).backward()
    errors = {}
    for name in names:
        loss, grad = step(CONTENDERS[name], x)
        difference = (grad[rows].double() - hidden.grad).norm() / hidden.grad.norm()
        errors[name] = {"loss": loss / truth - 1, "gradient": difference.item()}
    return errors


def extra_memory(x: Inputs, name: str) -> float:
    """MiB by which the resident set grows at most during a warm call."""
    small = Inputs(32, 64, 512, x.head.dtype)
    step(CONTENDERS[name], small)  # loads the libraries and their thread pools
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = _status_mib("VmRSS")
    step(CONTENDERS[name], x)
    return _status_mib("VmHWM") - before


def _status_mib(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    raise KeyError(key)


def available() -> tuple[list[str], dict[str, str]]:
    """Contenders that run here, and why the others do not."""
    names, missing = [], {}
    tiny = Inputs(4, 8, 16, torch.float32)
    for name, contender in CONTENDERS.items():
        try:
            step(contender, tiny)
            names.append(name)
        except ImportError as error:
            missing[name] = f"not installed ({error})"
    return names, missing


def environment() -> dict[str, object]:
    import importlib.metadata as metadata

    versions = {}
    for package in ("torch", "trl", "liger-kernel", "transformers"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True).stdout
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
    return {
        "device": cpu,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit.strip() + ("+" if dirty.strip() else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures there as JSON")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    options = parser.parse_args()
    shape = (options.tokens, options.hidden, options.vocab)
    if options.memory_of:
        x = Inputs(*shape, getattr(torch, options.dtype))
        print(extra_memory(x, options.memory_of))
        return
    names, missing = available()
    memory = {}
    for name in names:
        command = [sys.executable, __file__, "--memory-of", name, "--dtype", options.dtype]
        command += [f"--{k}={v}" for k, v in zip(("tokens", "hidden", "vocab"), shape, strict=True)]
        memory[name] = float(subprocess.run(command, capture_output=True, check=True).stdout)
    x = Inputs(*shape, getattr(torch, options.dtype))
    errors = measure_errors(x, names)
    times = measure_times(x, names, options.rounds)
    median = {name: statistics.median(values) for name, values in times.items()}
    print(f"N={shape[0]} D={shape[1]} V={shape[2]} {options.dtype}, medians of {options.rounds}")
    print("| what | seconds | x floor | x ours | peak extra MiB | loss error | gradient error |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    print(f"| three bare GEMMs | {median['floor']:.3f} | 1.00 | | | | |")
    for name in names:
        print(
            f"| {name} | {median[name]:.3f} | {median[name] / median['floor']:.2f} | "
            f"{median[name] / median['opsd_kernels']:.2f} | {memory[name]:.0f} | "
            f"{errors[name]['loss']:+.1%} | {errors[name]['gradient']:.1%} |"
        )
    for name, reason in missing.items():
        print(f"| {name} | {reason} | | | | | |")
    if options.out:
        result = {
            "case": dict(zip(("tokens", "hidden", "vocab"), shape, strict=True))
            | {"dtype": options.dtype, "beta": BETA, "rounds": options.rounds},
            "environment": environment(),
            "seconds": times,
            "peak_extra_mib": memory,
            "relative_error": errors,
            "missing": missing,
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
