#pragma once

// The largest logits of each row, compiled once for each instruction set.
#include "vec.h"

namespace opsd {
namespace OPSD_ISA {

// Logits as integers, in the same order; NaN has a place in it too.
OPSD_INLINE Ints order_of(Floats z) {
  const Ints bits = floats_to_bits(z + splat(0.0f));  // -0 becomes 0, to which it is equal
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

OPSD_INLINE int64_t count_not_less(const RowLargest& row, int32_t than) {
  int64_t count = 0;
  for (int64_t i = 0; i < row.size; i += LANES)
    count += __builtin_popcount(bits_of(load(row.order + i) >= Ints{} + than));
  return count;
}

// Which to keep: all above `order`, and the first `equals` of those equal to it.
struct Bound {
  int32_t order;
  int64_t equals;
};

// Keeps from `count` to `most`: the exact choice takes longer. Ties may force the exact one.
OPSD_INLINE Bound bound_of(const RowLargest& row, int64_t count, int64_t most) {
  Ints largest = load(row.order);
  for (int64_t i = LANES; i < row.size; i += LANES) {
    const Ints x = load(row.order + i);
    largest = x > largest ? x : largest;
  }
  int64_t high = INT32_MIN, above = 0;  // so many are at least `high`, fewer than `count`
  for (int i = 0; i < LANES; ++i) high = largest[i] > high ? largest[i] : high;
  ++high;
  int32_t low = order_of(splat(row.least))[0];  // at least `count` are at least `low`
  int64_t found = count_not_less(row, low);
  if (found < count) low = INT32_MIN, found = row.size;  // NaN
  while (found > most && high - low > 1) {
    const int32_t middle = low + (high - low) / 2;
    const int64_t at_least = count_not_less(row, middle);
    if (at_least < count)
      high = middle, above = at_least;
    else
      low = middle, found = at_least;
  }
  return {low, found > most ? count - above : row.size};
}

// Keeps the `count` largest and up to an eighth more, in their order; of equal ones the first.
static void drop_smallest(int64_t count, RowLargest& row) {
  for (int64_t i = row.size; i % LANES; ++i) row.order[i] = INT32_MIN;  // there is room
  Bound bound = bound_of(row, count, count + count / 8);
  const Ints kth = Ints{} + bound.order;
  Ints least = Ints{} + INT32_MAX;
  int64_t kept = 0;
  for (int64_t i = 0; i < row.size; i += LANES) {
    const Ints order = load(row.order + i), column = load(row.column + i);
    uint32_t equal = bits_of(order == kth);
    while (__builtin_popcount(equal) > bound.equals) equal ^= 1u << (31 - __builtin_clz(equal));
    bound.equals -= __builtin_popcount(equal);
    const uint32_t chosen = bits_of(order > kth) | equal;
    store_chosen(row.order + kept, order, chosen);
    store_chosen(row.column + kept, column, chosen);
    kept += __builtin_popcount(chosen);
    const Ints present = order >= kth ? order : least;
    least = present < least ? present : least;
  }
  int32_t smallest = INT32_MAX;
  for (int i = 0; i < LANES; ++i) smallest = least[i] < smallest ? least[i] : smallest;
  row.size = kept;
  row.least = logit_of(smallest);
}

// Bit i of word i / 64: the tile's column i is above the row's least.
struct TileBits {
  uint64_t words[TILE_COLS / 64];
};

// Every vector, even without a bit: a branch for each would be mispredicted.
static void add_to_largest(const Fold& a, const float* raw, TileBits above, RowLargest& row) {
  int64_t size = row.size;
  int32_t *const order = row.order, *const column = row.column;
  for (int64_t c = 0; c < TILE_COLS; c += LANES) {
    const uint32_t chosen = above.words[c / 64] >> c % 64 & (~uint32_t{0} >> (32 - LANES));
    const Floats z = load(raw + c);
    store_chosen(order + size, order_of(larger(splat(LOG_ZERO), z)), chosen);
    store_chosen(column + size, lane_numbers() + static_cast<int32_t>(a.column + c), chosen);
    size += __builtin_popcount(chosen);
  }
  row.size = size;
  if (size > a.largest_limit) drop_smallest(a.largest_count, row);
}

// Adds a tile's logits above the row's least; NaN is among them. `raw` are the logits in memory.
OPSD_INLINE void keep_largest(const Fold& a, const Floats* x, const float* raw, RowLargest& row) {
  TileBits above = {};
#pragma GCC unroll 32
  for (int v = 0; v < TILE_COLS / LANES; ++v) {
    const uint64_t bits = bits_not_less_or_equal(x[v], splat(row.least));
    above.words[v * LANES / 64] |= bits << v * LANES % 64;
  }
  for (int64_t c = a.cols; c < TILE_COLS; ++c) above.words[c / 64] &= ~(uint64_t{1} << c % 64);
  if (above.words[0] | above.words[1]) add_to_largest(a, raw, above, row);
}

}  // namespace OPSD_ISA
}  // namespace opsd
