"""Predict the seconds of a step's phases on a device, from shapes alone.

Operations run one after the other, each as long as its arithmetic or its bytes. FSDP2 gathers a
layer's weights for its forward pass and again for its backward pass, and then sums its gradients;
all three run beside the computation of the neighbouring layers where the device can. Embeddings and
head are gathered at the start of a forward pass, when there is nothing to compute yet, and stay
until a backward pass has ended. Left out is the host: Python, and the start of kernels.
"""

from __future__ import annotations

from dataclasses import dataclass

from opsd_kernels import Plan, plan
from opsd_train.dry_run.devices import Device, Seconds
from opsd_train.dry_run.largest_step import MicroBatch, PlannedStep, Rows
from opsd_train.dry_run.memory import GenerationBatch, Setup, Sizes
from opsd_train.dry_run.operations import CountedLayer

_FP32 = 4  # bytes
# Bytes that PyTorch's AdamW reads and writes for a weight, gradient clipping included.
ADAMW = 84
SWAP = 24  # a second copy of a weight swapped in: cloned and copied twice
AVERAGE = 12  # a moving average updated
# Bytes for a vocabulary entry of a sampled row: float32 logits, temperature, softmax in float32,
# its sums in float64.
SAMPLING = 44


@dataclass(frozen=True)
class Reader:
    """A model that runs, and how its weights are spread over the ranks."""

    sizes: Sizes
    layer: CountedLayer
    itemsize: int  # of the compute dtype
    shards: int  # ranks that share its layers; 1: each has them all
    prefetches: bool = True  # the next layer is gathered while one computes

    @property
    def head(self) -> int:
        """Weights of embeddings, final norm and head."""
        return self.sizes.weights - self.sizes.layers * self.layer_weights

    @property
    def layer_weights(self) -> int:
        """Weights of a layer, without adapters."""
        layers = self.sizes.linear - self.sizes.vocab * self.sizes.hidden
        return layers // self.sizes.layers

    @property
    def layer_gathered(self) -> int:
        """Bytes of a layer with its adapters in the compute dtype."""
        adapters = self.sizes.trained // self.sizes.layers if self.sizes.rank else 0
        return self.itemsize * (self.layer_weights + adapters)

    @property
    def layer_trained(self) -> int:
        """Trained weights of a layer."""
        return self.sizes.trained // self.sizes.layers if self.sizes.rank else self.layer_weights


@dataclass(frozen=True)
class Run:
    """A planned step of a recipe on a device."""

    step: PlannedStep
    setup: Setup
    student: Reader
    teachers: tuple[Reader, ...]  # that the phase before the student's runs
    own_teacher: bool  # it is the student's model
    initial: bool  # with its adapters off
    updates: int  # optimizer steps for a rollout
    averages: bool  # the teacher is a moving average
    device: Device


def predict_seconds(run: Run) -> dict[str, Seconds]:
    """Seconds of each phase, by the names in metrics.jsonl, of the slowest rank."""
    phases: dict[str, Seconds] = {}
    if run.step.generations:
        phases["rollout"] = _rollout(run)
    if run.teachers:
        phases["teacher"] = _teacher(run)
    phases["student"] = _student(run) * run.updates
    phases["optimizer"] = _optimizer(run) * run.updates
    return phases


# ------------------------------------------------------------------------------------------ phases


def _teacher(run: Run) -> Seconds:
    """The slowest teacher's pass over every micro-batch, without gradient."""
    found = [_reading(run, reader) for reader in run.teachers]
    slowest = max(found, key=lambda seconds: seconds.total)
    slowest += _logprobs(run) * run.setup.logprob_passes
    if not run.own_teacher or not run.setup.copies:
        return slowest
    weights = run.student.sizes.trained / run.student.shards
    return slowest + run.device.moving(2 * SWAP * weights * run.setup.copies)


def _logprobs(run: Run) -> Seconds:
    """A pass of the policy over every micro-batch, for the log-probabilities of its samples."""
    device, reader, seconds = run.device, run.student, Seconds()
    for batch in run.step.micro_batches:
        layer = device.work(reader.layer.reading(batch.student, not run.initial))
        seconds += _through_layers(reader, device, layer, _gather(reader, device), 0.0)
        seconds += _ends(reader, device, batch.student.tokens)
        product = batch.loss_tokens, reader.sizes.hidden, reader.sizes.vocab
        seconds += device.product(*product, reader.itemsize)
    return seconds


def _reading(run: Run, reader: Reader) -> Seconds:
    device = run.device
    seconds = _root_gathered(reader, device) if run.own_teacher else Seconds()
    for batch in run.step.micro_batches:
        layer = device.work(reader.layer.reading(batch.teacher, not run.initial))
        seconds += _through_layers(reader, device, layer, _gather(reader, device), 0.0)
        seconds += _ends(reader, device, batch.teacher.tokens)
        seconds += _teacher_products(run, reader, batch)
    return seconds


def _teacher_products(run: Run, reader: Reader, batch: MicroBatch) -> Seconds:
    """What the teacher's phase multiplies with the head."""
    if run.setup.top_k:
        options = {name: run.setup.loss[name] for name in ("dtype", "device", "workspace_bytes")}
        shape = batch.loss_tokens, reader.sizes.hidden, reader.sizes.vocab
        chosen = plan(*shape, loss="topk", k=run.setup.top_k, grad_input=False, **options)
        return loss_seconds(run.device, chosen, reader.itemsize, heads=1)
    if run.setup.keeps_states:
        return Seconds()
    product = batch.loss_tokens, reader.sizes.hidden, reader.sizes.vocab
    return run.device.product(*product, reader.itemsize)  # log-probabilities


def _student(run: Run) -> Seconds:
    """Forward, loss and backward of every micro-batch."""
    device, reader, setup = run.device, run.student, run.setup
    seconds, sizes = Seconds(), run.student.sizes
    for index, batch in enumerate(run.step.micro_batches):
        forward, backward = map(device.work, reader.layer.training(batch.student))
        gather, last = _gather(reader, device), index + 1 == len(run.step.micro_batches)
        if index > 0 or not (run.teachers and run.own_teacher):
            seconds += _root_gathered(reader, device)
        seconds += _through_layers(reader, device, forward, gather, 0.0)
        seconds += _ends(reader, device, batch.student.tokens) * 2
        made = plan(
            batch.loss_tokens, sizes.hidden, sizes.vocab, grad_weight=sizes.rank == 0, **setup.loss
        )
        heads = 2 if made.loss == "divergence" else 1
        seconds += loss_seconds(device, made, reader.itemsize, heads)
        if heads == 1 and setup.keeps_states:  # the teacher's log-probability of the sample
            shape = batch.loss_tokens, sizes.hidden, sizes.vocab
            seconds += device.product(*shape, reader.itemsize)
        for name in setup.beside:  # once more from the hidden states
            options = setup.loss | {"loss": name, "two_passes": False}
            shape = batch.loss_tokens, sizes.hidden, sizes.vocab
            own = plan(*shape, grad_weight=sizes.rank == 0, **options)
            seconds += loss_seconds(device, own, reader.itemsize, 2 if name == "divergence" else 1)
        reduce = _reduce(run, reader.layer_trained, last)
        seconds += _through_layers(reader, device, backward, gather, reduce)
        if sizes.rank == 0:  # embeddings and head, after all layers
            seconds += device.moving((reader.itemsize + _FP32) * reader.head)
            seconds += Seconds(communication=_reduce(run, reader.head, last))
        if index > 0:  # added to what there is
            seconds += device.moving(3 * _FP32 * sizes.trained / reader.shards)
    return seconds


def _optimizer(run: Run) -> Seconds:
    """Clip the gradients, update weights and moments; then the moving average."""
    each = ADAMW + (AVERAGE if run.averages else 0)
    sums = 3 * 2 * run.device.gathering(8, run.setup.processes)  # norm, loss, norm again
    moved = run.device.moving(each * run.student.sizes.trained / run.student.shards)
    return moved + Seconds(communication=sums)


def _rollout(run: Run) -> Seconds:
    """Generation by the transformers engine: every rank gathers the model and decodes alone."""
    reader, device = run.student, run.device
    seconds = _root_gathered(reader, device)
    gathered = _copied(reader, device, reader.layer_gathered)
    gathered += Seconds(communication=_gather(reader, device))
    seconds += gathered * reader.sizes.layers
    for batch in run.step.generations:
        for sampled in (reader, *(run.teachers if run.setup.mixture else ())):
            seconds += _generation(sampled, device, batch)
    return seconds


def _generation(reader: Reader, device: Device, batch: GenerationBatch) -> Seconds:
    """Prefill, then a pass over one token a row for every token but the last."""
    sizes, item = reader.sizes, reader.itemsize
    prefill = device.work(reader.layer.reading(Rows(batch.rows, batch.prompt, False), True))
    step = device.work(reader.layer.reading(Rows(batch.rows, 1, False), True))
    # Keys and values of all tokens so far, half of the new ones on average.
    length = batch.prompt + batch.new / 2
    cache = device.moving(2 * item * sizes.keys * batch.rows * length)
    logits = device.product(batch.rows, sizes.hidden, sizes.vocab, item)
    logits += device.moving((item + SAMPLING) * batch.rows * sizes.vocab)
    seconds = prefill * sizes.layers + logits * batch.new
    return seconds + (step + cache) * (sizes.layers * (batch.new - 1))


# ------------------------------------------------------------------------------------------- parts


def _through_layers(
    reader: Reader, device: Device, layer: Seconds, gather: float, reduce: float
) -> Seconds:
    """All layers, each of which takes `layer` and waits for its weights.

    `reduce`: seconds of summing a layer's gradients; 0 in a forward pass.
    """
    layers = reader.sizes.layers
    layer += _copied(reader, device, reader.layer_gathered)
    if reduce:  # gradients in the compute dtype become float32 for the sum
        layer += device.moving((reader.itemsize + _FP32) * reader.layer_trained)
    if not (device.overlaps and reader.prefetches):
        waiting = layers * (gather + reduce)
    else:  # the first layer's weights and the last one's sum have nothing beside them
        waiting = gather + reduce + (layers - 1) * max(0.0, gather + reduce - layer.total)
    return layer * layers + Seconds(communication=waiting)


def _gather(reader: Reader, device: Device) -> float:
    return device.gathering(reader.layer_gathered, reader.shards)


def _reduce(run: Run, weights: int, last: bool) -> float:
    """Seconds of summing the gradients of so many weights; replicas sum once, in the last pass."""
    size, ranks = _FP32 * weights, run.setup.processes
    if run.student.shards == 1:
        both = run.device.gathering(size, ranks) + run.device.scattering(size, ranks)
        return both if last else 0.0
    return run.device.scattering(size, ranks)


def _root_gathered(reader: Reader, device: Device) -> Seconds:
    """Embeddings and head, for a forward pass."""
    if reader.shards == 1:
        return Seconds()
    size = reader.itemsize * reader.head
    gather = Seconds(communication=device.gathering(size, reader.shards))
    return _copied(reader, device, size) + gather


def _copied(reader: Reader, device: Device, size: int) -> Seconds:
    """FSDP2's copies for an all-gather: a rank's shards into a buffer, all of it to each tensor."""
    if reader.shards == 1:
        return Seconds()
    return device.moving(2 * (size / reader.shards + size))


def _ends(reader: Reader, device: Device, tokens: int) -> Seconds:
    """The embeddings of a micro-batch and its final norm: seven passes over float32 states."""
    return device.moving(tokens * reader.sizes.hidden * (2 * reader.itemsize + 7 * _FP32))


def loss_seconds(device: Device, made: Plan, itemsize: int, heads: int) -> Seconds:
    """A loss as opsd_kernels plans it: its products, and its passes over the logits."""
    n, d, v = made.num_tokens, made.hidden_size, made.vocab_size
    products = device.product(n, d, v, itemsize) * made.gemms
    # Logits are written in float32 and read once; their gradient is written and read.
    pairs = 2 * _FP32 * heads + (2 * itemsize if made.gemms > heads else 0)
    # A trained head's gradient is added up block by block.
    added = 2 * made.accumulator_bytes * (made.num_blocks - 1)
    # These products are large: an H100 ran them at its best rate in a whole step, too.
    return (products + device.moving(pairs * n * v + added)) * device.sustained
