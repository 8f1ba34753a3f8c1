#pragma once

// The largest logits of each row, compiled once for each instruction set.
#include "vec.h"

namespace opsd {
namespace OPSD_ISA {

// Logits as integers in the same order; NaN has a place in it too.
OPSD_INLINE Ints order_of(Floats z) {
  const Ints bits = floats_to_bits(z + Floats{});  // -0 becomes 0, to which it is equal
  return bits ^ ((bits >> 31) & 0x7fffffff);
}

OPSD_INLINE int64_t count_not_less(const int32_t* order, int64_t size, int32_t than) {
  Ints found = {};
  for (int64_t i = 0; i < size; i += LANES)
    found -= *reinterpret_cast<const IntsAnywhere*>(order + i) >= Ints{} + than;
  int64_t count = 0;
  for (int i = 0; i < LANES; ++i) count += found[i];
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

// Adds a tile's logits above the row's least; NaN is among them.
OPSD_INLINE void keep_largest(const Fold& a, const Floats* x, RowLargest& row) {
  Ints above = {};
  for (int v = 0; v < TILE_COLS / LANES; ++v) above |= ~(x[v] <= splat(row.least));
  if (!any(above)) return;
  for (int v = 0; v < TILE_COLS / LANES; ++v) {
    const int64_t left = a.cols - v * LANES;
    const Ints present = lane_numbers() < Ints{} + static_cast<int32_t>(left);
    const Ints wanted = ~(x[v] <= splat(row.least)) & present, order = order_of(x[v]);
    if (!any(wanted)) continue;
    int32_t size = row.size;
    for (int i = 0; i < LANES; ++i) {  // a branch here would often be mispredicted
      row.order[size] = order[i];
      row.column[size] = static_cast<int32_t>(a.column) + v * LANES + i;
      size -= wanted[i];
    }
    row.size = size;
    if (size > a.largest_limit) drop_all_but(a.largest_count, row);
  }
}

}  // namespace OPSD_ISA
}  // namespace opsd
