// Products with single rows of the head, compiled once for each instruction set.
#include "vec.h"

namespace opsd {
namespace OPSD_ISA {

OPSD_INLINE Floats load_as_floats(const float* at) { return load(at); }
OPSD_INLINE Floats load_as_floats(const HalfAnywhere* at) {
  const Words x = load_halves(reinterpret_cast<const uint16_t*>(at)) << 16;
  Floats y;
  memcpy(&y, &x, sizeof y);
  return y;
}

OPSD_INLINE float as_float(float x) { return x; }
OPSD_INLINE float as_float(HalfAnywhere x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  memcpy(&y, &bits, sizeof y);
  return y;
}

template <class T>
static float dot_of(const T* a, const T* b, int64_t n) {
  Floats sums[4] = {};  // so many additions may wait for each other
  int64_t i = 0;
  for (; i + 4 * LANES <= n; i += 4 * LANES)
    for (int v = 0; v < 4; ++v)
      sums[v] += load_as_floats(a + i + v * LANES) * load_as_floats(b + i + v * LANES);
  for (; i + LANES <= n; i += LANES) sums[0] += load_as_floats(a + i) * load_as_floats(b + i);
  float left = 0.0f;
  for (; i < n; ++i) left += as_float(a[i]) * as_float(b[i]);
  return sum((sums[0] + sums[1]) + (sums[2] + sums[3])) + left;
}

static float dot(const void* a, const void* b, int64_t n, bool bf16) {
  if (bf16)
    return dot_of(static_cast<const HalfAnywhere*>(a), static_cast<const HalfAnywhere*>(b), n);
  return dot_of(static_cast<const float*>(a), static_cast<const float*>(b), n);
}

template <class T>
static void add_scaled_of(float* to, const T* x, float scale, int64_t n) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES)
    store(to + i, load(to + i) + splat(scale) * load_as_floats(x + i));
  for (; i < n; ++i) to[i] += scale * as_float(x[i]);
}

static void add_scaled(float* to, const void* x, float scale, int64_t n, bool bf16) {
  if (bf16)
    add_scaled_of(to, static_cast<const HalfAnywhere*>(x), scale, n);
  else
    add_scaled_of(to, static_cast<const float*>(x), scale, n);
}

}  // namespace OPSD_ISA
}  // namespace opsd
