// The first pass, compiled once for each instruction set: tiles folded into statistics; packing.
#include "vec.h"

namespace opsd {
namespace OPSD_ISA {

// softcap(raw + bias) / temperature of 16 columns; those beyond `left` become LOG_ZERO.
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
  raw = raw < splat(LOG_ZERO) ? splat(LOG_ZERO) : raw;  // a comparison lets NaN through
  if (left < LANES)
    for (int64_t i = left; i < LANES; ++i) raw[i] = LOG_ZERO;
  return raw;
}

// Transform a row's tile in place; returns its maximum.
OPSD_INLINE float transform_row(const Fold& a, int head, int64_t row) {
  float* z = a.raw[head] + row * TILE_COLS;
  float* kept = a.z[head] ? a.z[head] + row * a.z_stride + a.column : nullptr;
  const LogitTransform& f = a.transform[head];
  Floats row_max = splat(LOG_ZERO);
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const Floats x = apply_bias_cap_temperature(load(z + c), f, a.column + c, a.cols - c);
    store(z + c, x);
    if (kept) store_part(kept + c, x, a.cols - c);
    row_max = larger(x, row_max);
  }
  return maximum(row_max);
}

// Rescales sum p (u - v) to new maxima; shift and other are old minus new maximum of u and of v.
OPSD_INLINE void rescale(float* sums, const float* weight, float shift, float other) {
  const float shrink = expf(shift);
  const Floats x = (load(sums) + splat(shift - other) * load(weight)) * splat(shrink);
  store(sums, shrink > 0.0f ? x : splat(0.0f));
}

// Rescales a head's sums to the new maximum, if it is larger.
OPSD_INLINE void update_max(HeadState& head, float row_max, const Layout& layout,
                            float sum_weight) {
  if (!(row_max > head.row_max)) return;
  const float shift = head.row_max - row_max;
  if (layout.entropy) rescale(head.sum_exp_logit, head.sum_exp, shift, 0.0f);
  if (layout.smoothed && sum_weight != 0.0f)
    store(head.sum_logit, load(head.sum_logit) + splat(shift * sum_weight / LANES));
  store(head.sum_exp, load(head.sum_exp) * splat(expf(shift)));
  head.row_max = row_max;
}

template <int64_t KIND, bool ENTROPY>
OPSD_INLINE void add_pair(const Fold& a, int64_t row, RowState& state) {
  HeadState& s = state.head[0];
  HeadState& t = state.head[1];
  const float* z_s = a.raw[0] + row * TILE_COLS;
  const float* z_t = a.raw[1] + row * TILE_COLS;
  Floats sum_exp_s = load(s.sum_exp), sum_exp_t = load(t.sum_exp), cross = load(state.cross);
  Floats sum_exp_logit_s = load(s.sum_exp_logit), sum_exp_logit_t = load(t.sum_exp_logit);
  Ints infinite = {};
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const Floats x_s = load(z_s + c), x_t = load(z_t + c);
    const Floats u_s = x_s - splat(s.row_max), u_t = x_t - splat(t.row_max);
    const Floats p_s = exp(u_s), p_t = exp(u_t);
    if (KIND == FORWARD_KL) {
      infinite |= (x_t > splat(BANNED)) & (x_s < splat(BANNED));
      cross += p_t * (u_t - u_s);
    } else if (KIND == REVERSE_KL) {
      infinite |= (x_s > splat(BANNED)) & (x_t < splat(BANNED));
      cross += p_s * (u_s - u_t);
    }
    if (ENTROPY) {
      sum_exp_logit_s += p_s * u_s;
      sum_exp_logit_t += p_t * u_t;
    }
    sum_exp_s += p_s;
    sum_exp_t += p_t;
  }
  store(s.sum_exp, sum_exp_s);
  store(t.sum_exp, sum_exp_t);
  if (KIND != JSD) {
    store(state.cross, cross);
    if (any(infinite)) state.infinite = 1.0f;
  }
  if (ENTROPY) {
    store(s.sum_exp_logit, sum_exp_logit_s);
    store(t.sum_exp_logit, sum_exp_logit_t);
  }
}

template <int64_t KIND>
OPSD_INLINE void fold_pair(const Fold& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    RowState& state = a.state[row];
    HeadState& s = state.head[0];
    HeadState& t = state.head[1];
    const float row_max_s = transform_row(a, 0, row), row_max_t = transform_row(a, 1, row);
    if (KIND != JSD && (row_max_s > s.row_max || row_max_t > t.row_max)) {
      const float shift_s = row_max_s > s.row_max ? s.row_max - row_max_s : 0.0f;
      const float shift_t = row_max_t > t.row_max ? t.row_max - row_max_t : 0.0f;
      if (KIND == FORWARD_KL) rescale(state.cross, t.sum_exp, shift_t, shift_s);
      if (KIND == REVERSE_KL) rescale(state.cross, s.sum_exp, shift_s, shift_t);
    }
    update_max(s, row_max_s, a.layout, 0.0f);
    update_max(t, row_max_t, a.layout, 0.0f);
    if (a.layout.entropy)
      add_pair<KIND, true>(a, row, state);
    else
      add_pair<KIND, false>(a, row, state);
  }
}

// The first column of a row's tile that holds `row_max`.
OPSD_INLINE int64_t column_of(const Fold& a, const float* z, float row_max) {
  int64_t c = 0;
  while (c + 1 < a.cols && z[c] != row_max) ++c;
  return a.column + c;
}

template <bool ENTROPY, bool SMOOTHED>
OPSD_INLINE void fold_one(const Fold& a) {
  for (int64_t row = 0; row < a.rows; ++row) {
    HeadState& head = a.state[row].head[0];
    const float* z = a.raw[0] + row * TILE_COLS;
    const float tile_max = transform_row(a, 0, row);
    if (a.layout.predicted && tile_max > head.row_max) head.argmax = column_of(a, z, tile_max);
    update_max(head, tile_max, a.layout, a.state[row].sum_weight);
    const Floats row_max = splat(head.row_max);
    Floats sum_exp = load(head.sum_exp), sum_exp_logit = load(head.sum_exp_logit);
    Floats sum_logit = load(head.sum_logit);
    for (int64_t c = 0; c < a.cols; c += LANES) {
      const Floats u = load(z + c) - row_max;
      const Floats p = exp(u);
      sum_exp += p;
      if (ENTROPY) sum_exp_logit += p * u;
      if (SMOOTHED) {
        if (a.class_weight)
          sum_logit += load_part(a.class_weight + a.column + c, a.cols - c) * u;
        else
          // Columns beyond the last add 0.
          sum_logit +=
              a.cols - c >= LANES ? u : load_part(z + c, a.cols - c, head.row_max) - row_max;
      }
    }
    store(head.sum_exp, sum_exp);
    if (ENTROPY) store(head.sum_exp_logit, sum_exp_logit);
    if (SMOOTHED) store(head.sum_logit, sum_logit);
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
  float sum_weight = static_cast<float>(a.cols);
  if (a.class_weight) {
    sum_weight = 0.0f;
    for (int64_t c = 0; c < a.cols; ++c) sum_weight += a.class_weight[a.column + c];
  }
  for (int64_t row = 0; row < a.rows; ++row) {
    a.state[row].sum_weight += sum_weight;
    if (!a.label) continue;
    const int64_t y = a.label[row] - a.column;
    if (y < 0 || y >= a.cols) continue;
    for (int64_t i = 0; i < layout.heads; ++i)
      a.state[row].head[i].label_logit = a.raw[i][row * TILE_COLS + y];
  }
}

static void reset(RowState* state, int64_t rows) {
  memset(state, 0, rows * sizeof *state);
  for (int64_t row = 0; row < rows; ++row)
    for (HeadState& head : state[row].head) head.row_max = LOG_ZERO;
}

static void store_statistics(const RowState* state, int64_t rows, const Layout& layout, float* out,
                             int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    float* to = out + row;
    const auto put = [&](float value) {
      *to = value;
      to += stride;
    };
    for (int64_t i = 0; i < layout.heads; ++i) {
      const HeadState& head = state[row].head[i];
      put(head.row_max);
      put(sum(load(head.sum_exp)));
      if (layout.entropy) put(sum(load(head.sum_exp_logit)));
      if (layout.smoothed) {
        put(sum(load(head.sum_logit)));
        put(state[row].sum_weight);
      }
      if (layout.label) put(head.label_logit);
      if (layout.predicted) put(static_cast<float>(head.argmax));
    }
    if (layout.has_cross()) {
      put(sum(load(state[row].cross)));
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
