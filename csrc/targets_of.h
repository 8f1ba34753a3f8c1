// Sums of single rows of the head, compiled once for each instruction set.
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
