"""Peak memory of a run, from shapes alone: what each phase of a step holds at its fullest moment.

Bytes beside Python and the libraries, from the second step on, when AdamW has its moments. The
layers are those of Llama and Qwen as transformers writes them; what they keep for the backward
pass was read off torch's saved-tensor hooks and is named where it is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from opsd_kernels import plan

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_BESIDE = ("embed_tokens", "lm_head")
_FP32 = 4
# Per vocabulary entry of a sampled row: float32 logits twice and probabilities, float64 sums.
_SAMPLING = 20


@dataclass(frozen=True)
class Sizes:
    """A decoder's shapes, and its numbers of weights."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool
    eager: bool  # attention weights are tensors
    weights: int  # all
    linear: int  # in layers and head: what a product reads
    largest: int  # of a single tensor
    trained: int
    adapted: frozenset[str]  # linear layers with trained weights
    rank: int  # of the adapters; 0: all weights are trained
    unknown: tuple[str, ...] = ()  # layers that are not Llama's, so that `predict` is wrong

    @property
    def queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class Generation:
    """The largest batch that the transformers engine decodes at a time."""

    rows: int
    prompt: int  # tokens
    new: int


@dataclass(frozen=True)
class Work:
    """One process's share of a step, at its largest."""

    tokens: int  # of a micro-batch under the student's prompts, padding included
    teacher_tokens: int  # under the teacher's
    longest: int  # sequence
    loss_tokens: int  # of a micro-batch
    all_loss_tokens: int  # of all micro-batches
    rollout: Generation | None
    evaluation: Generation | None


@dataclass(frozen=True)
class Setup:
    """How the step is computed."""

    itemsize: int  # of the compute type
    file_itemsize: int  # of the weights in the model's file
    checkpointing: bool
    loss: dict[str, Any]  # options of opsd_kernels.plan
    teacher: Sizes | None = None  # the model that `precompute` runs; None: nothing
    teacher_itemsize: int = 0  # of another model's weights; 0: it is the policy itself
    keeps_states: bool = False  # the teacher's hidden states wait for the student's forward
    copied: bool = False  # the trained weights, for a teacher that is an older policy
    shards: int = 1  # processes that the weights are cut over
    processes: int = 1


@dataclass(frozen=True)
class Phase:
    """Named parts of one phase's peak, in bytes."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def sizes_of(model: nn.Module, config: Any, rank: int, eager: bool) -> Sizes:
    """From a model on the meta device and its text configuration."""
    parameters = list(model.named_parameters())
    base = [(name, p) for name, p in parameters if "lora_" not in name]
    trained = [name for name, p in parameters if p.requires_grad]
    linear = sum(p.numel() for name, p in base if p.ndim == 2 and "embed_tokens" not in name)
    plain = [name.replace(".base_layer", "") for name, p in base if p.ndim > 1]
    kinds = {name.removesuffix(".weight").rpartition(".")[2] for name in plain}
    if config.tie_word_embeddings:
        linear += config.vocab_size * config.hidden_size
    return Sizes(
        hidden=config.hidden_size,
        inner=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
        layers=config.num_hidden_layers,
        heads=config.num_attention_heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads,
        vocab=config.vocab_size,
        qk_norm=any("q_norm" in name for name, _ in base),
        eager=eager,
        weights=sum(p.numel() for _, p in base),
        linear=linear,
        largest=max(p.numel() for _, p in parameters if p.requires_grad),
        trained=sum(p.numel() for _, p in parameters if p.requires_grad),
        adapted=frozenset(x for x in _LINEAR if any(f".{x}." in name for name in trained)),
        rank=rank,
        unknown=tuple(sorted(kinds.difference(_LINEAR, _BESIDE))),
    )


def predict(x: Sizes, work: Work, setup: Setup) -> dict[str, Phase]:
    """The peak of each phase."""
    held = _held(x, setup)
    moments = {"AdamW's moments": 2 * _FP32 * x.trained // setup.shards}
    # A phase of several micro-batches adds to the gradients that the first one left.
    gradients = {"gradients": _FP32 * x.trained // setup.shards}
    phases = {
        "load": held | _file(x, setup),
        "evaluation": work.evaluation and held | moments | _generate(x, work.evaluation, setup),
        "rollout": work.rollout and held | moments | _generate(x, work.rollout, setup),
        "teacher": setup.teacher and held | moments | _teacher(x, work, setup),
        "student": held | moments | gradients | _student(x, work, setup),
        "optimizer": held | moments | gradients | _update(x, setup),
    }
    return {name: Phase(parts) for name, parts in phases.items() if parts}


def _file(x: Sizes, setup: Setup) -> dict[str, int]:
    """On a CPU weights of the file's type are the file itself, mapped; others are made of it."""
    wanted = _FP32 if x.rank == 0 else setup.itemsize
    converted = setup.loss["device"].type == "cpu" and setup.file_itemsize != wanted
    return {"the file": setup.file_itemsize * x.weights} if converted else {}


def _held(x: Sizes, setup: Setup) -> dict[str, int]:
    """What stays in memory throughout."""
    if x.rank == 0:
        parts = {"weights, float32": _FP32 * x.weights // setup.shards}
    else:
        parts = {
            "frozen weights": setup.itemsize * x.weights // setup.shards,
            "adapters, float32": _FP32 * x.trained // setup.shards,
        }
    if setup.copied:
        head = setup.itemsize * x.vocab * x.hidden if setup.keeps_states and x.rank == 0 else 0
        parts["copy of the trained weights"] = _FP32 * x.trained // setup.shards + head
    if setup.teacher_itemsize:
        teacher = setup.teacher
        head = teacher.vocab * teacher.hidden  # whole on each process
        cut = (teacher.weights - head) // setup.shards
        parts["the teacher's weights"] = setup.teacher_itemsize * (head + cut)
    return parts


def _generate(x: Sizes, batch: Generation, setup: Setup) -> dict[str, int]:
    rows, item = batch.rows, setup.itemsize
    whole = 0
    if setup.processes > 1:
        whole = item * (x.weights + (x.trained if x.rank else 0))
    elif item < _FP32:  # float32 weights have a copy in the compute type
        whole = item * x.trained
    one_layer = 2 * rows * (batch.prompt + batch.new) * x.keys * item
    prefill = rows * batch.prompt * _forward(x, item, item)
    prefill += _scores(x, rows * batch.prompt, batch.prompt, item)
    logits = rows * x.vocab * (item + _SAMPLING)
    return {
        "weights in the compute type": whole,
        "KV cache": x.layers * one_layer,
        "a layer's prefill, or logits": max(prefill + one_layer, logits),
    }


def _teacher(x: Sizes, work: Work, setup: Setup) -> dict[str, int]:
    teacher = setup.teacher
    if setup.teacher_itemsize:
        item = stream = setup.teacher_itemsize
        cast = 0
    else:
        item, stream, cast = setup.itemsize, _stream(x, setup), _cast(x, setup)
    layer = work.teacher_tokens * _forward(teacher, item, stream)
    return {
        "weights in the compute type": cast,
        "hidden states of all micro-batches": _states(work, setup),
        "a layer's forward": layer + _scores(teacher, work.teacher_tokens, work.longest, item),
    }


def _states(work: Work, setup: Setup) -> int:
    """The teacher's hidden states at the completions, until the student has been there too."""
    if not setup.keeps_states:
        return 0
    item = setup.teacher_itemsize or _stream(setup.teacher, setup)
    return work.all_loss_tokens * setup.teacher.hidden * item


def _student(x: Sizes, work: Work, setup: Setup) -> dict[str, int]:
    item, stream = setup.itemsize, _stream(x, setup)
    layer = work.tokens * saved_per_token(x, item, stream)
    layer += _scores(x, work.tokens, work.longest, item)
    # The backward pass of a layer's MLP: gradients of gate, up and product, of its residual input.
    backward = work.tokens * (3 * item * x.inner + 2 * stream * x.hidden)
    if setup.checkpointing:
        saved, backward = x.layers * work.tokens * stream * x.hidden, layer + backward
    else:
        saved = x.layers * layer
    # The final norm, and the completions' states with their gradient.
    saved += work.tokens * _norm(x, item, stream)
    saved += 2 * work.loss_tokens * x.hidden * stream
    loss = plan(work.loss_tokens, x.hidden, x.vocab, grad_weight=x.rank == 0, **setup.loss)
    head = loss.accumulator_bytes
    return {
        "weights in the compute type": _cast(x, setup),
        "the teacher's hidden states": _states(work, setup),
        "activations kept for backward": saved,
        "the loss's workspace, or a layer's backward": max(loss.workspace_bytes + head, backward),
    }


def _update(x: Sizes, setup: Setup) -> dict[str, int]:
    # The denominator of a tensor at a time, and its square root; a GPU takes all of them at once.
    tensors = x.trained if setup.loss["device"].type == "cuda" else x.largest
    return {"AdamW's temporaries": 2 * _FP32 * tensors // setup.shards}


def saved_per_token(x: Sizes, item: int, stream: int) -> int:
    """Bytes a layer keeps for backward: item of the compute type, stream of the residual stream."""
    full = x.rank == 0
    # Autocast casts a float32 stream once for each product that reads it.
    cast = stream > item
    readers = [[n for n in names if n in x.adapted] for names in (_LINEAR[:3], _LINEAR[4:6])]
    inputs = sum((len(names) if cast else bool(names)) for names in readers) * item * x.hidden
    norms = 2 * _norm(x, item, stream)
    if x.qk_norm:  # the projections in float32, their norms before the weight
        width = x.queries + x.keys
        norms += width * (_FP32 + item * full) + _FP32 * (x.heads + x.kv_heads)
    # Attention: queries, keys, values, and its output, which o_proj reads too; the log-sum-exp.
    attention = item * (2 * x.queries + 2 * x.keys) + _FP32 * x.heads
    # MLP: gate, up (swiglu.py), and their product for down_proj's gradient.
    mlp = item * x.inner * (3 if "down_proj" in x.adapted else 2)
    adapters = item * x.rank * len(x.adapted)
    return inputs + norms + attention + mlp + adapters


def _norm(x: Sizes, item: int, stream: int) -> int:
    """RMSNorm keeps its input in float32 and, for a trained weight, what it multiplies."""
    return x.hidden * (_FP32 + (stream if x.rank == 0 else 0)) + _FP32


def _scores(x: Sizes, tokens: int, longest: int, item: int) -> int:
    """Eager attention keeps softmax in float32 and in the compute type; fused ones keep none."""
    return tokens * longest * x.heads * (_FP32 + item) if x.eager else 0


def _forward(x: Sizes, item: int, stream: int) -> int:
    """Per token, a layer's forward without gradient: its MLP or its norm, whichever holds more."""
    mlp = (stream + item) * x.hidden + 4 * item * x.inner  # gate, up, silu(gate), product
    norm = (stream + 3 * _FP32) * x.hidden
    return max(mlp, norm)


def _stream(x: Sizes, setup: Setup) -> int:
    """The residual stream has the type of the embeddings: float32 where autocast trains them."""
    return _FP32 if x.rank == 0 and setup.processes == 1 else setup.itemsize


def _cast(x: Sizes, setup: Setup) -> int:
    """Copies of trained weights that autocast or FSDP makes for its products."""
    if setup.processes > 1:  # the root's group, and two layers of those that are gathered
        root = x.weights - (x.linear - x.vocab * x.hidden)
        return setup.itemsize * (root + 2 * (x.weights - root) // x.layers)
    if setup.itemsize == _FP32:
        return 0
    return setup.itemsize * (x.trained if x.rank else x.linear)
