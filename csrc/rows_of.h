// The first pass, compiled once for each instruction set: tiles folded into statistics; packing.
#include "vec.h"

namespace opsd {
namespace OPSD_ISA {

// softcap(raw + bias) / temperature of 16 columns; those beyond `left` become LOG_ZERO.
OPSD_INLINE Floats finished(Floats raw, const Finish& f, int64_t column, int64_t left) {
  if (f.bias) raw += load_part(f.bias + column, left);
  if (f.softcap != 0.0f) {
    // tanh |x| by exp(-2 |x|): its error is absolute, as that of the logits is.
    const Floats x = raw / all(f.softcap);
    const Floats small = exp(all(-2.0f) * (x < all(0.0f) ? -x : x));
    const Floats height = (all(1.0f) - small) / (all(1.0f) + small);
    raw = all(f.softcap) * (x < all(0.0f) ? -height : height);
  }
  if (f.temperature != 1.0f) raw = raw / all(f.temperature);
  raw = raw < all(LOG_ZERO) ? all(LOG_ZERO) : raw;  // a comparison lets NaN through
  if (left < LANES)
    for (int64_t i = left; i < LANES; ++i) raw[i] = LOG_ZERO;
  return raw;
}

// Finish a row's tile in place; returns its maximum.
OPSD_INLINE float finish_row(const Fold& a, int head, int64_t row) {
  float* z = a.raw[head] + row * TILE_COLS;
  float* kept = a.z[head] ? a.z[head] + row * a.z_stride + a.column : nullptr;
  const Finish& f = a.finish[head];
  Floats top = all(LOG_ZERO);
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const Floats x = finished(load(z + c), f, a.column + c, a.cols - c);
    store(z + c, x);
    if (kept) store_part(kept + c, x, a.cols - c);
    top = larger(x, top);
  }
  return maximum(top);
}

// sum p (u - v) under new maxima, `shift` and `other` below which the old ones of u and v lie.
OPSD_INLINE void rescale(float* sums, const float* weight, float shift, float other) {
  const float shrink = expf(shift);
  const Floats x = (load(sums) + all(shift - other) * load(weight)) * all(shrink);
  store(sums, shrink > 0.0f ? x : all(0.0f));
}

// A head's sums under its new maximum.
OPSD_INLINE void raise(HeadState& head, float top, const Layout& layout, float number) {
  if (!(top > head.top)) return;
  const float shift = head.top - top;
  if (layout.entropy) rescale(head.weighted, head.total, shift, 0.0f);
  if (layout.smoothed && number != 0.0f)
    store(head.plain, load(head.plain) + all(shift * number / LANES));
  store(head.total, load(head.total) * all(expf(shift)));
  head.top = top;
}

template <int64_t KIND, bool ENTROPY>
OPSD_INLINE void add_pair(const Fold& a, int64_t row, RowState& state) {
  HeadState& s = state.head[0];
  HeadState& t = state.head[1];
  const float* z_s = a.raw[0] + row * TILE_COLS;
  const float* z_t = a.raw[1] + row * TILE_COLS;
  Floats total_s = load(s.total), total_t = load(t.total), cross = load(state.cross);
  Floats weighted_s = load(s.weighted), weighted_t = load(t.weighted);
  Ints infinite = {};
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const Floats x_s = load(z_s + c), x_t = load(z_t + c);
    const Floats u_s = x_s - all(s.top), u_t = x_t - all(t.top);
    const Floats p_s = exp(u_s), p_t = exp(u_t);
    if (KIND == FORWARD_KL) {
      infinite |= (x_t > all(BANNED)) & (x_s < all(BANNED));
      cross += p_t * (u_t - u_s);
    } else if (KIND == REVERSE_KL) {
      infinite |= (x_s > all(BANNED)) & (x_t < all(BANNED));
      cross += p_s * (u_s - u_t);
    }
    if (ENTROPY) {
      weighted_s += p_s * u_s;
      weighted_t += p_t * u_t;
    }
    total_s += p_s;
    total_t += p_t;
  }
  store(s.total, total_s);
  store(t.total, total_t);
  if (KIND != JSD) {
    store(state.cross, cross);
    if (any(infinite)) state.infinite = 1.0f;
  }
  if (ENTROPY) {
    store(s.weighted, weighted_s);
    store(t.weighted, weighted_t);
  }
}

template <int64_t KIND>
OPSD_INLINE void fold_pair(const Fold& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    RowState& state = a.state[row];
    HeadState& s = state.head[0];
    HeadState& t = state.head[1];
    const float top_s = finish_row(a, 0, row), top_t = finish_row(a, 1, row);
    if (KIND != JSD && (top_s > s.top || top_t > t.top)) {
      const float shift_s = top_s > s.top ? s.top - top_s : 0.0f;
      const float shift_t = top_t > t.top ? t.top - top_t : 0.0f;
      if (KIND == FORWARD_KL) rescale(state.cross, t.total, shift_t, shift_s);
      if (KIND == REVERSE_KL) rescale(state.cross, s.total, shift_s, shift_t);
    }
    raise(s, top_s, a.layout, 0.0f);
    raise(t, top_t, a.layout, 0.0f);
    if (a.layout.entropy)
      add_pair<KIND, true>(a, row, state);
    else
      add_pair<KIND, false>(a, row, state);
  }
}

// The first column of a row's tile that holds `top`.
OPSD_INLINE int64_t column_of(const Fold& a, const float* z, float top) {
  int64_t c = 0;
  while (c + 1 < a.cols && z[c] != top) ++c;
  return a.column + c;
}

template <bool ENTROPY, bool SMOOTHED>
OPSD_INLINE void fold_one(const Fold& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    HeadState& head = a.state[row].head[0];
    const float* z = a.raw[0] + row * TILE_COLS;
    const float tile_top = finish_row(a, 0, row);
    if (a.layout.predicted && tile_top > head.top) head.best = column_of(a, z, tile_top);
    raise(head, tile_top, a.layout, a.state[row].number);
    const Floats top = all(head.top);
    Floats total = load(head.total), weighted = load(head.weighted), plain = load(head.plain);
    for (int64_t c = 0; c < a.cols; c += LANES) {
      const Floats u = load(z + c) - top;
      const Floats p = exp(u);
      total += p;
      if (ENTROPY) weighted += p * u;
      if (SMOOTHED) {
        if (a.class_weight)
          plain += load_part(a.class_weight + a.column + c, a.cols - c) * u;
        else
          plain += a.cols - c >= LANES ? u : load_part(z + c, a.cols - c, head.top) - top;
      }
    }
    store(head.total, total);
    if (ENTROPY) store(head.weighted, weighted);
    if (SMOOTHED) store(head.plain, plain);
  }
}

static void fold(const Fold& a) {
  const Layout& layout = a.layout;
  if (layout.heads == 2) {
    if (layout.kind == FORWARD_KL) fold_pair<FORWARD_KL>(a);
    if (layout.kind == REVERSE_KL) fold_pair<REVERSE_KL>(a);
    if (layout.kind == JSD) fold_pair<JSD>(a);
  } else if (layout.entropy) {
    layout.smoothed ? fold_one<true, true>(a) : fold_one<true, false>(a);
  } else {
    layout.smoothed ? fold_one<false, true>(a) : fold_one<false, false>(a);
  }
  float number = static_cast<float>(a.cols);
  if (a.class_weight) {
    number = 0.0f;
    for (int64_t c = 0; c < a.cols; ++c) number += a.class_weight[a.column + c];
  }
  for (int64_t row = 0; row < a.rows; ++row) {
    a.state[row].number += number;
    if (!a.label) continue;
    const int64_t y = a.label[row] - a.column;
    if (y < 0 || y >= a.cols) continue;
    for (int64_t i = 0; i < layout.heads; ++i)
      a.state[row].head[i].picked = a.raw[i][row * TILE_COLS + y];
  }
}

static void start(RowState* state, int64_t rows) {
  memset(state, 0, rows * sizeof *state);
  for (int64_t row = 0; row < rows; ++row)
    for (HeadState& head : state[row].head) head.top = LOG_ZERO;
}

static void close(const RowState* state, int64_t rows, const Layout& layout, float* out,
                  int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    float* to = out + row;
    const auto put = [&](float value) {
      *to = value;
      to += stride;
    };
    for (int64_t i = 0; i < layout.heads; ++i) {
      const HeadState& head = state[row].head[i];
      put(head.top);
      put(sum(load(head.total)));
      if (layout.entropy) put(sum(load(head.weighted)));
      if (layout.smoothed) {
        put(sum(load(head.plain)));
        put(state[row].number);
      }
      if (layout.label) put(head.picked);
      if (layout.predicted) put(static_cast<float>(head.best));
    }
    if (layout.crosses()) {
      put(sum(load(state[row].cross)));
      put(state[row].infinite);
    }
  }
}

// ------------------------------------------------------------------------------------------ packing

#if defined(__GNUC__) && !defined(__clang__)
// Exchanges the quarters of pairs of rows that lie STEP apart.
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

OPSD_INLINE void transpose(const char* from, int64_t stride, uint32_t* to) {
  Words rows[LANES];
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i)
    rows[i] = *reinterpret_cast<const WordsAnywhere*>(from + i * stride);
  exchange<8>(rows);
  exchange<4>(rows);
  exchange<2>(rows);
  exchange<1>(rows);
#pragma GCC unroll 16
  for (int i = 0; i < LANES; ++i) *reinterpret_cast<WordsAnywhere*>(to + i * TILE_COLS) = rows[i];
}
#else
OPSD_INLINE void transpose(const char* from, int64_t stride, uint32_t* to) {
  for (int i = 0; i < LANES; ++i)
    for (int k = 0; k < LANES; ++k) memcpy(to + k * TILE_COLS + i, from + i * stride + 4 * k, 4);
}
#endif

static void pack(const char* from, int64_t stride, int64_t rows, int64_t words, int64_t last,
                 uint32_t* to) {
  const int64_t whole = last == 4 ? words : words - 1;
  for (int64_t i = 0; i < TILE_COLS; i += LANES) {
    int64_t k = 0;
    if (i + LANES <= rows)
      for (; k + LANES <= whole; k += LANES)
        transpose(from + i * stride + 4 * k, stride, to + k * TILE_COLS + i);
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
