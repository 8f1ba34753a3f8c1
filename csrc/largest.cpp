#include "largest.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <functional>
#include <limits>

namespace opsd {
namespace {

// Beyond the limit: the tile that exceeds it, and the rest of a whole vector.
constexpr int64_t MARGIN = TILE_COLS + 16;

// Orders by logit, then by the lower column.
uint64_t key_of(int32_t order, int32_t column) {
  const uint32_t biased = static_cast<uint32_t>(order) ^ 0x80000000u;
  return static_cast<uint64_t>(biased) << 32 | (0xffffffffu - static_cast<uint32_t>(column));
}

float key_logit(uint64_t key) {
  return logit_of(static_cast<int32_t>(static_cast<uint32_t>(key >> 32) ^ 0x80000000u));
}

int64_t key_column(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

}  // namespace

// cpu_layouts.py knows how much a row takes.
Largest::Largest(int64_t rows, int64_t count, int64_t columns)
    : count_(count),
      limit_(std::min(count + std::max<int64_t>(64, count), columns)),
      memory_(at::empty({rows, 2, limit_ + MARGIN}, at::kInt)),
      rows_(rows) {
  int32_t* at = memory_.data_ptr<int32_t>();
  for (RowLargest& row : rows_) {
    row = {at, at + limit_ + MARGIN, 0, -std::numeric_limits<float>::infinity()};
    at += 2 * (limit_ + MARGIN);
  }
}

void Largest::attach(Fold& fold, int64_t row) {
  fold.largest = rows_.data() + row;
  fold.largest_count = count_, fold.largest_limit = limit_;
}

void store_largest(const std::vector<Largest>& parts, const at::Tensor& logit,
                   const at::Tensor& column) {
  const int64_t count = logit.size(1);
  float* logits = logit.data_ptr<float>();
  int64_t* columns = column.data_ptr<int64_t>();
  at::parallel_for(0, logit.size(0), 16, [&](int64_t begin, int64_t end) {
    std::vector<uint64_t> keys;
    for (int64_t row = begin; row < end; ++row) {
      keys.clear();
      for (const Largest& part : parts) {
        const RowLargest& from = part.row(row);
        for (int64_t i = 0; i < from.size; ++i)
          keys.push_back(key_of(from.order[i], from.column[i]));
      }
      std::nth_element(keys.begin(), keys.begin() + count - 1, keys.end(), std::greater<>());
      std::sort(keys.begin(), keys.begin() + count, std::greater<>());
      for (int64_t i = 0; i < count; ++i) {
        logits[row * count + i] = key_logit(keys[i]);
        columns[row * count + i] = key_column(keys[i]);
      }
    }
  });
}

}  // namespace opsd
