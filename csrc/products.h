// Tiles of logits: hidden states times 128 rows of the head, by the brgemm that torch ships.
#pragma once

#include <ATen/core/Tensor.h>

namespace opsd {

// Whether this machine multiplies bfloat16 with float32 sums; if not, bfloat16 is converted to
// float32 tile by tile.
bool has_bf16_products();

// The head's weight (cols, depth), packed a tile at a time.
class Weight {
 public:
  explicit Weight(const at::Tensor& weight);
  int64_t tile_bytes() const;
  // Columns `first` to first + cols, and zeros up to TILE_COLS.
  void pack(int64_t first, int64_t cols, void* tile) const;

 private:
  at::Tensor weight_;
  at::ScalarType type_;
};

// A block of hidden states (rows, depth).
class Hidden {
 public:
  explicit Hidden(const at::Tensor& hidden);
  // out (TILE_ROWS, TILE_COLS) = rows from `first` on, a multiple of TILE_ROWS, times the tile.
  void multiply(int64_t first, const void* tile, float* out) const;
  // Releases the state (AMX tiles) that brgemm holds for the calling thread.
  void release() const;

 private:
  at::Tensor padded_;  // rows to a multiple of 16, depth to whole words; zeros
};

}  // namespace opsd
