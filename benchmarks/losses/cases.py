"""The cases: operations at the sizes of models, and which of them are measured by default."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import product

import torch

OPERATIONS = {
    "jsd": "JSD, beta 0.5",
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "logprob": "log-probability with entropy",
    "cross_entropy": "cross-entropy",
    "advantage": "sampled-token advantage",
    "topk": "forward KL over the teacher's top 64 and the rest",
    "largest": "log-probabilities of the 64 largest logits",
}
TOP_K = 64
ONE_HEAD = ("logprob", "cross_entropy", "largest")
DIFFERENTIATED = tuple(name for name in OPERATIONS if name != "largest")
HEADS = ("frozen", "trained", "no_grad")  # no_grad: forward only
DTYPES = ("bfloat16", "float16", "float32")
TOKENS = tuple(2**power for power in range(8, 17))  # 256 to 65536
# Contenders that compile run in the first cases of a default selection only, this many.
COMPILED = 2
# The largest case on a CPU, in floating-point operations: about 4 s of bare bf16 products.
_CPU_OPERATIONS = 1.5e12


@dataclass(frozen=True)
class Shape:
    """Hidden size and vocabulary of a model's LM head."""

    name: str
    hidden: int
    vocab: int

    @property
    def slug(self) -> str:
        """The name in a case's id."""
        return self.name.lower().replace("-", "_")


SMOLLM2 = Shape("SmolLM2-135M", 576, 49152)
MIDDLE = Shape("1024x32k", 1024, 32768)  # not a model's
QWEN3_06B = Shape("Qwen3-0.6B", 1024, 151936)
QWEN3_17B = Shape("Qwen3-1.7B", 2048, 151936)
QWEN3_8B = Shape("Qwen3-8B", 4096, 151936)
LLAMA3 = Shape("Llama-3-8B", 4096, 128256)
TINY = Shape("tiny", 32, 131)
SHAPES = (SMOLLM2, MIDDLE, QWEN3_06B, QWEN3_17B, QWEN3_8B, LLAMA3)


@dataclass(frozen=True)
class Case:
    """One comparison: every contender on the same inputs.

    inputs: "random", "close" (the teacher is the student and 5 % noise) or "real" (SmolLM2 as
    student and as privileged teacher, captured by `python -m benchmarks.real_pair`).
    """

    operation: str
    head: str
    dtype: str
    shape: Shape
    tokens: int
    inputs: str = "random"

    @property
    def title(self) -> str:
        """The operation's name in tables."""
        return OPERATIONS[self.operation]

    @property
    def id(self) -> str:
        """The case as one word; `find` is the inverse."""
        names = (self.operation, self.head, self.dtype, self.shape.slug, self.tokens, self.inputs)
        return "-".join(map(str, names))

    @property
    def small(self) -> Case:
        """The same case at a tiny size, to load libraries."""
        return replace(self, shape=TINY, tokens=64, inputs="random")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return getattr(torch, self.dtype)

    @property
    def trained(self) -> bool:
        """Whether the head needs a gradient."""
        return self.head == "trained"

    @property
    def differentiated(self) -> bool:
        """Whether there is a backward pass."""
        return self.head != "no_grad"

    @property
    def models(self) -> int:
        """1 for the student alone, 2 with a teacher."""
        return 1 if self.operation in ONE_HEAD else 2

    @property
    def gemms(self) -> int:
        """Matrix products that every implementation needs: logits per model, one per gradient."""
        return self.models + int(self.differentiated) + int(self.trained)

    @property
    def input_bytes(self) -> int:
        """Bytes of both models' hidden states and heads."""
        size = (self.tokens + self.shape.vocab) * self.shape.hidden
        return 2 * size * self.torch_dtype.itemsize

    @property
    def operations(self) -> int:
        """Floating-point operations of these products."""
        return self.gemms * 2 * self.tokens * self.shape.hidden * self.shape.vocab


def default_cases(device: torch.device) -> list[Case]:
    """The default selection, at most five minutes on 2 cores; the most important cases first."""
    if device.type == "cuda":
        return _gpu_cases()
    bf16 = "bfloat16"
    others = ("forward_kl", "reverse_kl", "logprob", "advantage", "topk")
    return [
        Case("jsd", "frozen", bf16, SMOLLM2, 512),
        Case("cross_entropy", "frozen", bf16, SMOLLM2, 256),
        Case("jsd", "frozen", bf16, SMOLLM2, 256, "close"),
        Case("jsd", "frozen", bf16, SMOLLM2, 256, "real"),
        Case("jsd", "trained", bf16, SMOLLM2, 256),
        Case("forward_kl", "frozen", "float32", SMOLLM2, 256),
        *(Case(name, "frozen", bf16, SMOLLM2, 256) for name in others),
        Case("largest", "no_grad", bf16, SMOLLM2, 1024),
    ]


def _gpu_cases() -> list[Case]:
    bf16 = "bfloat16"
    others = ("forward_kl", "reverse_kl", "logprob", "advantage")
    return [
        Case("jsd", "frozen", bf16, QWEN3_8B, 8192),
        Case("cross_entropy", "frozen", bf16, QWEN3_8B, 8192),
        Case("jsd", "trained", bf16, QWEN3_8B, 8192),
        Case("jsd", "frozen", bf16, QWEN3_8B, 1024),
        Case("cross_entropy", "trained", bf16, LLAMA3, 8192),
        *(Case(name, "frozen", bf16, QWEN3_8B, 8192) for name in others),
        *(Case(name, "no_grad", bf16, QWEN3_8B, 8192) for name in ("logprob", "jsd")),
        *(Case("jsd", "frozen", bf16, shape, 8192) for shape in (LLAMA3, QWEN3_17B, QWEN3_06B)),
        *(Case("jsd", "frozen", bf16, SMOLLM2, 1024, inputs) for inputs in ("close", "real")),
        Case("jsd", "frozen", "float32", QWEN3_06B, 4096),
        Case("logprob", "trained", bf16, QWEN3_8B, 8192),
        *(Case("topk", head, bf16, QWEN3_8B, 8192) for head in ("frozen", "trained")),
        Case("largest", "no_grad", bf16, QWEN3_8B, 8192),
        # The longest last: a stage with a time limit may not reach them.
        *(Case("jsd", "frozen", bf16, QWEN3_8B, n) for n in (2048, 4096, 16384, 32768, 65536)),
    ]


def full_cases(device: torch.device, memory: int) -> list[Case]:
    """All cases that fit into `memory` bytes and, on a CPU, take seconds."""
    random = _kinds(DTYPES, SHAPES, TOKENS)
    alike = [
        Case(name, "frozen", dtype, SMOLLM2, tokens, inputs)
        for name, dtype, tokens, inputs in product(
            DIFFERENTIATED, DTYPES, (256, 1024), ("close", "real")
        )
    ]
    return [case for case in (*random, *alike) if fits(case, device, memory)]


def _kinds(*sizes: Iterable) -> list[Case]:
    """Every operation with every head it has, at dtypes, shapes and tokens."""
    rows = [*product(DIFFERENTIATED, HEADS, *sizes), *product(("largest",), ("no_grad",), *sizes)]
    return [Case(*row) for row in rows]


def fits(case: Case, device: torch.device, memory: int) -> bool:
    """Whether the case fits into so many bytes and, on a CPU, is small enough."""
    # Besides the inputs: a trained head's gradient and fp32 accumulator, and 1 GiB of workspace.
    gradient = 3 * case.shape.vocab * case.shape.hidden * 4 if case.trained else 0
    if case.input_bytes + gradient + 2**30 > 0.8 * memory:
        return False
    return device.type == "cuda" or case.operations <= _CPU_OPERATIONS


def check_cases() -> list[Case]:
    """Every operation, head and dtype at a size that takes milliseconds."""
    return _kinds(DTYPES, (TINY,), (48,))


def find(identifier: str) -> Case:
    """The case of an id; raises ValueError for an unknown part."""
    operation, head, dtype, slug, tokens, inputs = identifier.split("-")
    shape = {shape.slug: shape for shape in (*SHAPES, TINY)}.get(slug)
    if operation not in OPERATIONS or shape is None:
        raise ValueError(f"unknown case {identifier!r}")
    return Case(operation, head, dtype, shape, int(tokens), inputs)
