// The largest logits of each row, chosen while tiles of logits pass by.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "rows.h"

namespace opsd {

// Of the columns that one thread folds, which ascend. Equal logits are in the order of their
// columns, so any division of the columns among threads chooses the same.
class Largest {
 public:
  Largest() = default;
  // The `count` largest of each row, of at most `columns` columns.
  Largest(int64_t rows, int64_t count, int64_t columns);
  // What a tile that begins at a row needs.
  void attach(Fold& fold, int64_t row);
  const RowLargest& row(int64_t row) const { return rows_[row]; }

 private:
  int64_t count_ = 0, limit_ = 0;
  at::Tensor memory_;  // order and column of each row
  std::vector<RowLargest> rows_;
};

// The largest of all parts, largest first, into logit and column (rows, count), both contiguous.
void store_largest(const std::vector<Largest>& parts, const at::Tensor& logit,
                   const at::Tensor& column);

}  // namespace opsd
