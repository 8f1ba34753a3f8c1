// The largest logits of each row, chosen while tiles of logits pass by.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

namespace opsd {

// Of the columns that one thread folds. Equal logits are in the order of their columns, so any
// division of the columns among threads chooses the same.
class Largest {
 public:
  Largest() = default;
  // The `count` largest of each row, of `columns` columns offered in ascending order.
  Largest(int64_t rows, int64_t count, int64_t columns);
  // What a further logit of each row must exceed.
  float* least() { return least_.data(); }
  void offer(int64_t row, int64_t column, float logit);
  const uint64_t* row(int64_t row) const { return keys_ + row * room_; }
  int64_t size(int64_t row) const { return size_[row]; }

 private:
  void drop(int64_t row);
  int64_t count_ = 0, room_ = 0;
  at::Tensor memory_;  // (rows, room)
  uint64_t* keys_ = nullptr;
  std::vector<int64_t> size_;
  std::vector<float> least_;
};

// The largest of all parts, largest first, into logit and column (rows, count), both contiguous.
void store_largest(const std::vector<Largest>& parts, const at::Tensor& logit,
                   const at::Tensor& column);

}  // namespace opsd
