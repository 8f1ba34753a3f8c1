#include "largest.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <string.h>

#include <algorithm>
#include <functional>
#include <limits>

namespace opsd {
namespace {

// Orders by logit, then by the lower column; NaN has a place too. Adding 0 makes -0 equal to 0.
uint64_t key_of(float logit, int64_t column) {
  logit += 0.0f;
  int32_t bits;
  memcpy(&bits, &logit, sizeof bits);
  const uint32_t ordered = static_cast<uint32_t>(bits ^ ((bits >> 31) & 0x7fffffff)) ^ 0x80000000u;
  return static_cast<uint64_t>(ordered) << 32 | (0xffffffffu - static_cast<uint32_t>(column));
}

float logit_of(uint64_t key) {
  int32_t bits = static_cast<int32_t>(static_cast<uint32_t>(key >> 32) ^ 0x80000000u);
  bits ^= (bits >> 31) & 0x7fffffff;
  float logit;
  memcpy(&logit, &bits, sizeof logit);
  return logit;
}

int64_t column_of(uint64_t key) { return 0xffffffffu - static_cast<uint32_t>(key); }

}  // namespace

// cpu_layouts.py knows how much room a row has.
Largest::Largest(int64_t rows, int64_t count, int64_t columns)
    : count_(std::min(count, columns)),
      room_(std::min(count + std::max<int64_t>(16, count / 4), columns)),
      memory_(at::empty({rows, room_}, at::kLong)),
      keys_(reinterpret_cast<uint64_t*>(memory_.data_ptr<int64_t>())),
      size_(rows, 0),
      least_(rows, -std::numeric_limits<float>::infinity()) {}

void Largest::offer(int64_t row, int64_t column, float logit) {
  keys_[row * room_ + size_[row]++] = key_of(logit, column);
  if (size_[row] == room_) drop(row);
}

// Keeps the `count` largest of a row whose room is full.
void Largest::drop(int64_t row) {
  uint64_t* keys = keys_ + row * room_;
  std::nth_element(keys, keys + count_ - 1, keys + room_, std::greater<>());
  size_[row] = count_;
  least_[row] = logit_of(keys[count_ - 1]);
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
      for (const Largest& part : parts)
        keys.insert(keys.end(), part.row(row), part.row(row) + part.size(row));
      std::partial_sort(keys.begin(), keys.begin() + count, keys.end(), std::greater<>());
      for (int64_t i = 0; i < count; ++i) {
        logits[row * count + i] = logit_of(keys[i]);
        columns[row * count + i] = column_of(keys[i]);
      }
    }
  });
}

}  // namespace opsd
