"""The predicted tables of docs/gpu-model.md, in Markdown."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from unittest import mock

import torch

from benchmarks.compile.gpus import GPUS
from benchmarks.compile.model import counted, floor, predict
from benchmarks.environment import ROOT
from opsd_kernels import Plan, plan

PAGE = ROOT / "docs" / "gpu-model.md"
planning = sys.modules[plan.__module__]  # the package's `plan` is the function
HIDDEN, VOCAB = 4096, 151936
TOKENS = (1024, 8192, 32768)
_MIB = 2**20
# Arguments of `plan`, and workspaces in MiB.
RUNS = (
    ({"schedule": "blocked", "precision": "fp32"}, (512, 1024, 2048)),
    ({"schedule": "blocked", "precision": "difference"}, (512, 1024, 2048)),
    ({"schedule": "tiled"}, (64,)),
    ({"schedule": "streaming"}, (64,)),
)
PHASES = ("logits", "rows", "statistics", "sums", "gradient", "dh", "dw", "backward")
_PRODUCT = ("wgmma in flight at a wait", "barriers a step")
# (in words, trained, shared)
_HEADS = (
    ("frozen, of both models", False, True),
    ("frozen, one of each", False, False),
    ("trained, of both models", True, True),
)
_MARKED = re.compile(r"(<!-- predicted -->\n).*?(<!-- /predicted -->)", re.DOTALL)


def document() -> str:
    """The tables of predicted times, then the counts they are made from."""
    return "\n\n".join(
        (
            "Predicted time of a JSD, and that time over the predicted time of the bare products:",
            _ratios(),
            "Predicted milliseconds of each phase on an H100 with 8,192 tokens:",
            _phases(),
            f"Counted in machine code that Triton {counted()['triton']} makes:",
            _counts(),
        )
    )


def write() -> None:
    """Write this code's tables between the markers of the page."""
    text = PAGE.read_text()
    made = _MARKED.sub(lambda m: f"{m[1]}\n{document()}\n\n{m[2]}", text)
    PAGE.write_text(made)


def _ratios() -> str:
    names = [f"{gpu}, head {how}" for gpu in GPUS for how in ("frozen", "trained")]
    rows = [["schedule", "workspace", "tokens", *names]]
    for run, mib in _runs():
        for tokens in TOKENS:
            cells = [_cell(run, mib, tokens, gpu, how) for gpu in GPUS for how in (False, True)]
            rows.append([", ".join(run.values()), f"{mib} MiB", f"{tokens:,}", *cells])
    return _markdown(rows, words=1)


def _cell(run: dict[str, str], mib: int, tokens: int, gpu: str, trained: bool) -> str:
    chosen = _plan(run, mib, tokens, trained, gpu)
    total = sum(predict(chosen, gpu).values())
    return f"{total:.1f} ms, {total / floor(chosen, gpu):.2f}x"


def _phases() -> str:
    """Where an H100's time goes with 8,192 tokens."""
    rows = [["schedule", "head", "workspace", *PHASES, "sum", "bare products"]]
    for run, mib in _runs():
        for head, trained, shared in _HEADS:
            chosen = _plan(run, mib, 8192, trained, "H100")
            found = predict(chosen, "H100", shared=shared)
            times = [found.get(phase, 0.0) for phase in PHASES]
            cells = [f"{t:.1f}" for t in (*times, sum(found.values()), floor(chosen, "H100"))]
            rows.append([", ".join(run.values()), head, f"{mib} MiB", *cells])
    return _markdown(rows, words=2)


def _counts() -> str:
    """Instructions a pair, as they go into both."""
    figures = ("a pair", "of them MUFU", "registers", "programs a processor", *_PRODUCT)
    rows = [["GPU", "kernel", "case", *figures]]
    names = {gpu.target: gpu.name for gpu in reversed(GPUS.values())}  # the first of a target
    for k in counted()["kernels"]:
        counts = k["all"], k["special"], k["registers"], k["blocks_per_processor"]
        product = ["", ""]
        if k["product"]:
            waits = ", ".join(map(str, k["product"]["waits"])) or "no wgmma"
            product = [waits, str(k["product"]["barriers"])]
        rows.append([names[k["target"]], k["kernel"], k["case"], *map(str, counts), *product])
    return _markdown(rows, words=3)


def _runs() -> Iterator[tuple[dict[str, str], int]]:
    for run, workspaces in RUNS:
        for mib in workspaces:
            yield run, mib


def _plan(run: dict[str, str], mib: int, tokens: int, trained: bool, gpu: str) -> Plan:
    """As a machine with that GPU makes it."""
    how = {"dtype": torch.bfloat16, "device": "cuda", "grad_weight": trained}
    with mock.patch.object(planning, "processors_of", lambda _: GPUS[gpu].processors):
        return plan(tokens, HIDDEN, VOCAB, workspace_bytes=mib * _MIB, **how, **run)


def _markdown(rows: list[list[str]], words: int) -> str:
    """A table whose first `words` columns are words; the others are figures, to the right."""
    rule = ["---"] * words + ["---:"] * (len(rows[0]) - words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (rows[0], rule, *rows[1:]))
