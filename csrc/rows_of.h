// The first pass, compiled once for each instruction set: tiles folded into statistics; packing.
#include "largest_of.h"
#include "vec.h"

namespace opsd {
namespace OPSD_ISA {

constexpr int VECTORS = TILE_COLS / LANES;

// softcap(raw + bias) / temperature of a vector's columns; those beyond `left` become LOG_ZERO.
OPSD_INLINE Floats apply_bias_cap_temperature(Floats raw, const LogitTransform& f, int64_t column,
                                              int64_t left) {
  if (f.bias) raw += load_part(f.bias + column, left);
  if (f.softcap != 0.0f) {
    // tanh |x| from exp(-2 |x|): its error is absolute, as the logits' error is.
    const Floats x = raw / splat(f.softcap);
    const Floats small = exp(splat(-2.0f) * (x < splat(0.0f) ? -x : x));
    const Floats tanh = (splat(1.0f) - small) / (splat(1.0f) + small);
    raw = splat(f.softcap) * (x < splat(0.0f) ? -tanh : tanh);
  }
  if (f.temperature != 1.0f) raw = raw / splat(f.temperature);
  return raw;
}

// A row's tile of logits in registers, and written to memory where they are kept.
OPSD_INLINE void load_logits(const Fold& a, int head, int64_t row, Floats* x) {
  float* raw = a.raw[head] + row * TILE_COLS;
  float* kept = a.z[head] ? a.z[head] + row * a.z_stride + a.column : nullptr;
  const LogitTransform& f = a.transform[head];
  const bool plain = !f.bias && f.softcap == 0.0f && f.temperature == 1.0f;
  for (int v = 0; v < VECTORS; ++v) x[v] = load(raw + v * LANES);
  if (!plain)
    for (int v = 0; v < VECTORS; ++v)
      x[v] = apply_bias_cap_temperature(x[v], f, a.column + v * LANES, a.cols - v * LANES);
  for (int v = 0; v < VECTORS; ++v) x[v] = x[v] < splat(LOG_ZERO) ? splat(LOG_ZERO) : x[v];
  if (a.cols < TILE_COLS)
    for (int v = 0; v < VECTORS; ++v)
      x[v] = lane_numbers() < Ints{} + static_cast<int32_t>(a.cols - v * LANES) ? x[v]
                                                                               : splat(LOG_ZERO);
  if (!plain)  // the label's logit is read from there
    for (int v = 0; v < VECTORS; ++v) store(raw + v * LANES, x[v]);
  if (!kept) return;
  if (a.cols == TILE_COLS && reinterpret_cast<uintptr_t>(kept) % 64 == 0)
    for (int v = 0; v < VECTORS; ++v) stream(kept + v * LANES, x[v]);
  else
    for (int v = 0; v < VECTORS; ++v) store_part(kept + v * LANES, x[v], a.cols - v * LANES);
}

OPSD_INLINE Floats new_max(const HeadState& head, const Floats* x) {
  Floats found = load(head.row_max);
  for (int v = 0; v < VECTORS; ++v) found = larger(x[v], found);
  return found;
}

// sum p (u - v) rescaled to new maxima; shift and other are old minus new maximum of u and of v.
OPSD_INLINE Floats rescaled(Floats sums, Floats weight, Floats shift, Floats other,
                            Floats shrink) {
  const Floats x = (sums + (shift - other) * weight) * shrink;
  return shrink > splat(0.0f) ? x : splat(0.0f);  // not 0 * inf
}

template <int64_t KIND, bool ENTROPY>
OPSD_INLINE void fold_pair(const Fold& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    RowState& state = a.state[row];
    HeadState& s = state.head[0];
    HeadState& t = state.head[1];
    Floats x_s[VECTORS], x_t[VECTORS];
    load_logits(a, 0, row, x_s);
    load_logits(a, 1, row, x_t);
    const Floats max_s = new_max(s, x_s), max_t = new_max(t, x_t);
    // The tile's own sums: to add them up before they are added to the chunk's rounds less.
    Floats sum_s = {}, sum_t = {}, entropy_s = {}, entropy_t = {}, cross = {};
    Ints infinite = {};
    for (int v = 0; v < VECTORS; ++v) {
      const Floats u_s = x_s[v] - max_s, u_t = x_t[v] - max_t;
      const Floats p_s = exp(u_s), p_t = exp(u_t);
      if (KIND == FORWARD_KL) {
        infinite |= (x_t[v] > splat(BANNED)) & (x_s[v] < splat(BANNED));
        cross += p_t * (u_t - u_s);
      } else if (KIND == REVERSE_KL) {
        infinite |= (x_s[v] > splat(BANNED)) & (x_t[v] < splat(BANNED));
        cross += p_s * (u_s - u_t);
      }
      if (ENTROPY) {
        entropy_s += p_s * u_s;
        entropy_t += p_t * u_t;
      }
      sum_s += p_s;
      sum_t += p_t;
    }
    const Floats old_s = load(s.sum_exp), old_t = load(t.sum_exp), none = {};
    const Floats shift_s = load(s.row_max) - max_s, shift_t = load(t.row_max) - max_t;
    const Floats shrink_s = exp(shift_s), shrink_t = exp(shift_t);
    if (KIND == FORWARD_KL) cross += rescaled(load(state.cross), old_t, shift_t, shift_s, shrink_t);
    if (KIND == REVERSE_KL) cross += rescaled(load(state.cross), old_s, shift_s, shift_t, shrink_s);
    if (KIND != JSD) {
      store(state.cross, cross);
      if (any(infinite)) state.infinite = 1.0f;
    }
    if (ENTROPY) {
      entropy_s += rescaled(load(s.sum_exp_logit), old_s, shift_s, none, shrink_s);
      entropy_t += rescaled(load(t.sum_exp_logit), old_t, shift_t, none, shrink_t);
      store(s.sum_exp_logit, entropy_s);
      store(t.sum_exp_logit, entropy_t);
    }
    store(s.row_max, max_s);
    store(t.row_max, max_t);
    store(s.sum_exp, old_s * shrink_s + sum_s);
    store(t.sum_exp, old_t * shrink_t + sum_t);
  }
}

template <int64_t KIND>
OPSD_INLINE void fold_pair_of_kind(const Fold& a) {
  a.layout.entropy ? fold_pair<KIND, true>(a) : fold_pair<KIND, false>(a);
}

// Keeps the first column of the row's maximum.
OPSD_INLINE void update_argmax(const Fold& a, const Floats* x, HeadState& head) {
  Floats tile = x[0];
  for (int v = 1; v < VECTORS; ++v) tile = larger(x[v], tile);
  const float found = maximum(tile);
  if (!(found > head.largest)) return;
  float z[TILE_COLS];
  for (int v = 0; v < VECTORS; ++v) store(z + v * LANES, x[v]);
  int64_t c = 0;
  while (c + 1 < a.cols && z[c] != found) ++c;
  head.largest = found;
  head.argmax = a.column + c;
}

template <bool ENTROPY, bool SMOOTHED>
OPSD_INLINE void fold_one(const Fold& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    HeadState& head = a.state[row].head[0];
    Floats x[VECTORS];
    load_logits(a, 0, row, x);
    if (a.layout.predicted) update_argmax(a, x, head);
    if (a.largest) keep_largest(a, x, a.raw[0] + row * TILE_COLS, a.largest[row]);
    const Floats row_max = new_max(head, x), none = {};
    Floats sum_exp = {}, sum_exp_logit = {}, sum_logit = {}, sum_weight = {};  // the tile's own
    for (int v = 0; v < VECTORS; ++v) {
      const Floats u = x[v] - row_max;
      const Floats p = exp(u);
      sum_exp += p;
      if (ENTROPY) sum_exp_logit += p * u;
      if (SMOOTHED) {
        const int64_t left = a.cols - v * LANES;
        const Floats present =
            lane_numbers() < Ints{} + static_cast<int32_t>(left) ? splat(1.0f) : none;
        const float* weights = a.class_weight + a.column + v * LANES;
        const Floats weight = a.class_weight ? load_part(weights, left) : present;
        sum_logit += present != none ? weight * u : none;
        sum_weight += weight;
      }
    }
    const Floats old = load(head.sum_exp), shift = load(head.row_max) - row_max;
    const Floats shrink = exp(shift);
    if (ENTROPY) {
      sum_exp_logit += rescaled(load(head.sum_exp_logit), old, shift, none, shrink);
      store(head.sum_exp_logit, sum_exp_logit);
    }
    if (SMOOTHED) {
      const Floats weight = load(head.sum_weight);
      sum_logit += load(head.sum_logit) + (weight != none ? shift * weight : none);
      store(head.sum_logit, sum_logit);
      store(head.sum_weight, weight + sum_weight);
    }
    store(head.row_max, row_max);
    store(head.sum_exp, old * shrink + sum_exp);
  }
}

static void fold(const Fold& a) {
  const Layout& layout = a.layout;
  if (layout.heads == 2) {
    if (layout.kind == FORWARD_KL) fold_pair_of_kind<FORWARD_KL>(a);
    if (layout.kind == REVERSE_KL) fold_pair_of_kind<REVERSE_KL>(a);
    if (layout.kind == JSD) fold_pair_of_kind<JSD>(a);
  } else if (layout.entropy) {
    layout.smoothed ? fold_one<true, true>(a) : fold_one<true, false>(a);
  } else {
    layout.smoothed ? fold_one<false, true>(a) : fold_one<false, false>(a);
  }
  finish_streams();
  if (!a.label) return;
  for (int64_t row = 0; row < a.rows; ++row) {
    const int64_t y = a.label[row] - a.column;
    if (y < 0 || y >= a.cols) continue;
    for (int64_t i = 0; i < layout.heads; ++i) {
      const float z = a.raw[i][row * TILE_COLS + y];
      a.state[row].head[i].label_logit = z < LOG_ZERO ? LOG_ZERO : z;
    }
  }
}

static void reset(RowState* state, int64_t rows) {
  memset(state, 0, rows * sizeof *state);
  for (int64_t row = 0; row < rows; ++row)
    for (HeadState& head : state[row].head) {
      store(head.row_max, splat(LOG_ZERO));
      head.largest = LOG_ZERO;
    }
}

static void store_statistics(const RowState* state, int64_t rows, const Layout& layout, float* out,
                             int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    float* to = out + row;
    const auto put = [&](float value) {
      *to = value;
      to += stride;
    };
    Floats shift[2], shrink[2];  // of each lane's maximum below the row's
    const Floats none = {};
    for (int64_t i = 0; i < layout.heads; ++i) {
      const HeadState& head = state[row].head[i];
      const float row_max = maximum(load(head.row_max));
      shift[i] = load(head.row_max) - splat(row_max);
      shrink[i] = exp(shift[i]);
      const Floats sum_exp = load(head.sum_exp), sum_weight = load(head.sum_weight);
      put(row_max);
      put(sum(sum_exp * shrink[i]));
      if (layout.entropy)
        put(sum(rescaled(load(head.sum_exp_logit), sum_exp, shift[i], none, shrink[i])));
      if (layout.smoothed) {
        put(sum(load(head.sum_logit) + (sum_weight != none ? shift[i] * sum_weight : none)));
        put(sum(sum_weight));
      }
      if (layout.label) put(head.label_logit);
      if (layout.predicted) put(static_cast<float>(head.argmax));
    }
    if (layout.has_cross()) {
      const int p = layout.kind == FORWARD_KL ? 1 : 0, q = 1 - p;  // the KL of p from q
      put(sum(rescaled(load(state[row].cross), load(state[row].head[p].sum_exp), shift[p],
                       shift[q], shrink[p])));
      put(state[row].infinite);
    }
  }
}

// ----------------------------------------------------------------------------------------- packing

#if defined(__GNUC__) && !defined(__clang__)
// One step of a transpose: exchanges the off-diagonal blocks of rows that lie STEP apart.
template <int STEP>
OPSD_INLINE void exchange(Words* rows) {
  Ints low, high;
  for (int j = 0; j < LANES; ++j) {
    low[j] = j & STEP ? LANES + (j ^ STEP) : j;
    high[j] = j & STEP ? LANES + j : j ^ STEP;
  }
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const Words a = rows[i], b = rows[i | STEP];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i | STEP] = __builtin_shuffle(a, b, high);
  }
}

// to[k * to_stride + i] = word k of rows[i].
OPSD_INLINE void transpose(Words* rows, uint32_t* to, int64_t to_stride) {
  if constexpr (LANES > 8) exchange<8>(rows);
  if constexpr (LANES > 4) exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) *reinterpret_cast<WordsAnywhere*>(to + i * to_stride) = rows[i];
}
#else
OPSD_INLINE void transpose(Words* rows, uint32_t* to, int64_t to_stride) {
  for (int i = 0; i < LANES; ++i)
    for (int k = 0; k < LANES; ++k) to[k * to_stride + i] = rows[i][k];
}
#endif

static void transpose_halves(const uint16_t* from, int64_t stride, int64_t rows, int64_t cols,
                             int64_t padded, uint16_t* to) {
  for (int64_t k = 0; k < padded; k += 2 * LANES) {
    for (int64_t c = 0; c < cols; c += LANES) {
      uint16_t block[2 * LANES][LANES] = {};
      const bool whole = k + 2 * LANES <= rows && c + LANES <= cols;
      const uint16_t* at = from + k * stride + c;
      if (!whole)
        for (int64_t i = 0; i < 2 * LANES && k + i < rows; ++i)
          for (int64_t j = 0; j < LANES && c + j < cols; ++j) block[i][j] = at[i * stride + j];
      Words words[LANES];  // rows 2 i and 2 i + 1 in one word
#pragma GCC unroll 16
      for (int i = 0; i < LANES; ++i) {
        const uint16_t* row = whole ? at + 2 * i * stride : block[2 * i];
        words[i] = load_halves(row) | (load_halves(row + (whole ? stride : LANES)) << 16);
      }
      uint32_t tile[LANES * LANES];
      transpose(words, tile, LANES);
      for (int64_t j = 0; j < LANES && c + j < cols; ++j)
        memcpy(to + (c + j) * padded + k, tile + j * LANES, LANES * sizeof *tile);
    }
  }
}

static void pack(const char* from, int64_t stride, int64_t rows, int64_t words, int64_t last,
                 uint32_t* to) {
  const int64_t whole = last == 4 ? words : words - 1;
  for (int64_t i = 0; i < TILE_COLS; i += LANES) {
    int64_t k = 0;
    if (i + LANES <= rows)
      for (; k + LANES <= whole; k += LANES) {
        Words block[LANES];
#pragma GCC unroll 16
        for (int j = 0; j < LANES; ++j)
          block[j] = *reinterpret_cast<const WordsAnywhere*>(from + (i + j) * stride + 4 * k);
        transpose(block, to + k * TILE_COLS + i, TILE_COLS);
      }
    for (; k < words; ++k) {
      for (int64_t row = i; row < i + LANES; ++row) {
        uint32_t word = 0;
        if (row < rows) memcpy(&word, from + row * stride + 4 * k, k < whole ? 4 : last);
        to[k * TILE_COLS + row] = word;
      }
    }
  }
}

}  // namespace OPSD_ISA
}  // namespace opsd
