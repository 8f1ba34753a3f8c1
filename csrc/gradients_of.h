// The second pass, compiled once for each instruction set: sums of a divergence, and gradients.
#include "vec.h"

namespace opsd {
namespace OPSD_ISA {

// Lanes are added up after every SEGMENT columns: shorter fp32 sums round less.
constexpr int64_t SEGMENT = 128 * LANES;

// log(1 - beta + beta exp(d)): log(m / s) from d = log(t / s), as log1p(beta expm1(d)), so that on
// close pairs the rounding of log s and log t cancels to first order.
OPSD_INLINE Floats log_mixture(Floats d, float beta) { return log1p(splat(beta) * expm1(d)); }

struct Entry {
  Floats entry, share, s, z_s;
};

// entry: the column's part of the value. share: what its gradient is made of; t for the forward KL,
// entry + s for the reverse KL, s log(m / s) for the JSD.
template <int64_t KIND>
OPSD_INLINE Entry entry_of(const PairRow& a, Floats z_s, Floats z_t) {
  const Floats log_s = (z_s - splat(a.row_max_s)) - splat(a.log_sum_s);
  const Floats log_t = (z_t - splat(a.row_max_t)) - splat(a.log_sum_t);
  const Floats s = exp(log_s);
  Floats d = log_t - log_s;
  if (KIND == FORWARD_KL) {
    const Floats t = exp(log_t);
    return {t * d, t, s, z_s};
  }
  if (KIND == REVERSE_KL) {
    const Floats entry = s * (log_s - log_t);
    return {entry, entry + s, s, z_s};
  }
  // Beyond 80 the smaller probability is negligible next to the larger, and exp is still finite.
  d = d > splat(80.0f) ? splat(80.0f) : d;
  d = d < splat(-80.0f) ? splat(-80.0f) : d;
  const Floats q = log_mixture(d, a.beta);
  const Floats share = s * q;
  return {splat(a.beta) * exp(log_t) * (d - q) - splat(a.one_minus_beta) * share, share, s, z_s};
}

// d softcap / d raw at the logit z.
OPSD_INLINE Floats slope_at(Floats z, float inv_cap) {
  const Floats x = z * splat(inv_cap);
  return splat(1.0f) - x * x;
}

OPSD_INLINE void store_gradient(float* row, int64_t column, Floats x, int64_t left, bool bf16) {
  if (bf16)
    store_part(reinterpret_cast<HalfAnywhere*>(row) + column, x, left);
  else
    store_part(row + column, x, left);
}

template <int64_t KIND, bool CLIPPED, bool KEEP>
static Sums sums_of(const PairRow& a) {
  Sums total = {0.0f, 0.0f, 0.0f};
  for (int64_t first = 0; first < a.cols; first += SEGMENT) {
    const int64_t end = first + SEGMENT < a.cols ? first + SEGMENT : a.cols;
    Floats value = {}, shares = {}, unclipped = {};
    for (int64_t c = first; c < end; c += LANES) {
      const int64_t left = end - c;
      const Floats z_s = left >= LANES ? load(a.z_s + c) : load_part(a.z_s + c, left, LOG_ZERO);
      const Floats z_t = left >= LANES ? load(a.z_t + c) : load_part(a.z_t + c, left, LOG_ZERO);
      Entry x = entry_of<KIND>(a, z_s, z_t);
      if (CLIPPED) {
        unclipped += x.entry;
        const Ints over = x.entry > splat(a.clip);
        x.share = over ? splat(0.0f) : x.share;
        x.entry = over ? splat(a.clip) : x.entry;
      }
      value += x.entry;
      shares += x.share;
      if (KEEP) {
        if (a.inv_cap != 0.0f) {
          const Floats slope = slope_at(z_s, a.inv_cap);
          x.share *= slope;
          x.s *= slope;
        }
        store_part(a.z_s + c, x.share, left);
        store_part(a.z_t + c, x.s, left);
      }
    }
    total.value += sum(value);
    total.shares += sum(shares);
    if (CLIPPED) total.unclipped += sum(unclipped);
  }
  return total;
}

template <int64_t KIND>
OPSD_INLINE Sums sums_of_kind(const PairRow& a, bool keep) {
  if (a.clipped) return keep ? sums_of<KIND, true, true>(a) : sums_of<KIND, true, false>(a);
  return keep ? sums_of<KIND, false, true>(a) : sums_of<KIND, false, false>(a);
}

static Sums sums(const PairRow& a, bool keep) {
  if (a.kind == FORWARD_KL) return sums_of_kind<FORWARD_KL>(a, keep);
  if (a.kind == REVERSE_KL) return sums_of_kind<REVERSE_KL>(a, keep);
  return sums_of_kind<JSD>(a, keep);
}

static void kept_gradient(const PairRow& a, bool bf16) {
  const bool forward = a.kind == FORWARD_KL, reverse = a.kind == REVERSE_KL;
  const float sign = forward ? -1.0f : reverse ? 1.0f : -a.one_minus_beta;
  const Floats factor = splat(sign * a.factor), sum_share = splat(a.sum_share);
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const int64_t left = a.cols - c;
    const Floats share = load_part(a.z_s + c, left), s = load_part(a.z_t + c, left);
    const Floats dz = (share - s * sum_share) * factor;
    store_gradient(a.z_s, c, dz, left, bf16);
  }
}

template <int64_t KIND>
OPSD_INLINE void kl_gradient_of(const PairRow& a, bool bf16) {
  // An infinite reverse KL has no gradient (inf - inf); the value reports it.
  const bool none = KIND == REVERSE_KL && a.sum_share == __builtin_inff();
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const int64_t left = a.cols - c;
    const Floats z_s = load_part(a.z_s + c, left);
    const Entry x = entry_of<KIND>(a, z_s, load_part(a.z_t + c, left));
    Floats dz = KIND == FORWARD_KL ? x.s - x.share : x.entry - x.s * splat(a.sum_share);
    if (a.inv_cap != 0.0f) dz *= slope_at(z_s, a.inv_cap);
    store_gradient(a.z_s, c, none ? splat(0.0f) : dz * splat(a.factor), left, bf16);
  }
}

static void kl_gradient(const PairRow& a, bool bf16) {
  a.kind == FORWARD_KL ? kl_gradient_of<FORWARD_KL>(a, bf16) : kl_gradient_of<REVERSE_KL>(a, bf16);
}

// The gradient of a vector's columns of a log-probability; `sharp` is added to all of them.
OPSD_INLINE Floats logprob_dz(const LogprobRow& a, Floats z, Floats weight, float sharp,
                              Floats& entropy_dz) {
  const Floats log_p = (z - splat(a.row_max)) - splat(a.log_sum);
  const Floats p = exp(log_p);
  Floats dz = (splat(a.uniform) * weight + splat(sharp) - splat(a.mass) * p) *
              splat(a.scale / a.temperature);
  const Floats slope = a.inv_cap != 0.0f ? slope_at(z, a.inv_cap) : splat(1.0f);
  if (a.with_entropy) {
    entropy_dz = -p * (log_p + splat(a.entropy)) * splat(1.0f / a.temperature);
    dz += entropy_dz * splat(a.entropy_scale);
    entropy_dz *= slope;
  }
  return dz * slope;
}

static void logprob_gradient(const LogprobRow& a, bool bf16, void* out_entropy) {
  float* entropy_out = static_cast<float*>(out_entropy);
  const bool owned = a.label >= 0 && a.label < a.cols;
  const Floats at_label = owned ? splat(a.z[a.label]) : Floats{};
  Floats entropy_dz = {};
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const int64_t left = a.cols - c;
    const Floats weight = a.class_weight ? load_part(a.class_weight + c, left) : splat(1.0f);
    const Floats dz = logprob_dz(a, load_part(a.z + c, left), weight, 0.0f, entropy_dz);
    if (a.with_entropy && entropy_out) store_gradient(entropy_out, c, entropy_dz, left, bf16);
    store_gradient(a.z, c, dz, left, bf16);
  }
  if (!owned) return;
  const Floats weight = splat(a.class_weight ? a.class_weight[a.label] : 1.0f);
  store_gradient(a.z, a.label, logprob_dz(a, at_label, weight, a.sharp, entropy_dz), 1, bf16);
}

template <bool ADD, bool STREAM>
static void add_rows_of(const float* x, int64_t stride, int64_t rows, int64_t cols,
                        const float* added, float* sum, uint16_t* out, int64_t to_stride) {
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t c = 0; c < cols; c += 2 * LANES) {
      const int64_t at = row * to_stride + c, left = cols - c;
      Floats y = load(x + row * stride + c), z = load(x + row * stride + c + LANES);
      if (ADD) {
        y += load_part(added + at, left);
        z += load_part(added + at + LANES, left - LANES);
      }
      auto* to = reinterpret_cast<HalfAnywhere*>(out) + at;
      if (STREAM && out) {
        stream(to, y, z);
      } else if (STREAM) {
        stream(sum + at, y);
        stream(sum + at + LANES, z);
      } else if (out) {
        store_part(to, y, left);
        store_part(to + LANES, z, left - LANES);
      } else {
        store_part(sum + at, y, left);
        store_part(sum + at + LANES, z, left - LANES);
      }
    }
  }
}

static void add_rows(const float* x, int64_t stride, int64_t rows, int64_t cols,
                     const float* added, float* sum, uint16_t* out, int64_t to_stride) {
  const void* to = out ? static_cast<void*>(out) : sum;
  const bool whole = cols % (2 * LANES) == 0 && to_stride % (2 * LANES) == 0 &&
                     reinterpret_cast<uintptr_t>(to) % 64 == 0;
  auto* run = whole ? add_rows_of<false, true> : add_rows_of<false, false>;
  // Sums that were just read are in cache.
  if (added) run = whole && out ? add_rows_of<true, true> : add_rows_of<true, false>;
  run(x, stride, rows, cols, added, sum, out, to_stride);
}

}  // namespace OPSD_ISA

const RowMath& OPSD_TABLE() {
  using namespace OPSD_ISA;
  static const RowMath table = {reset,         fold,        store_statistics, sums,
                                kept_gradient, kl_gradient, logprob_gradient, pack,
                                transpose_halves, add_rows,  add_scaled,
                                finish_streams};
  return table;
}

}  // namespace opsd
