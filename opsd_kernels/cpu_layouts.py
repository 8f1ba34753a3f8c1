"""Layouts of the PyTorch and C++ backends: how many rows a block has, and what it stores."""

from __future__ import annotations

from dataclasses import replace

import torch

from opsd_kernels.layouts import MIB, ONE_BLOCK, BlockLayout, Work, size_in_words

# A tile of about 1 MiB of fp32 keeps the row arithmetic inside a core's L2 cache.
_TILE_ELEMENTS = 2**18
_TILE_BUFFERS = 6
# Tiles take at most a quarter of the workspace; the logits need the rest.
_TILE_SHARE = 4
# Converting this much of a 16-bit head to fp32 at a time keeps a GEMM busy; at most 1/16 of the
# workspace.
_WIDENED_BYTES, _WIDENED_SHARE = 4 * MIB, 16
# C++: a thread takes a multiple of this many columns.
_CHUNK_COLUMNS = 1024
# Beyond 256 rows a GEMM gains nothing on a CPU, and the logits start to leave the L3 cache.
_FROZEN_ROWS = 256
# C++: with this many rows, packing a tile of the head costs little. More rows need larger buffers,
# which the system zeroes anew in every call; rows that no later pass reads store only statistics.
_PACKED_ROWS, _UNSTORED_ROWS = 384, 1024


def dz_waits(tokens: int, depth: int) -> bool:
    """C++, bf16, several blocks: whether dz of all rows takes no more memory than dW in fp32.

    2 N V <= 4 D V bytes. It then waits for one product, rounded once, instead of a sum of products.
    """
    return tokens <= 2 * depth


def _candidate_bytes(k: int, vocab: int) -> int:
    """C++: bytes of a row's largest logits, kept by each thread among its columns (largest.cpp)."""
    threads = torch.get_num_threads()
    columns = _CHUNK_COLUMNS * -(-vocab // (_CHUNK_COLUMNS * threads))
    return 8 * threads * (min(k + max(64, k), columns) + 144)  # one more tile fits


def _widened_rows(x: Work) -> int:
    """Rows of a 16-bit head to convert to fp32 at a time."""
    rows = min(_WIDENED_BYTES, x.budget // _WIDENED_SHARE) // (4 * max(1, x.shape[1]))
    return min(x.shape[2], max(1, rows))


def torch_layout(x: Work) -> BlockLayout:
    """PyTorch: fp32 logits, reduced in tiles; a 16-bit head is converted piece by piece."""
    tokens, depth, vocab = x.shape
    sizes = [max(size, 4) for size in x.itemsizes[: x.heads]]
    tile_row = _TILE_BUFFERS * vocab * sizes[0]
    tile_rows = min(_TILE_ELEMENTS // vocab, x.budget // (_TILE_SHARE * tile_row))
    tile_rows = max(1, tile_rows)
    tiles = tile_rows * tile_row
    per_row = vocab * (sum(sizes) + (x.gradients - 1) * sizes[0])
    widened = 0
    if 2 in x.itemsizes[: x.heads]:
        widened = _widened_rows(x)
        tiles += 4 * widened * depth
        # The block's hidden states, and the gradients of the student's, in fp32.
        per_row += 4 * depth * (x.heads + x.gradients * int(x.differentiated))
    fitting = (x.budget - tiles) // per_row
    if fitting < 1:
        raise x.too_small(tiles + per_row)
    # Every block adds a product to a trained head's accumulator: the fewer blocks the better.
    if x.trained or fitting <= _FROZEN_ROWS:
        limit, reason = fitting, f"as many rows as {size_in_words(x.budget)} holds"
    else:
        limit, reason = _FROZEN_ROWS, f"{_FROZEN_ROWS} rows keep a GEMM busy"
    if tokens <= limit:
        reason = ONE_BLOCK
    rows = x.rows(limit)
    return BlockLayout(
        "blocked", rows, min(tile_rows, rows), vocab, tiles + rows * per_row,
        x.products("blocked"), reason, widened_rows=widened,
    )  # fmt: skip


def cpp_layout(x: Work, dz_bytes: int, rounds_once: bool) -> BlockLayout:
    """C++: the block's fp32 logits, if a later pass reads them, and the entropy's own gradient.

    dz_bytes: of an element of the logits' gradient. rounds_once: a trained head's gradient needs no
    fp32 sum in one block.
    """
    tokens, depth, vocab = x.shape
    again = x.differentiated or x.two_passes
    per_row = (x.gradients - 1) * vocab * dz_bytes
    if again:
        per_row += x.heads * vocab * 4
    if x.chosen:
        per_row += _candidate_bytes(x.chosen, vocab)
    widened = 0
    if x.differentiated and x.itemsizes[0] < dz_bytes:  # float16
        widened = _widened_rows(x)
        # The block's hidden states, and their gradients, in fp32.
        per_row += 4 * depth * (1 + x.gradients)
    fixed = 4 * widened * depth
    fitting = (x.budget - fixed) // per_row if per_row else max(1, tokens)
    if fitting < 1:
        raise x.too_small(fixed + per_row)
    if x.grad_weight and rounds_once and not x.reduced and x.workspace_bytes is None:
        # One block leaves all logits to backward, which else multiplies most of them again; 1,024
        # tokens of Qwen3-0.6B's head took 0.77 of the time. At most the bytes of the fp32 sum.
        if tokens * per_row <= 4 * depth * vocab:
            fitting = max(fitting, tokens)
    # Every block adds a product to a trained head's accumulator: the fewer blocks the better.
    enough = _PACKED_ROWS if again else _UNSTORED_ROWS
    if fitting <= enough or (x.trained and again):
        limit, reason = fitting, f"as many rows as {size_in_words(x.budget)} holds"
    else:
        limit, reason = enough, f"{enough} rows are enough to pack a tile of the head for"
    if tokens <= limit:
        reason = ONE_BLOCK
    rows, products = x.rows(limit), x.products("blocked")
    if tokens <= rows and x.trained:
        products = replace(products, logits=x.heads)  # forward leaves them to backward
    return BlockLayout(
        "blocked", rows, rows, vocab, fixed + rows * per_row, products, reason, widened_rows=widened
    )
