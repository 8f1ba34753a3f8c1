#pragma once

// The largest logits of each row, compiled once for each instruction set.
#include "vec.h"

namespace opsd {
namespace OPSD_ISA {

// A logit as an integer, in the same order; NaN has a place in it too.
OPSD_INLINE int32_t order_of(float z) {
  int32_t bits;
  z += 0.0f;  // -0 becomes 0, to which it is equal
  memcpy(&bits, &z, sizeof bits);
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

OPSD_INLINE int64_t count_not_less(const int32_t* order, int64_t size, int32_t than) {
  int64_t count = 0;
  for (int64_t i = 0; i < size; i += LANES) {
    const Ints x = *reinterpret_cast<const IntsAnywhere*>(order + i);
    count += __builtin_popcount(bits_of(x >= Ints{} + than));
  }
  return count;
}

// Keeps the `count` largest, in their order: of equal ones those that came first.
static void drop_all_but(int64_t count, RowLargest& row) {
  int64_t size = row.size;
  for (; size % LANES; ++size) row.order[size] = INT32_MIN;  // there is room
  // The k-th largest, bit by bit, until no more than k are at least as large.
  int64_t found = count_not_less(row.order, size, 0);
  int32_t kth = found >= count ? 0 : INT32_MIN;
  for (int bit = 30; bit >= 0 && found != count; --bit) {
    const int32_t next = kth | 1 << bit;
    const int64_t at_least = count_not_less(row.order, size, next);
    if (at_least >= count) kth = next, found = at_least;
  }
  int64_t equals = count;
  for (int64_t i = 0; i < row.size; ++i) equals -= row.order[i] > kth;
  int64_t kept = 0;
  int32_t least = INT32_MAX;
  for (int64_t i = 0; i < row.size; ++i) {
    const int32_t order = row.order[i], column = row.column[i];
    const bool equal = order == kth, take = order > kth || (equal && equals > 0);
    row.order[kept] = order;
    row.column[kept] = column;
    least = take && order < least ? order : least;
    equals -= equal;
    kept += take;
  }
  row.size = kept;
  row.least = logit_of(least);
}

// Adds a tile's logits above the row's least; NaN is among them. `raw` are the logits in memory.
OPSD_INLINE void keep_largest(const Fold& a, const Floats* x, const float* raw, RowLargest& row) {
  uint64_t above[TILE_COLS / 64] = {};
  for (int v = 0; v < TILE_COLS / LANES; ++v)
    above[v * LANES / 64] |= static_cast<uint64_t>(bits_of(~(x[v] <= splat(row.least))))
                             << v * LANES % 64;
  for (int word = 0; word < TILE_COLS / 64; ++word)
    for (uint64_t left = above[word]; left; left &= left - 1) {
      const int64_t column = word * 64 + __builtin_ctzll(left);
      const float z = raw[column] < LOG_ZERO ? LOG_ZERO : raw[column];
      if (column >= a.cols || z <= row.least) continue;  // it has risen since
      row.order[row.size] = order_of(z);
      row.column[row.size++] = static_cast<int32_t>(a.column + column);
      if (row.size > a.largest_limit) drop_all_but(a.largest_count, row);
    }
}

}  // namespace OPSD_ISA
}  // namespace opsd
