#pragma once

// Sixteen floats at a time, in GCC's and clang's vector types: the compiler makes AVX-512, AVX2,
// NEON or scalar code of the same lines. Included once for each instruction set; whatever is not in
// namespace OPSD_ISA was included before, so that no other file runs its instructions.
#include "rows.h"

#define OPSD_INLINE static inline __attribute__((always_inline))

namespace opsd {
namespace OPSD_ISA {

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint16_t Halves __attribute__((vector_size(32)));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint16_t HalfAnywhere __attribute__((may_alias));
typedef uint32_t WordsAnywhere __attribute__((vector_size(64), aligned(1), may_alias));
typedef float FloatsAnywhere __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(32), aligned(2), may_alias));

constexpr int LANES = 16;

OPSD_INLINE Floats all(float x) {
  return Floats{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x};
}

OPSD_INLINE Floats load(const float* at) { return *reinterpret_cast<const FloatsAnywhere*>(at); }

OPSD_INLINE void store(float* at, Floats x) { *reinterpret_cast<FloatsAnywhere*>(at) = x; }

// The first `count` of sixteen; the other lanes hold `rest`.
OPSD_INLINE Floats load_part(const float* at, int64_t count, float rest) {
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = i < count ? at[i] : rest;
  return load(lanes);
}

OPSD_INLINE Floats load_part(const float* at, int64_t count) {
  return count >= LANES ? load(at) : load_part(at, count, 0.0f);
}

OPSD_INLINE Floats bits_to_floats(Ints x) {
  Floats y;
  memcpy(&y, &x, sizeof y);
  return y;
}

OPSD_INLINE Ints floats_to_bits(Floats x) {
  Ints y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// Where NaN is compared the second is taken, as the ternary operator does.
OPSD_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }
OPSD_INLINE Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

OPSD_INLINE float sum(Floats x) {
  float lanes[LANES];
  store(lanes, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// The largest lane; NaN if one of them is.
OPSD_INLINE float maximum(Floats x) {
  float lanes[LANES];
  store(lanes, x);
  float top = lanes[0];
  for (int i = 1; i < LANES; ++i) top = (lanes[i] > top || lanes[i] != lanes[i]) ? lanes[i] : top;
  return top;
}

OPSD_INLINE bool every(Ints mask) {
  int64_t words[8], found = -1;
  memcpy(words, &mask, sizeof words);
  for (int64_t word : words) found &= word;
  return found == -1;
}

OPSD_INLINE bool any(Ints mask) {
  int64_t words[8], found = 0;
  memcpy(words, &mask, sizeof words);
  for (int64_t word : words) found |= word;
  return found != 0;
}

// exp(x) within 1.5 ulp for x <= 88, 0 below the smallest normal number. NaN stays NaN.
OPSD_INLINE Floats exp(Floats x) {
  const Floats magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats inside = x < all(-87.33f) ? all(-87.33f) : x;
  inside = inside > all(88.3f) ? all(88.3f) : inside;
  Floats n = inside * all(1.44269504f) + magic;
  const Ints power = floats_to_bits(n) - floats_to_bits(magic);
  n = n - magic;
  Floats r = inside - n * all(0.693145752f);
  r = r - n * all(1.42860677e-6f);
  Floats y = all(1.9875691500e-4f);  // Cephes' expf
  y = y * r + all(1.3981999507e-3f);
  y = y * r + all(8.3334519073e-3f);
  y = y * r + all(4.1665795894e-2f);
  y = y * r + all(1.6666665459e-1f);
  y = y * r + all(5.0000001201e-1f);
  y = y * (r * r) + r + all(1.0f);
  y = y * bits_to_floats((power + 127) << 23);
  return x < all(-87.33f) ? all(0.0f) : y;
}

// log(x) within 2 ulp for normal positive numbers.
OPSD_INLINE Floats log(Floats x) {
  const Ints half = floats_to_bits(all(0.70710678f));
  const Ints bits = floats_to_bits(x) - half;
  const Ints power = bits >> 23;
  const Floats m = bits_to_floats((bits & 0x007fffff) + half) - all(1.0f);
  const Floats e = __builtin_convertvector(power, Floats);
  Floats y = all(7.0376836292e-2f);  // Cephes' logf
  y = y * m - all(1.1514610310e-1f);
  y = y * m + all(1.1676998740e-1f);
  y = y * m - all(1.2420140846e-1f);
  y = y * m + all(1.4249322787e-1f);
  y = y * m - all(1.6668057665e-1f);
  y = y * m + all(2.0000714765e-1f);
  y = y * m - all(2.4999993993e-1f);
  y = y * m + all(3.3333331174e-1f);
  const Floats mm = m * m;
  y = y * m * mm + e * all(-2.12194440e-4f) - all(0.5f) * mm;
  return m + y + e * all(0.693359375f);
}

// Rounds to nearest, ties to even; NaN stays NaN.
OPSD_INLINE void store_part(HalfAnywhere* at, Floats x, int64_t count) {
  const Ints bits = floats_to_bits(x);
  Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  rounded = x == x ? rounded : Ints{} + 0x7fc0;
  const Halves y = __builtin_convertvector(rounded, Halves);
  if (count >= LANES) {
    *reinterpret_cast<HalvesAnywhere*>(at) = y;
  } else {
    for (int64_t i = 0; i < count; ++i) at[i] = y[i];
  }
}

OPSD_INLINE void store_part(float* at, Floats x, int64_t count) {
  if (count >= LANES) {
    store(at, x);
  } else {
    for (int64_t i = 0; i < count; ++i) at[i] = x[i];
  }
}

}  // namespace OPSD_ISA
}  // namespace opsd
