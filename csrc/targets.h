// Some columns of each row whose logits are read while tiles of logits pass by.
#pragma once

#include <vector>

#include "ops.h"

namespace opsd {

class TargetColumns {
 public:
  // column (rows, K) int64, logit (rows, K) float32, filled with 0; no targets where there is none.
  TargetColumns(const MaybeTensor& column, const MaybeTensor& logit, int64_t cols);
  // The first target of the tile that begins at a column.
  int64_t begin(int64_t column) const { return first_.empty() ? 0 : first_[column / TILE_COLS]; }
  bool empty() const { return targets_.empty(); }
  // Stores the logits of a tile that has been folded, and begins at `row`; of a column's tiles, whose
  // rows ascend, each goes on with `next`.
  void read(const Fold& fold, int64_t row, int64_t& next) const;

 private:
  struct Target {
    int64_t to;  // its place in logit
    int32_t row, column;  // in its tile
  };
  std::vector<Target> targets_;  // tile by tile, rows ascending
  std::vector<int64_t> first_;   // of each tile
  float* out_ = nullptr;
};

}  // namespace opsd
