#include "products.h"

#include <ATen/native/CPUBlas.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "ops.h"

namespace opsd {

using at::native::cpublas::brgemm;

namespace {

constexpr int64_t DEPTH_PART = 256;  // of an fp32 product
constexpr int64_t ROW_STEP = 16;  // brgemm compiles code for each height: for at most four

at::ScalarType product_type(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && has_bf16_products() ? at::kBFloat16 : at::kFloat;
}

int64_t words_of(int64_t depth, at::ScalarType type) {
  return type == at::kBFloat16 ? (depth + 1) / 2 : depth;
}

}  // namespace

bool has_bf16_products() {
  static const bool found = [] {
    at::BFloat16 a[16 * 2] = {}, b[2 * 16] = {};
    float c[16 * 16];
    try {
      brgemm(16, 16, 2, 2, 16, 16, false, a, b, c, true);
    } catch (const c10::Error&) {  // how brgemm says that this CPU, or this torch, has none
      return false;
    }
    at::native::cpublas::brgemm_release(true);
    return true;
  }();
  return found;
}

Weight::Weight(const at::Tensor& weight) : weight_(weight), type_(product_type(weight)) {}

int64_t Weight::tile_bytes() const { return 4 * TILE_COLS * words_of(weight_.size(1), type_); }

void Weight::pack(int64_t first, int64_t cols, void* tile) const {
  const int64_t depth = weight_.size(1), words = words_of(depth, type_);
  const int64_t size = c10::elementSize(type_);
  const auto pack_rows = [&](const void* from, int64_t stride) {
    row_math().pack(static_cast<const char*>(from), stride * size, cols, words,
                    depth * size - (words - 1) * 4, static_cast<uint32_t*>(tile));
  };
  if (weight_.stride(1) == 1 && weight_.scalar_type() == type_) {
    const auto* from = static_cast<const char*>(weight_.const_data_ptr());
    pack_rows(from + first * weight_.stride(0) * size, weight_.stride(0));
  } else {
    const at::Tensor w = weight_.narrow(0, first, cols).to(type_).contiguous();
    pack_rows(w.const_data_ptr(), depth);
  }
}

Hidden::Hidden(const at::Tensor& hidden) {
  const at::ScalarType type = product_type(hidden);
  const int64_t rows = hidden.size(0), depth = hidden.size(1);
  const int64_t width = type == at::kBFloat16 ? 2 * words_of(depth, type) : depth;
  padded_ = at::zeros({(rows + ROW_STEP - 1) / ROW_STEP * ROW_STEP, width},
                      hidden.options().dtype(type));
  padded_.narrow(0, 0, rows).narrow(1, 0, depth).copy_(hidden);
}

void Hidden::multiply(int64_t first, const void* tile, float* out) const {
  const int64_t depth = padded_.size(1), left = padded_.size(0) - first;
  const int64_t height = left < TILE_ROWS ? left : TILE_ROWS;
  // One chain of additions over the whole depth errs twice as much as PyTorch's product, which
  // adds up parts. bf16 inputs have rounded far more before.
  const auto times = [&](auto* hidden, auto* weight, bool pairs) {
    const int64_t part = pairs ? depth : DEPTH_PART;
    for (int64_t from = 0; from < depth; from += part)
      brgemm(height, TILE_COLS, std::min(part, depth - from), depth, TILE_COLS, TILE_COLS, from > 0,
             hidden + first * depth + from, weight + from * TILE_COLS, out, pairs);
  };
  if (padded_.scalar_type() == at::kBFloat16)
    times(padded_.const_data_ptr<at::BFloat16>(), static_cast<const at::BFloat16*>(tile), true);
  else
    times(padded_.const_data_ptr<float>(), static_cast<const float*>(tile), false);
}

void Hidden::release() const {
  at::native::cpublas::brgemm_release(padded_.scalar_type() == at::kBFloat16);
}

}  // namespace opsd
