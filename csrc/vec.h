#pragma once

// One vector register of floats at a time, in GCC's and clang's vector types: the compiler makes
// AVX-512, AVX2, NEON or SSE code from the same lines. Included once for each instruction set, in a
// namespace OPSD_ISA; the headers it needs are included outside, so they are not compiled for it.
// (Wider types than a register work, but GCC makes their comparisons one number at a time.)
#include "rows.h"

#define OPSD_INLINE static inline __attribute__((always_inline))

namespace opsd {
namespace OPSD_ISA {

constexpr int LANES = OPSD_LANES;

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES)));
typedef uint16_t HalfAnywhere __attribute__((may_alias));
typedef uint32_t WordsAnywhere __attribute__((vector_size(4 * LANES), aligned(1), may_alias));
typedef int32_t IntsAnywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef float FloatsAnywhere __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint16_t HalvesAnywhere __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

OPSD_INLINE Ints lane_numbers() {
  Ints x = {};
  for (int i = 0; i < LANES; ++i) x[i] = i;
  return x;
}

OPSD_INLINE Floats splat(float x) { return x - Floats{}; }

OPSD_INLINE Floats load(const float* at) { return *reinterpret_cast<const FloatsAnywhere*>(at); }

OPSD_INLINE Ints load(const int32_t* at) { return *reinterpret_cast<const IntsAnywhere*>(at); }

OPSD_INLINE void store(float* at, Floats x) { *reinterpret_cast<FloatsAnywhere*>(at) = x; }

// Stores past the cache what is read much later: 4 times as fast as a store that reads the line
// first. `at` is a multiple of 64 bytes. `finish_streams` orders it before what follows. (GCC reads
// macros before `#pragma GCC target`, so __AVX2__ and the like are not defined here.)
#if OPSD_STREAMS && OPSD_LANES == 16
OPSD_INLINE void stream(float* at, Floats x) { __builtin_ia32_movntps512(at, x); }
static void finish_streams() { __builtin_ia32_sfence(); }
#elif OPSD_STREAMS && OPSD_LANES == 8
OPSD_INLINE void stream(float* at, Floats x) { __builtin_ia32_movntps256(at, x); }
static void finish_streams() { __builtin_ia32_sfence(); }
#else
OPSD_INLINE void stream(float* at, Floats x) { store(at, x); }
static void finish_streams() {}
#endif

OPSD_INLINE Words load_halves(const uint16_t* at) {
  Halves x;
  memcpy(&x, at, sizeof x);
  return __builtin_convertvector(x, Words);
}

// The first `count` lanes; the others are `fill`.
OPSD_INLINE Floats load_part(const float* at, int64_t count, float fill) {
  float lanes[LANES];
  for (int i = 0; i < LANES; ++i) lanes[i] = i < count ? at[i] : fill;
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

// If either is NaN the second is returned, as by the ternary operator.
OPSD_INLINE Floats larger(Floats a, Floats b) { return a > b ? a : b; }

// Sum or maximum of the lanes, by halves.
template <class Op>
OPSD_INLINE float reduced(Floats x, const Op& op) {
  float lanes[LANES];
  store(lanes, x);
  for (int width = LANES / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] = op(lanes[i], lanes[i + width]);
  return lanes[0];
}

OPSD_INLINE float sum(Floats x) {
  return reduced(x, [](float a, float b) { return a + b; });
}

OPSD_INLINE float maximum(Floats x) {
  return reduced(x, [](float a, float b) { return a > b ? a : b; });
}

OPSD_INLINE bool any(Ints mask) {
  int64_t words[LANES / 2], found = 0;
  memcpy(words, &mask, sizeof words);
  for (int64_t word : words) found |= word;
  return found != 0;
}

// Bit i is set where lane i of a comparison holds.
OPSD_INLINE uint32_t bits_of(Ints mask) {
#if OPSD_STREAMS && OPSD_LANES == 16
  return static_cast<uint16_t>(__builtin_ia32_cvtd2mask512(mask));
#elif OPSD_STREAMS && OPSD_LANES == 8
  return __builtin_ia32_movmskps256(bits_to_floats(mask));
#else
  uint32_t bits = 0;
  for (int i = 0; i < LANES; ++i) bits |= static_cast<uint32_t>(mask[i] & 1) << i;
  return bits;
#endif
}

// Bit i is set where lane i of x is more than that of y, or either is NaN.
OPSD_INLINE uint32_t bits_not_less_or_equal(Floats x, Floats y) {
#if OPSD_STREAMS && OPSD_LANES == 16
  return static_cast<uint16_t>(__builtin_ia32_cmpps512_mask(x, y, 6, -1, 4));
#else
  return bits_of(~(x <= y));
#endif
}

// Stores the lanes whose bit is set one after the other; a whole vector is written.
OPSD_INLINE void store_chosen(int32_t* at, Ints x, uint32_t bits) {
#if OPSD_STREAMS && OPSD_LANES == 16
  *reinterpret_cast<IntsAnywhere*>(at) = __builtin_ia32_compresssi512_mask(x, x, bits);
#else
  for (; bits; bits &= bits - 1) *at++ = x[__builtin_ctz(bits)];
#endif
}

// x = n log 2 + r with |r| <= log(2) / 2, for x from -88.3 to 88.
struct Reduced {
  Floats r;
  Floats power;  // 2^n, 0 for n = -127
};

OPSD_INLINE Reduced reduce(Floats x) {
  const Floats magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Floats n = x * splat(1.44269504f) + magic;
  const Ints power = floats_to_bits(n) - floats_to_bits(magic);
  n = n - magic;
  const Floats r = x - n * splat(0.693145752f);
  return {r - n * splat(1.42860677e-6f), bits_to_floats((power + 127) << 23)};
}

// (exp(r) - 1 - r) / r^2: Cephes' expf, in pairs of terms, so that fewer operations wait in line.
OPSD_INLINE Floats exp_tail(Floats r) {
  const Floats rr = r * r;
  const Floats high = splat(1.9875691500e-4f) * r + splat(1.3981999507e-3f);
  const Floats middle = splat(8.3334519073e-3f) * r + splat(4.1665795894e-2f);
  const Floats low = splat(1.6666665459e-1f) * r + splat(5.0000001201e-1f);
  return (high * rr + middle) * rr + low;
}

// exp(x) within 1.5 ulp for x <= 88, 0 below the smallest normal number. NaN stays NaN.
OPSD_INLINE Floats exp(Floats x) {
  const Reduced a = reduce(larger(splat(-88.3f), x));  // where 2^n is 0
  return (exp_tail(a.r) * (a.r * a.r) + a.r + splat(1.0f)) * a.power;
}

// exp(x) - 1 within 2 ulp for x from -88 to 88.
OPSD_INLINE Floats expm1(Floats x) {
  const Reduced a = reduce(x);
  return (exp_tail(a.r) * (a.r * a.r) + a.r) * a.power + (a.power - splat(1.0f));
}

// log(1 + x) within 3 ulp for 1 + x normal and positive.
OPSD_INLINE Floats log1p(Floats x) {
  const Floats u = splat(1.0f) + x;
  const Ints sqrt_half = floats_to_bits(splat(0.70710678f));
  const Ints bits = floats_to_bits(u) - sqrt_half;
  const Ints power = bits >> 23;
  // Where the power is 0, m is x, which has lost no digits to 1 + x.
  Floats m = bits_to_floats((bits & 0x007fffff) + sqrt_half) - splat(1.0f);
  m = power == Ints{} ? x : m;
  const Floats e = __builtin_convertvector(power, Floats);
  // Cephes' logf, in pairs of terms.
  const Floats mm = m * m;
  const Floats a = splat(-2.4999993993e-1f) * m + splat(3.3333331174e-1f);
  const Floats b = splat(-1.6668057665e-1f) * m + splat(2.0000714765e-1f);
  const Floats c = splat(-1.2420140846e-1f) * m + splat(1.4249322787e-1f);
  const Floats d = splat(-1.1514610310e-1f) * m + splat(1.1676998740e-1f);
  Floats y = (splat(7.0376836292e-2f) * mm + d) * mm + c;
  y = y * (mm * mm) + (b * mm + a);
  y = y * m * mm + e * splat(-2.12194440e-4f) - splat(0.5f) * mm;
  return m + y + e * splat(0.693359375f);
}

// bfloat16 in the lower half of each word, rounded to nearest, ties to even; NaN stays NaN.
OPSD_INLINE Ints rounded_to_halves(Floats x) {
  const Ints bits = floats_to_bits(x);
  const Ints rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return x == x ? rounded : Ints{} + 0x7fc0;
}

OPSD_INLINE Halves to_halves(Floats x) {
  return __builtin_convertvector(rounded_to_halves(x), Halves);
}

// `to_halves` of a, then of b.
OPSD_INLINE Ints halves_in_words(Floats a, Floats b) {
  const Ints low = rounded_to_halves(a), high = rounded_to_halves(b);
  Ints both;
#if defined(__GNUC__) && !defined(__clang__)
  // In registers: two stores cannot be forwarded to one load.
  typedef uint16_t AllHalves __attribute__((vector_size(4 * LANES)));
  AllHalves x, y, even;
  memcpy(&x, &low, sizeof x);
  memcpy(&y, &high, sizeof y);
  for (int i = 0; i < 2 * LANES; ++i) even[i] = 2 * i;
  x = __builtin_shuffle(x, y, even);
  memcpy(&both, &x, sizeof both);
#else
  const Halves parts[2] = {__builtin_convertvector(low, Halves),
                           __builtin_convertvector(high, Halves)};
  memcpy(&both, parts, sizeof both);
#endif
  return both;
}

OPSD_INLINE void store_part(HalfAnywhere* at, Floats x, int64_t count) {
  const Halves y = to_halves(x);
  if (count >= LANES) {
    *reinterpret_cast<HalvesAnywhere*>(at) = y;
  } else {
    for (int64_t i = 0; i < count; ++i) at[i] = y[i];
  }
}

// `stream` of two vectors' numbers.
OPSD_INLINE void stream(HalfAnywhere* at, Floats a, Floats b) {
  stream(reinterpret_cast<float*>(at), bits_to_floats(halves_in_words(a, b)));
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
