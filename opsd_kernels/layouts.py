"""Layouts: rows of a block, columns of a slice, bytes and products of one way to compute a loss.

What all backends share, and the layouts of the Triton backend; those of a CPU are in `cpu_layouts`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from opsd_kernels import cost
from opsd_kernels.cost import Pass, Products

MIB = 2**20
ONE_BLOCK = "all rows fit in one block"
WHOLE_WAVES = "rows and columns whose products fill a wave of tiles"

# Blocks have whole tiles of a product's rows: for wide heads cuBLAS on an H100 uses tiles of
# 192x192, and a product of 1,024 rows ran 12 % below the rate of one of 768.
_ROW_TILE = 192
# If the last block would be less than half of the others, it and the one before share their rows in
# tiles of this size.
_SMALL_TILE = 128
# The stride between rows of logits is a multiple of this.
_STRIDE = 64
# Every block adds to the fp32 accumulator of dW, which takes about 1 ms for a head of
# 4,096 x 151,936 on an H100; blocks of 1,536 rows were no faster there.
TRAINED_ROWS = 1152
# Columns of a slice that `tiled` may have, beside those whose product fills a wave of tiles with so
# many of them in a column; the one with the least predicted time is taken.
_SLICES = tuple(range(1024, 8193, 512))
_WAVES = tuple(range(1, 9))
# Columns of a tile of differences, which are relative to one reference.
DIFFERENCE_TILE = 512
# A row kernel makes one set of statistics for this many columns, of at most this many bytes.
_STATISTICS_COLUMNS, _STATISTICS_BYTES = 2048, 10 * 4
# Merged statistics, label and scales of a block's rows: `tiled` copies them.
_TILED_ROW_BYTES = 128
_DIFFERENCE_STATISTICS = 10 * 4  # bytes per tile
_STREAMING_ROWS = 4096
_STREAMING_COLUMNS, _LEAST_COLUMNS = 8192, 1024
# Time of a resident pass of a KL and of a JSD, as the bytes per pair of logits that an H100 copies
# in that time.
_RESIDENT = 16, 17
# Instructions of each pass per pair of logits, counted in sm_90 code (benchmarks/compile).
_STATISTICS, _SUMS, _GRADIENT, _DIFFERENCES, _JOINED = 24, 52, 45, 37, 53


@dataclass(frozen=True)
class Work:
    """The arguments of `plan` that decide a layout."""

    shape: tuple[int, int, int]  # tokens, hidden size, vocabulary
    heads: int
    itemsizes: tuple[int, int]  # of the student's inputs and the teacher's
    grad_hidden: bool  # which gradients are needed
    grad_weight: bool
    grad_bias: bool
    grad_entropy: bool  # the entropy's own gradient of the hidden states
    reduced: bool  # to a scalar inside the call
    two_passes: bool  # reads the logits twice before the gradient
    clipped: bool
    workspace_bytes: int | None
    default_bytes: int
    chosen: int = 0  # logits of each row, which its pass chooses; 0: none
    processors: int = cost.PROCESSORS  # of the GPU

    @property
    def trained(self) -> bool:
        """Whether the head has a gradient."""
        return self.grad_weight or self.grad_bias

    @property
    def differentiated(self) -> bool:
        """Whether anything has a gradient."""
        return self.grad_hidden or self.trained

    @property
    def gradients(self) -> int:
        """Gradients of the hidden states: the loss's, and the entropy's."""
        return 1 + int(self.grad_entropy)

    @property
    def takes_differences(self) -> bool:
        """Whether the logits of both heads may be kept as 16-bit differences."""
        return self.heads == 2 and self.itemsizes == (2, 2) and not self.clipped

    @property
    def budget(self) -> int:
        """Bytes that the workspace may take."""
        return self.default_bytes if self.workspace_bytes is None else self.workspace_bytes

    def products(self, schedule: str) -> Products:
        """Products that the schedule makes over forward and backward."""
        times = 1 + int(self.trained and not self.reduced)  # backward may run the loss again
        logits = times
        if schedule in ("tiled", "streaming"):  # every pass multiplies its logits again
            logits = times * (1 + int(self.two_passes)) + int(self.differentiated)
        dh = int(self.grad_hidden) + int(self.grad_entropy)
        if schedule == "tiled" and self.joined:
            logits, dh = logits - 1, 2
        return Products(self.heads * logits, dh, int(self.grad_weight))

    @property
    def joined(self) -> bool:
        """Whether `tiled` makes the sums and the gradient of a JSD from the same logits."""
        return self.two_passes and not self.clipped and self.grad_hidden and not self.trained

    def rows(self, limit: int) -> int:
        """Rows of the largest of nearly equal blocks of at most `limit` rows."""
        return max([1, *even_blocks(self.shape[0], limit)])

    def too_small(self, needed: int) -> ValueError:
        """The error for a budget below the `needed` bytes of one row."""
        return ValueError(
            f"workspace_bytes: {self.budget} is too small for a vocabulary of {self.shape[2]}; "
            f"one row needs {needed}"
        )


@dataclass(frozen=True)
class BlockLayout:
    """One way to compute a loss."""

    schedule: str
    rows: int
    tile_rows: int
    slice_columns: int
    workspace_bytes: int
    products: Products
    reason: str
    precision: str = "fp32"
    seconds: float = 0.0  # predicted, on a GPU
    widened_rows: int = 0  # rows of a 16-bit head converted to fp32 at a time


def padded_columns(vocab_size: int) -> int:
    """Stride between rows of logits, so that 128-bit loads and TMA can read every row."""
    return -(-vocab_size // _STRIDE) * _STRIDE


def even_blocks(rows: int, limit: int) -> list[int]:
    """Sizes of the fewest blocks of at most `limit` rows that cover `rows`, the largest first.

    Nearly equal, so that no product is much smaller than the others; whole tiles of a product if
    `limit` is.
    """
    tile = _ROW_TILE if limit % _ROW_TILE == 0 else 1
    tiles, most = -(-rows // tile), limit // tile
    count = -(-tiles // most)
    sizes = [tile * (tiles // count + (i < tiles % count)) for i in range(count)]
    if not sizes:
        return sizes
    sizes[-1] -= sum(sizes) - rows
    both = sum(sizes[-2:])
    if len(sizes) > 1 and sizes[-1] < sizes[-2] // 2:
        first = min(sizes[-2], _SMALL_TILE * -(-both // (2 * _SMALL_TILE)))
        sizes[-2:] = [first, both - first]
    return sizes


def size_in_words(count: int) -> str:
    """Bytes in MiB or KiB, for messages."""
    return f"{count / MIB:.0f} MiB" if count >= MIB else f"{count / 1024:.0f} KiB"


@functools.lru_cache(maxsize=4096)
def triton_layout(x: Work, schedule: str, precision: str) -> BlockLayout:
    """The layout predicted to be fastest among those of the schedule and precision asked for."""
    found: list[BlockLayout] = []
    if schedule in ("auto", "blocked") and precision != "difference":
        found += _blocked(x)
    if schedule in ("auto", "blocked") and precision == "difference" and x.takes_differences:
        found += _differences(x)
    if schedule in ("auto", "tiled") and precision != "difference":
        found += _tiled(x)
    if schedule in ("auto", "streaming") and precision != "difference" and not x.chosen:
        found += _streaming(x)
    if not found:
        raise x.too_small(_bytes_of_a_row(x, _LEAST_COLUMNS, 0))
    return min(found, key=lambda y: y.seconds)


def _limit(x: Work, per_row: int, budget: int) -> int:
    """Rows that fit into the budget, whole tiles of a product if more than one."""
    fitting = min(budget // per_row, max(1, x.shape[0]))
    if _ROW_TILE <= fitting < x.shape[0]:
        fitting -= fitting % _ROW_TILE
    return fitting


def _bytes_of_a_row(x: Work, columns: int, gradients: int) -> int:
    """Bytes per row of logits, the entropy's own dz, dh in fp32 and hidden states."""
    width = padded_columns(columns)
    logits = width * (x.heads * 4 + int(x.grad_entropy) * x.itemsizes[0])
    return _operand_bytes(x) + _dh_bytes(x, gradients) + logits


def _operand_bytes(x: Work) -> int:
    """Bytes of a row's hidden states, which are gathered if labels leave rows out."""
    return x.shape[1] * (x.itemsizes[0] + (x.heads - 1) * x.itemsizes[1])


def _dh_bytes(x: Work, gradients: int) -> int:
    return gradients * x.shape[1] * 4 if x.differentiated else 0


def _passes(x: Work, logit_bytes: float, first: float, statistics: int) -> list[Pass]:
    """Passes over logits of `logit_bytes` per head; the first moves `first` bytes per pair."""
    times = 1 + int(x.trained and not x.reduced)
    pair, one = x.heads * logit_bytes, x.heads == 1
    found = [Pass(first, statistics / 2 if one else statistics)] * times
    if x.two_passes:
        found += [Pass(pair, _SUMS)] * times
    if x.differentiated:
        dz = x.itemsizes[0] * (1 + 2 * int(x.grad_entropy))
        found.append(Pass(pair + dz, _GRADIENT / 2 if one else _GRADIENT))
    return found


def _fitted(
    x: Work,
    schedule: str,
    limit: int,
    columns: int,
    used: int,
    *,
    passes: list[Pass],
    budget: int | None = None,
    precision: str = "fp32",
    efficiency: float = 1.0,
    slices: int = 1,
    stored_bytes: float = 0.0,
    head_rate: float = 1.0,
    reason: str | None = None,
) -> BlockLayout:
    """The layout with blocks of at most `limit` rows of `used` bytes, and its predicted time."""
    rows = x.rows(limit)
    held = size_in_words(x.budget if budget is None else budget)
    reason = reason or f"as many rows as {held} holds"
    if x.shape[0] <= rows:
        reason = ONE_BLOCK
    products = x.products(schedule)
    blocks = max(1, len(even_blocks(x.shape[0], rows)))
    predicted = cost.seconds(
        x.shape, x.itemsizes[0], blocks, products,
        passes=passes, efficiency=efficiency, slices=slices, stored_bytes=stored_bytes,
        head_rate=head_rate,
    )  # fmt: skip
    return BlockLayout(
        schedule, rows, rows, columns, rows * used, products, reason, precision, predicted
    )


def _trained_budget(x: Work, used: int) -> int:
    """The budget; the default one may grow to the size of a trained head's accumulator."""
    _, depth, vocab = x.shape
    if not x.grad_weight or x.workspace_bytes is not None:
        return x.budget
    return max(x.budget, min(TRAINED_ROWS * used, vocab * depth * 4))


def _blocked(x: Work) -> Iterator[BlockLayout]:
    """fp32 logits of whole rows, which their gradient overwrites."""
    vocab = x.shape[2]
    used = _bytes_of_a_row(x, vocab, x.gradients)
    budget = _trained_budget(x, used)
    limit = _limit(x, used, budget)
    if limit:
        passes = _passes(x, 4, 4 * x.heads, _STATISTICS)
        if x.heads == 2 and x.differentiated and not x.clipped:
            # One resident pass, after forward's own statistics if backward runs the loss again.
            before = passes[:-1:2] if x.trained and not x.reduced else []
            passes = [*before, Pass(_RESIDENT[x.two_passes], 0)]
        yield _fitted(
            x, "blocked", limit, vocab, used, passes=passes, stored_bytes=4, budget=budget
        )


def _differences(x: Work) -> Iterator[BlockLayout]:
    """16-bit differences of whole rows, made from fp32 logits a slice of the vocabulary at a time.

    A slice's logits stay in L2 until the statistics have read them; dh later overwrites them.
    """
    vocab = x.shape[2]
    tiles = -(-vocab // DIFFERENCE_TILE)
    found = []
    for count in range(2, 17):
        columns = count * DIFFERENCE_TILE
        logits, dh = x.heads * 4 * columns, _dh_bytes(x, x.gradients)
        used = _operand_bytes(x) + logits + (dh if dh > logits else 0)
        used += 4 * padded_columns(vocab) + _DIFFERENCE_STATISTICS * tiles
        budget = _trained_budget(x, used)
        most = min(_limit(x, used, budget), _limit(x, logits, cost.CACHE))
        # Fewer rows may fill the last wave of tiles better.
        for limit in (most, most - _ROW_TILE, most - 2 * _ROW_TILE, most - 3 * _ROW_TILE):
            if limit > 0:
                efficiency = cost.waves(x.heads * x.rows(limit), columns, x.processors)
                found.append((efficiency, limit, columns, used, budget))
    best = max(found, default=(0.0,))[0]
    for efficiency, limit, columns, used, budget in sorted(found, reverse=True):
        if efficiency > 0.95 * best:
            yield _fitted(
                x, "blocked", limit, columns, used, precision="difference", budget=budget,
                passes=_passes(x, 2, 2 * x.heads, _DIFFERENCES), slices=-(-vocab // columns),
                efficiency=efficiency,
            )  # fmt: skip


def _tiled(x: Work) -> Iterator[BlockLayout]:
    """fp32 logits of a slice of the vocabulary, multiplied again in every pass."""
    vocab = x.shape[2]
    dh = 2 if x.joined else x.gradients
    for least, most, width in _slices(x):
        columns = min(width, padded_columns(vocab))
        slices = -(-vocab // columns)
        spans = slices * -(-columns // _STATISTICS_COLUMNS)
        used = _bytes_of_a_row(x, columns, dh) + spans * _STATISTICS_BYTES + _TILED_ROW_BYTES
        room = _limit(x, used, x.budget)
        limit = min(room, most)
        if limit < least:
            continue
        moved = 0 if cost.in_cache(x.heads * 4 * limit * columns) else 4
        passes = _passes(x, moved, moved * x.heads, _STATISTICS)
        if x.joined:
            passes = [passes[0], Pass(moved * x.heads, _JOINED)]
        visits, sums = len(passes) * slices, _dh_bytes(x, dh)
        if not cost.in_cache(limit * sums):  # every slice reads and writes them
            passes.append(Pass(2 * sums / columns, 0))
        yield _fitted(
            x, "tiled", limit, min(columns, vocab), used, passes=passes,
            slices=visits, head_rate=cost.HEAD_RATE,
            reason=WHOLE_WAVES if most < room else None,
            # Of one head's product: whole waves of it are whole waves of both heads'.
            efficiency=cost.waves(x.rows(limit), columns, x.processors),
        )  # fmt: skip


def _slices(x: Work) -> Iterator[tuple[int, int, int]]:
    """(least rows, most rows, columns) of the blocks of `tiled`."""
    tokens = x.shape[0]
    yield from ((1, max(1, tokens), columns) for columns in _SLICES)
    for tiles in _WAVES:
        rows, columns = tiles * _ROW_TILE, _ROW_TILE * (x.processors // tiles)
        if rows <= tokens and columns > 0:
            yield rows, rows, columns


def _streaming(x: Work) -> Iterator[BlockLayout]:
    """No stored logits; as wide a slice of their gradient as leaves enough rows for a GEMM."""
    tokens, _, vocab = x.shape

    def bytes_of_a_row(columns: int) -> int:
        dz = x.gradients * padded_columns(columns) * x.itemsizes[0] if x.differentiated else 0
        return _operand_bytes(x) + _dh_bytes(x, x.gradients) + dz

    columns, enough = min(vocab, _STREAMING_COLUMNS), min(tokens, _STREAMING_ROWS)
    while columns > _LEAST_COLUMNS and x.budget // bytes_of_a_row(columns) < enough:
        columns = max(_LEAST_COLUMNS, columns // 2)
    used = bytes_of_a_row(columns)
    limit = _limit(x, used, x.budget)
    if not x.trained:  # every block reads and writes a trained head's accumulator
        limit = min(limit, _STREAMING_ROWS)
    if limit:
        yield _fitted(
            x, "streaming", limit, columns, used, passes=_passes(x, 0, 0, _STATISTICS),
            efficiency=cost.FUSED, slices=-(-vocab // columns),
        )  # fmt: skip
