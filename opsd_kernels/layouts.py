"""How a backend lays a call out in memory: rows of a block, columns of a slice, bytes, products."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

from opsd_kernels import cost
from opsd_kernels.cost import Pass, Products

MIB = 2**20
# A tile of about 1 MiB fp32 keeps the row arithmetic inside a core's L2 cache.
_TILE_ELEMENTS = 2**18
_TILE_BUFFERS = 6
# Tiles may take a quarter of a small workspace; the logits need the rest.
_TILE_SHARE = 4
# So much of a 16-bit head in fp32 keeps a GEMM busy; of a small workspace no more than its share.
_WIDENED_BYTES, _WIDENED_SHARE = 4 * MIB, 16
# Beyond 256 rows a GEMM gains nothing on a CPU, and the logits start to leave the L3 cache.
_FROZEN_ROWS = 256
# C++: packing a tile of the head pays for so many rows, and more make buffers that the system
# clears anew in every call. Rows not looked at again leave only statistics.
_PACKED_ROWS, _UNSTORED_ROWS = 384, 1024
_ONE_BLOCK = "all rows fit in one block"

# On a GPU. Rows of a block come in whole tiles of a product: for wide heads an H100's cuBLAS takes
# 192x192; a product of 1,024 rows ran 12 % below the rate of one of 768.
_ROW_TILE = 192
# Where the last block would be less than half of the others it shares with the one before.
_SMALL_TILE = 128
# Elements between rows of logits are a multiple of this.
_STRIDE = 64
# Each block adds to the fp32 accumulator of dW, about 1 ms a time for a head of 4,096 x 151,936 on
# an H100; 1,536 rows were no faster there.
TRAINED_ROWS = 1152
# Columns of a slice: `tiled` takes what predicts the least time.
_SLICES = tuple(range(1024, 8193, 512))
# Columns that share the reference of their differences.
DIFFERENCE_TILE = 512
# Columns that a row kernel takes at a time leave one set of statistics, of at most so many bytes.
_STATISTICS_COLUMNS, _STATISTICS_BYTES = 2048, 2 * 10 * 4
_DIFFERENCE_STATISTICS = 10 * 4  # bytes a tile
_STREAMING_ROWS = 4096
_STREAMING_COLUMNS, _LEAST_COLUMNS = 8192, 1024
# Instructions for a pair of logits, or one logit, as sm_90 code has them (benchmarks/compile).
# Bytes a pair that a copy moves in the time of the one pass, of a KL and of a JSD, on an H100.
_RESIDENT = 16, 23
_STATISTICS, _SUMS, _GRADIENT, _DIFFERENCES, _JOINED = 24, 52, 45, 37, 53


@dataclass(frozen=True)
class Work:
    """What is asked for, as far as it decides a layout."""

    shape: tuple[int, int, int]  # tokens, hidden size, vocabulary
    heads: int
    itemsizes: tuple[int, int]  # of the student's inputs and the teacher's
    hidden: bool  # gradients
    weight: bool
    bias: bool
    entropy: bool  # the entropy's own gradient of the hidden states
    reduced: bool
    two_passes: bool
    clipped: bool
    workspace_bytes: int | None
    default_bytes: int
    processors: int = cost.PROCESSORS  # of the GPU

    @property
    def trained(self) -> bool:
        return self.weight or self.bias

    @property
    def differentiated(self) -> bool:
        return self.hidden or self.trained

    @property
    def gradients(self) -> int:
        """Gradients of the hidden states: the loss's, and the entropy's."""
        return 1 + int(self.entropy)

    @property
    def takes_differences(self) -> bool:
        return self.heads == 2 and self.itemsizes == (2, 2) and not self.clipped

    @property
    def budget(self) -> int:
        return self.default_bytes if self.workspace_bytes is None else self.workspace_bytes

    def products(self, schedule: str) -> Products:
        """Products that the schedule makes over forward and backward."""
        times = 1 + int(self.trained and not self.reduced)  # backward may pass once more
        looks = times
        if schedule in ("tiled", "streaming"):  # every pass multiplies its logits anew
            looks = times * (1 + int(self.two_passes)) + int(self.differentiated)
        dh = int(self.hidden) + int(self.entropy)
        if schedule == "tiled" and self.joined:
            looks, dh = looks - 1, 2
        return Products(self.heads * looks, dh, int(self.weight))

    @property
    def joined(self) -> bool:
        """Whether `tiled` makes a JSD's sums and gradient from the same logits."""
        return self.two_passes and not self.clipped and self.hidden and not self.trained

    def rows(self, limit: int) -> int:
        """Rows of a block when `limit` fit: blocks of nearly equal size."""
        return max([1, *even_blocks(self.shape[0], limit)])

    def too_small(self, needed: int) -> ValueError:
        return ValueError(
            f"workspace_bytes: {self.budget} is too small for a vocabulary of {self.shape[2]}; "
            f"one row needs {needed}"
        )


@dataclass(frozen=True)
class Layout:
    """One way to do the work."""

    schedule: str
    rows: int
    tile_rows: int
    slice_columns: int
    workspace_bytes: int
    products: Products
    reason: str
    precision: str = "fp32"
    seconds: float = 0.0  # predicted, on a GPU
    widened_rows: int = 0  # of a 16-bit head, converted at a time


def padded_columns(vocab_size: int) -> int:
    """Columns from one row of logits to the next: rows start where 128-bit loads and TMA can."""
    return -(-vocab_size // _STRIDE) * _STRIDE


def even_blocks(rows: int, limit: int) -> list[int]:
    """Sizes of as few blocks of at most `limit` rows as cover `rows`, the largest first.

    Nearly equal, so that no product is much smaller than the others; in whole tiles of a product
    where `limit` is.
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
    return f"{count / MIB:.0f} MiB" if count >= MIB else f"{count / 1024:.0f} KiB"


# ------------------------------------------------------------------------------------------- a CPU


def torch_layout(x: Work) -> Layout:
    """Blocks of fp32 logits, worked on in tiles; a head of 16 bits is converted piece by piece."""
    tokens, depth, vocab = x.shape
    sizes = [max(size, 4) for size in x.itemsizes[: x.heads]]
    tile_row = _TILE_BUFFERS * vocab * sizes[0]
    tile_rows = min(_TILE_ELEMENTS // vocab, x.budget // (_TILE_SHARE * tile_row))
    tile_rows = max(1, tile_rows)
    tiles = tile_rows * tile_row
    per_row = vocab * (sum(sizes) + (x.gradients - 1) * sizes[0])
    widened = 0
    if 2 in x.itemsizes[: x.heads]:
        widened = min(_WIDENED_BYTES, x.budget // _WIDENED_SHARE) // (4 * max(1, depth))
        widened = min(vocab, max(1, widened))
        tiles += 4 * widened * depth
        # Hidden states of the block, and the gradients of the student's.
        per_row += 4 * depth * (x.heads + x.gradients * int(x.differentiated))
    fitting = (x.budget - tiles) // per_row
    if fitting < 1:
        raise x.too_small(tiles + per_row)
    # A trained head adds each block's product to the accumulator: the fewer blocks the better.
    if x.trained or fitting <= _FROZEN_ROWS:
        limit, reason = fitting, f"as many rows as {size_in_words(x.budget)} holds"
    else:
        limit, reason = _FROZEN_ROWS, f"{_FROZEN_ROWS} rows keep a GEMM busy"
    if tokens <= limit:
        reason = _ONE_BLOCK
    rows = x.rows(limit)
    return Layout(
        "blocked", rows, min(tile_rows, rows), vocab, tiles + rows * per_row,
        x.products("blocked"), reason, widened_rows=widened,
    )  # fmt: skip


def cpp_layout(x: Work) -> Layout:
    """fp32 logits of a block, if they are looked at again, and the entropy's own gradient."""
    tokens, _, vocab = x.shape
    again = x.differentiated or x.two_passes
    per_row = (x.gradients - 1) * vocab * x.itemsizes[0]
    if again:
        per_row += x.heads * vocab * 4
    fitting = x.budget // per_row if per_row else max(1, tokens)
    if fitting < 1:
        raise x.too_small(per_row)
    # A trained head adds each block's product to the accumulator: the fewer blocks the better.
    wanted = _PACKED_ROWS if again else _UNSTORED_ROWS
    if fitting <= wanted or (x.trained and again):
        limit, reason = fitting, f"as many rows as {size_in_words(x.budget)} holds"
    else:
        limit, reason = wanted, f"{wanted} rows are enough to pack a tile of the head for"
    if tokens <= limit:
        reason = _ONE_BLOCK
    rows = x.rows(limit)
    return Layout("blocked", rows, rows, vocab, rows * per_row, x.products("blocked"), reason)


# ------------------------------------------------------------------------------------------- a GPU


@functools.lru_cache(maxsize=4096)
def triton_layout(x: Work, schedule: str, precision: str) -> Layout:
    """The layout of that schedule and precision, or the one predicted to take the least time."""
    refused = x.too_small(_bytes_of_a_row(x, _LEAST_COLUMNS, 0))
    found = []
    if schedule in ("auto", "blocked") and precision != "difference":
        found += _blocked(x)
    if schedule in ("auto", "blocked") and precision == "difference" and x.takes_differences:
        found += _differences(x)
    if schedule in ("auto", "tiled") and precision != "difference":
        found += _tiled(x)
    if schedule in ("auto", "streaming") and precision != "difference":
        found += _streaming(x)
    if not found:
        raise refused
    return min(found, key=lambda y: y.seconds)


def _limit(x: Work, per_row: int, budget: int) -> int:
    """Rows that fit, in whole tiles where there are several."""
    fitting = min(budget // per_row, max(1, x.shape[0]))
    if _ROW_TILE <= fitting < x.shape[0]:
        fitting -= fitting % _ROW_TILE
    return fitting


def _bytes_of_a_row(x: Work, columns: int, gradients: int) -> int:
    """Logits, an entropy's own dz, dh in fp32, and hidden states."""
    width = padded_columns(columns)
    logits = width * (x.heads * 4 + int(x.entropy) * x.itemsizes[0])
    return _operand_bytes(x) + _dh_bytes(x, gradients) + logits


def _operand_bytes(x: Work) -> int:
    """Hidden states of a row: labels leave rows out, so the others are gathered."""
    return x.shape[1] * (x.itemsizes[0] + (x.heads - 1) * x.itemsizes[1])


def _dh_bytes(x: Work, gradients: int) -> int:
    return gradients * x.shape[1] * 4 if x.differentiated else 0


def _passes(x: Work, logit_bytes: float, first: float, statistics: int) -> list[Pass]:
    """Passes over logits of that many bytes a model; the first moves `first` bytes a pair."""
    times = 1 + int(x.trained and not x.reduced)
    pair, one = x.heads * logit_bytes, x.heads == 1
    found = [Pass(first, statistics / 2 if one else statistics)] * times
    if x.two_passes:
        found += [Pass(pair, _SUMS)] * times
    if x.differentiated:
        dz = x.itemsizes[0] * (1 + 2 * int(x.entropy))
        found.append(Pass(pair + dz, _GRADIENT / 2 if one else _GRADIENT))
    return found


def _fitted(x: Work, schedule: str, limit: int, columns: int, used: int, **how: object) -> Layout:
    """The layout of at most `limit` rows a block, of `used` bytes each, with its prediction."""
    rows, budget = x.rows(limit), how.pop("budget", x.budget)
    reason = f"as many rows as {size_in_words(budget)} holds"
    if x.shape[0] <= rows:
        reason = _ONE_BLOCK
    precision, products = how.pop("precision", "fp32"), x.products(schedule)
    blocks = max(1, len(even_blocks(x.shape[0], rows)))
    predicted = cost.seconds(x.shape, x.itemsizes[0], blocks, products, **how)
    return Layout(
        schedule, rows, rows, columns, rows * used, products, reason, precision, predicted
    )


def _trained_budget(x: Work, used: int) -> int:
    """The workspace; where the caller named none, a trained head's accumulator allows as much."""
    _, depth, vocab = x.shape
    if not x.weight or x.workspace_bytes is not None:
        return x.budget
    return max(x.budget, min(TRAINED_ROWS * used, vocab * depth * 4))


def _blocked(x: Work) -> Iterator[Layout]:
    """fp32 logits of a block's whole rows, which their gradient takes the place of."""
    vocab = x.shape[2]
    used = _bytes_of_a_row(x, vocab, x.gradients)
    budget = _trained_budget(x, used)
    limit = _limit(x, used, budget)
    if limit:
        passes = _passes(x, 4, 4 * x.heads, _STATISTICS)
        if x.heads == 2 and x.differentiated and not x.clipped:  # one pass, after a forward's own
            before = passes[:-1:2] if x.trained and not x.reduced else []
            passes = [*before, Pass(_RESIDENT[x.two_passes], 0)]
        yield _fitted(
            x, "blocked", limit, vocab, used, passes=passes, stored_bytes=4, budget=budget
        )


def _differences(x: Work) -> Iterator[Layout]:
    """16-bit differences of whole rows, made from fp32 logits a slice of the vocabulary at a time.

    A slice's logits stay in L2 until the statistics have read them; dh later takes their place.
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
        # Fewer rows may fill the processors' waves of tiles better.
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


def _tiled(x: Work) -> Iterator[Layout]:
    """fp32 logits of rows and columns; every pass multiplies them anew."""
    vocab = x.shape[2]
    dh = 2 if x.joined else x.gradients
    for columns in _SLICES:
        columns = min(columns, padded_columns(vocab))
        spans = -(-vocab // min(columns, _STATISTICS_COLUMNS))
        used = _bytes_of_a_row(x, columns, dh) + spans * _STATISTICS_BYTES
        limit = _limit(x, used, x.budget)
        if not limit:
            continue
        moved = 0 if cost.in_cache(x.heads * 4 * limit * columns) else 4
        passes = _passes(x, moved, moved * x.heads, _STATISTICS)
        if x.joined:
            passes = [passes[0], Pass(moved * x.heads, _JOINED)]
        yield _fitted(
            x, "tiled", limit, min(columns, vocab), used, passes=passes,
            slices=len(passes) * -(-vocab // columns),
            efficiency=cost.waves(x.heads * x.rows(limit), columns, x.processors),
        )  # fmt: skip


def _streaming(x: Work) -> Iterator[Layout]:
    """No logits; as wide a slice of their gradient as leaves room for a busy GEMM's rows."""
    tokens, _, vocab = x.shape

    def bytes_of_a_row(columns: int) -> int:
        dz = x.gradients * padded_columns(columns) * x.itemsizes[0] if x.differentiated else 0
        return _operand_bytes(x) + _dh_bytes(x, x.gradients) + dz

    columns, wanted = min(vocab, _STREAMING_COLUMNS), min(tokens, _STREAMING_ROWS)
    while columns > _LEAST_COLUMNS and x.budget // bytes_of_a_row(columns) < wanted:
        columns = max(_LEAST_COLUMNS, columns // 2)
    used = bytes_of_a_row(columns)
    limit = _limit(x, used, x.budget)
    if not x.trained:  # a trained head's accumulator is read and written once a block
        limit = min(limit, _STREAMING_ROWS)
    if limit:
        yield _fitted(
            x, "streaming", limit, columns, used, passes=_passes(x, 0, 0, _STATISTICS),
            efficiency=cost.FUSED, slices=-(-vocab // columns),
        )  # fmt: skip
