"""Predict the peak memory of each phase of a run from shapes alone.

Counted are the bytes of tensors, without Python and the libraries, from the second step on: AdamW's
moments are there then. The layers are those of Llama and Qwen in transformers; what they save for
the backward pass was measured with torch's saved-tensor hooks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from opsd_kernels import plan

_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_NOT_IN_LAYERS = ("embed_tokens", "lm_head")
_FP32 = 4  # bytes
_TOP_TOKEN = 12  # bytes of a teacher's likely token: an id and a log-probability
# Bytes per vocabulary entry of a sampled row: float32 logits twice, probabilities, float64 sums.
_SAMPLING = 20


@dataclass(frozen=True)
class Sizes:
    """A decoder's shapes and numbers of weights."""

    hidden: int
    inner: int  # of the MLP
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    qk_norm: bool
    eager: bool  # attention weights are materialised
    weights: int  # of the base model
    linear: int  # of these, in matrix products: layers and head
    largest: int  # of the largest trained tensor
    trained: int
    adapted: frozenset[str]  # linear layers with trained weights
    rank: int  # of the adapters; 0: all weights are trained
    unknown: tuple[str, ...] = ()  # layers that Llama does not have: `predict` would be wrong

    @property
    def queries(self) -> int:
        """Width of the queries of all heads."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of the keys of all heads; the values have the same."""
        return self.kv_heads * self.head_dim


@dataclass(frozen=True)
class GenerationBatch:
    """The largest batch that the transformers engine generates at a time."""

    rows: int
    prompt: int  # tokens of the longest prompt
    new: int  # tokens generated


@dataclass(frozen=True)
class LargestStep:
    """One process's share of the largest possible step, in tokens."""

    tokens: int  # of a micro-batch under the student's prompts, padding included
    teacher_tokens: int  # of a micro-batch under the teacher's prompts
    longest: int  # of a sequence
    loss_tokens: int  # of a micro-batch
    all_loss_tokens: int  # of all micro-batches
    rollout: GenerationBatch | None
    evaluation: GenerationBatch | None


@dataclass(frozen=True)
class OtherTeacher:
    """A teacher that is a model of its own."""

    sizes: Sizes
    itemsize: int  # bytes of its dtype


@dataclass(frozen=True)
class Setup:
    """Dtypes, sharding and teacher of a run."""

    itemsize: int  # bytes of the compute dtype
    file_itemsize: int  # bytes of the dtype in the model's file; 0: processes read their parts
    checkpointing: bool
    loss: dict[str, Any]  # options of opsd_kernels.plan
    teacher: Sizes | None = None  # the policy's own model, if `precompute` runs it
    others: tuple[OtherTeacher, ...] = ()
    keeps_states: bool = False  # the teacher's hidden states are kept for the student's pass
    top_k: int = 0  # or so many of its most likely tokens at each completion token; 0: none
    copies: int = 0  # of the trained weights: older policies
    logprob_passes: int = 0  # of the policy's own model for a policy gradient, without gradient
    beside: tuple[str, ...] = ()  # losses that the student's phase has beside `loss`
    mixture: bool = False  # samples are drawn from the first of `others` too
    shards: int = 1  # processes that the weights are sharded over
    processes: int = 1


@dataclass(frozen=True)
class PhaseMemory:
    """The parts of one phase's peak, in bytes by name."""

    parts: dict[str, int]

    @property
    def total(self) -> int:
        """The phase's peak in bytes."""
        return sum(self.parts.values())


def sizes_of(model: nn.Module, config: Any, rank: int, eager: bool) -> Sizes:
    """The sizes of a model on the meta device, adapters included.

    config  its transformers text configuration
    rank    of the adapters; 0: all weights are trained
    eager   whether attention weights are materialised
    """
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
        unknown=tuple(sorted(kinds.difference(_LINEAR, _NOT_IN_LAYERS))),
    )


def predict(sizes: Sizes, step: LargestStep, setup: Setup) -> dict[str, PhaseMemory]:
    """The peak of each phase that the run has."""
    held = _held(sizes, setup)
    moments = {"AdamW's moments": 2 * _FP32 * sizes.trained // setup.shards}
    # Micro-batches after the first find its gradients in memory.
    gradients = {"gradients": _FP32 * sizes.trained // setup.shards}
    phases = {"load": held | _file(sizes, setup)}
    if step.evaluation is not None:
        phases["evaluation"] = held | moments | _generate(sizes, step.evaluation, setup)
    if step.rollout is not None:
        phases["rollout"] = held | moments | _rollout(sizes, step.rollout, setup)
    if setup.teacher is not None or setup.others:
        phases["teacher"] = held | moments | _teacher(sizes, step, setup)
    phases["student"] = held | moments | gradients | _student(sizes, step, setup)
    phases["optimizer"] = held | moments | gradients | _update(sizes, setup)
    return {name: PhaseMemory(parts) for name, parts in phases.items()}


def _file(sizes: Sizes, setup: Setup) -> dict[str, int]:
    """On a CPU weights in the file's dtype are the mapped file itself, others are copies."""
    wanted = _FP32 if sizes.rank == 0 else setup.itemsize
    converted = setup.loss["device"].type == "cpu" and setup.file_itemsize != wanted
    # A process that reads its part reads a layer at a time: little beside the rest.
    return {"the file": setup.file_itemsize * sizes.weights} if converted else {}


def _held(sizes: Sizes, setup: Setup) -> dict[str, int]:
    """What stays in memory throughout."""
    if sizes.rank == 0:
        parts = {"weights, float32": _FP32 * sizes.weights // setup.shards}
    else:
        parts = {
            "frozen weights": setup.itemsize * sizes.weights // setup.shards,
            "adapters, float32": _FP32 * sizes.trained // setup.shards,
        }
    if setup.copies:
        head = (
            setup.itemsize * sizes.vocab * sizes.hidden
            if setup.keeps_states and sizes.rank == 0
            else 0
        )
        copies = setup.copies * _FP32 * sizes.trained // setup.shards
        parts["copy of the trained weights"] = copies + head
    weights = 0
    for other in setup.others:
        head = other.sizes.vocab * other.sizes.hidden  # not sharded
        layers = (other.sizes.weights - head) // setup.shards
        weights += other.itemsize * (head + layers)
    return parts | ({"the teacher's weights": weights} if weights else {})


def _rollout(sizes: Sizes, batch: GenerationBatch, setup: Setup) -> dict[str, int]:
    parts = _generate(sizes, batch, setup)
    if setup.mixture:
        teacher = setup.others[0]
        cache = teacher.sizes.layers * _cache(teacher.sizes, batch, teacher.itemsize)
        parts["the teacher's KV cache"] = cache
    return parts


def _cache(sizes: Sizes, batch: GenerationBatch, itemsize: int) -> int:
    """Bytes of a layer's keys and values."""
    return 2 * batch.rows * (batch.prompt + batch.new) * sizes.keys * itemsize


def _generate(sizes: Sizes, batch: GenerationBatch, setup: Setup) -> dict[str, int]:
    rows, item = batch.rows, setup.itemsize
    whole = 0
    if setup.processes > 1:
        whole = item * (sizes.weights + (sizes.trained if sizes.rank else 0))
        whole += _last_gathered(sizes, setup)
    elif item < _FP32:  # float32 weights are cast to the compute dtype
        whole = item * sizes.trained
    one_layer = _cache(sizes, batch, item)
    prefill = rows * batch.prompt * _forward(sizes, item, item)
    prefill += _scores(sizes, rows * batch.prompt, batch.prompt, item)
    logits = rows * sizes.vocab * (item + _SAMPLING)
    return {
        "weights in the compute type": whole,
        "KV cache": sizes.layers * one_layer,
        "a layer's prefill, or logits": max(prefill + one_layer, logits),
    }


def _teacher(sizes: Sizes, step: LargestStep, setup: Setup) -> dict[str, int]:
    tokens = step.teacher_tokens
    forward = 0
    for reader, item, stream in _readers(sizes, setup):
        layer = tokens * _forward(reader, item, stream) + _scores(
            reader, tokens, step.longest, item
        )
        forward = max(forward, layer, _choosing(reader, step, setup))
    return {
        "weights in the compute type": _cast(sizes, setup) if setup.teacher else 0,
        **_kept(sizes, step, setup),
        "a layer's forward, or the top tokens": forward,
    }


def _readers(sizes: Sizes, setup: Setup) -> list[tuple[Sizes, int, int]]:
    """The models that `precompute` runs, with the bytes of the compute dtype and of the residual
    stream's."""
    own = [(setup.teacher, setup.itemsize, _stream(sizes, setup))] if setup.teacher else []
    return own + [(other.sizes, other.itemsize, other.itemsize) for other in setup.others]


def _choosing(teacher: Sizes, step: LargestStep, setup: Setup) -> int:
    """The workspace of the teacher's logits, to choose its most likely tokens from."""
    if not setup.top_k:
        return 0
    options = {name: setup.loss[name] for name in ("dtype", "device", "workspace_bytes")}
    shape = step.loss_tokens, teacher.hidden, teacher.vocab
    return plan(*shape, loss="topk", k=setup.top_k, grad_input=False, **options).workspace_bytes


def _kept(sizes: Sizes, step: LargestStep, setup: Setup) -> dict[str, int]:
    """What the student's pass needs of the teacher at the completion tokens."""
    if setup.top_k:
        return {"the teacher's top tokens": step.all_loss_tokens * setup.top_k * _TOP_TOKEN}
    if not setup.keeps_states:
        return {}
    state = max(reader.hidden * stream for reader, _, stream in _readers(sizes, setup))
    return {"the teacher's hidden states": step.all_loss_tokens * state}


def _student(sizes: Sizes, step: LargestStep, setup: Setup) -> dict[str, int]:
    item, stream = setup.itemsize, _stream(sizes, setup)
    layer = step.tokens * saved_per_token(sizes, item, stream, setup.checkpointing)
    layer += _scores(sizes, step.tokens, step.longest, item)
    # Backward through a layer's MLP: gradients of gate, up and product, and of its residual input.
    backward = step.tokens * (3 * item * sizes.inner + 2 * stream * sizes.hidden)
    if setup.checkpointing:
        saved, backward = sizes.layers * step.tokens * stream * sizes.hidden, layer + backward
    else:
        saved = sizes.layers * layer
    # The final norm, and the completion tokens' hidden states with their gradient.
    saved += step.tokens * _norm(sizes, stream)
    saved += 2 * step.loss_tokens * sizes.hidden * stream
    loss = plan(
        step.loss_tokens, sizes.hidden, sizes.vocab, grad_weight=sizes.rank == 0, **setup.loss
    )
    head = loss.accumulator_bytes
    return {
        "weights in the compute type": _cast(sizes, setup),
        **_kept(sizes, step, setup),
        "activations kept for backward": saved,
        "the loss's workspace, or a layer's backward": max(loss.workspace_bytes + head, backward),
    }


def _last_gathered(sizes: Sizes, setup: Setup) -> int:
    """FSDP keeps a layer as it was gathered until the next is, beside the copies in its tensors."""
    layers = sizes.linear - sizes.vocab * sizes.hidden
    return setup.itemsize * layers // sizes.layers if setup.shards > 1 else 0


def _update(sizes: Sizes, setup: Setup) -> dict[str, int]:
    # The denominator and its square root: on a CPU tensor by tensor, on a GPU all tensors at once.
    tensors = sizes.trained if setup.loss["device"].type == "cuda" else sizes.largest
    return {
        "AdamW's temporaries": 2 * _FP32 * tensors // setup.shards,
        "the last layer that FSDP gathered": _last_gathered(sizes, setup),
    }


def saved_per_token(sizes: Sizes, item: int, stream: int, checkpointing: bool) -> int:
    """Bytes per token that a layer saves for backward; see model/recompute.py.

    item           bytes of the compute dtype
    stream         bytes of the residual stream's dtype
    checkpointing  what it saves while backward makes it again
    """
    readers = [[n for n in names if n in sizes.adapted] for names in (_LINEAR[:3], _LINEAR[4:6])]
    if stream > item:  # autocast casts a norm's result once per product that reads it
        copies = sum(map(len, readers))
    else:  # the result is made again unless all of the layer is
        copies = sum(map(bool, readers)) if checkpointing else 0
    inputs = copies * item * sizes.hidden
    norms = 2 * _norm(sizes, stream)
    if sizes.qk_norm:  # the projections, and a scale for each head
        norms += (sizes.queries + sizes.keys) * item + _FP32 * (sizes.heads + sizes.kv_heads)
    # Attention: queries, keys, values, and its output, which o_proj reads too; the log-sum-exp.
    attention = item * (2 * sizes.queries + 2 * sizes.keys) + _FP32 * sizes.heads
    # MLP: gate and up; down_proj's input is made again unless all of the layer is.
    product = checkpointing and "down_proj" in sizes.adapted
    mlp = item * sizes.inner * (3 if product else 2)
    adapters = item * sizes.rank * len(sizes.adapted)
    return inputs + norms + attention + mlp + adapters


def _norm(sizes: Sizes, stream: int) -> int:
    """An RMS norm saves its input and a float32 scale."""
    return sizes.hidden * stream + _FP32


def _scores(sizes: Sizes, tokens: int, longest: int, item: int) -> int:
    """Eager attention saves the softmax in float32 and the compute dtype, fused attention none."""
    return tokens * longest * sizes.heads * (_FP32 + item) if sizes.eager else 0


def _forward(sizes: Sizes, item: int, stream: int) -> int:
    """Bytes per token of a layer's forward without gradient: its MLP or its norm, the larger."""
    mlp = (stream + item) * sizes.hidden + 4 * item * sizes.inner  # gate, up, silu(gate), product
    norm = (stream + 3 * _FP32) * sizes.hidden
    return max(mlp, norm)


def _stream(sizes: Sizes, setup: Setup) -> int:
    """Bytes of the residual stream's dtype, the embeddings': float32 if autocast trains them."""
    return _FP32 if sizes.rank == 0 and setup.processes == 1 else setup.itemsize


def _cast(sizes: Sizes, setup: Setup) -> int:
    """Copies of weights in the compute dtype: autocast's casts, or what FSDP gathers."""
    if setup.processes > 1:  # the root's parameters and two gathered layers, one of them twice
        layers = sizes.linear - sizes.vocab * sizes.hidden
        gathered = setup.itemsize * (sizes.weights - layers + 2 * layers // sizes.layers)
        return gathered + _last_gathered(sizes, setup)
    if setup.itemsize == _FP32:
        return 0
    return setup.itemsize * (sizes.trained if sizes.rank else sizes.linear)
