// The second pass, compiled once for each instruction set: sums of a divergence, and gradients.
#include "vec.h"

namespace opsd {
namespace OPSD_ISA {

// Sums of so many columns by lane are added up before the next: fp32 forgets less.
constexpr int64_t SEGMENT = 2048;

// log(rest + beta exp(d)): log(m / s) from d = log(t / s). Near 0 by series for expm1 and log1p, so
// that on close pairs the rounding of log s and log t cancels to first order.
OPSD_INLINE Floats log_mixture(Floats d, float beta, float rest) {
  const Floats one = all(1.0f);
  Floats e = one + d * all(1.0f / 7);
  e = one + d * all(1.0f / 6) * e;
  e = one + d * all(1.0f / 5) * e;
  e = one + d * all(1.0f / 4) * e;
  e = one + d * all(1.0f / 3) * e;
  e = one + d * all(1.0f / 2) * e;
  const Floats x = all(beta) * d * e;
  const Floats y = x / (all(2.0f) + x);
  const Floats yy = y * y;
  Floats near = all(1.0f / 7) + yy * all(1.0f / 9);
  near = all(1.0f / 5) + yy * near;
  near = all(1.0f / 3) + yy * near;
  near = all(2.0f) * y * (one + yy * near);
  const Ints close = (d < all(0.35f)) & (d > all(-0.35f));
  if (every(close)) return near;
  return close ? near : log(all(rest) + all(beta) * exp(d));
}

struct Entry {
  Floats entry, share, s, z_s;
};

// Each column's part of the value, and what its gradient is made of: share is t for the forward KL,
// entry + s for the reverse KL, s log(m / s) for the JSD.
template <int64_t KIND>
OPSD_INLINE Entry entry_of(const PairRow& a, Floats z_s, Floats z_t) {
  const Floats log_s = (z_s - all(a.top_s)) - all(a.log_total_s);
  const Floats log_t = (z_t - all(a.top_t)) - all(a.log_total_t);
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
  // Beyond 80 the smaller probability is nothing beside the larger, and exp is still finite.
  d = d > all(80.0f) ? all(80.0f) : d;
  d = d < all(-80.0f) ? all(-80.0f) : d;
  const Floats q = log_mixture(d, a.beta, a.rest);
  const Floats share = s * q;
  return {all(a.beta) * exp(log_t) * (d - q) - all(a.rest) * share, share, s, z_s};
}

// d softcap / d raw where the finished logit is z.
OPSD_INLINE Floats slope_at(Floats z, float height) {
  const Floats x = z * all(height);
  return all(1.0f) - x * x;
}

OPSD_INLINE void store_gradient(float* row, int64_t column, Floats x, int64_t left, bool half) {
  if (half)
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
        const Ints over = x.entry > all(a.clip);
        x.share = over ? all(0.0f) : x.share;
        x.entry = over ? all(a.clip) : x.entry;
      }
      value += x.entry;
      shares += x.share;
      if (KEEP) {
        if (a.height != 0.0f) {
          const Floats slope = slope_at(z_s, a.height);
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

static void kept_gradient(const PairRow& a, bool half) {
  const float sign = a.kind == FORWARD_KL ? -1.0f : a.kind == REVERSE_KL ? 1.0f : -a.rest;
  const Floats factor = all(sign * a.factor), total = all(a.total);
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const int64_t left = a.cols - c;
    const Floats dz = (load_part(a.z_s + c, left) - load_part(a.z_t + c, left) * total) * factor;
    store_gradient(a.z_s, c, dz, left, half);
  }
}

template <int64_t KIND>
OPSD_INLINE void kl_gradient_of(const PairRow& a, bool half) {
  // Of an infinite reverse KL inf - inf has no direction; the value reports it.
  const bool none = KIND == REVERSE_KL && a.total == __builtin_inff();
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const int64_t left = a.cols - c;
    const Floats z_s = load_part(a.z_s + c, left);
    const Entry x = entry_of<KIND>(a, z_s, load_part(a.z_t + c, left));
    Floats dz = KIND == FORWARD_KL ? x.s - x.share : x.entry - x.s * all(a.total);
    if (a.height != 0.0f) dz *= slope_at(z_s, a.height);
    store_gradient(a.z_s, c, none ? all(0.0f) : dz * all(a.factor), left, half);
  }
}

static void kl_gradient(const PairRow& a, bool half) {
  a.kind == FORWARD_KL ? kl_gradient_of<FORWARD_KL>(a, half) : kl_gradient_of<REVERSE_KL>(a, half);
}

static void logprob_gradient(const LogprobRow& a, bool half, void* out_entropy) {
  float* beside = static_cast<float*>(out_entropy);
  const Floats scale = all(a.scale / a.temperature), own = all(1.0f / a.temperature);
  for (int64_t c = 0; c < a.cols; c += LANES) {
    const int64_t left = a.cols - c;
    const Floats z = load_part(a.z + c, left);
    const Floats log_p = (z - all(a.top)) - all(a.log_total);
    const Floats p = exp(log_p);
    Floats dz = all(a.uniform);
    if (a.class_weight) dz *= load_part(a.class_weight + c, left);
    dz -= all(a.mass) * p;
    if (a.label >= c && a.label < c + LANES) dz[a.label - c] += a.sharp;
    dz *= scale;
    if (a.with_entropy) {
      Floats rise = -p * (log_p + all(a.entropy)) * own;
      dz += rise * all(a.entropy_scale);
      if (a.height != 0.0f) rise *= slope_at(z, a.height);
      if (beside) store_gradient(beside, c, rise, left, half);
    }
    if (a.height != 0.0f) dz *= slope_at(z, a.height);
    store_gradient(a.z, c, dz, left, half);
  }
}

}  // namespace OPSD_ISA

const Rows& OPSD_TABLE() {
  using namespace OPSD_ISA;
  static const Rows table = {start,       fold,        close,           sums, kept_gradient,
                             kl_gradient, logprob_gradient, pack};
  return table;
}

}  // namespace opsd
