// Several targets of a token: products with single rows of the head, and the entries of a gradient.
#include <ATen/Parallel.h>

#include "ops.h"

namespace opsd {
namespace {

// Rows of the head by their id, in float32 or bfloat16.
struct HeadRows {
  explicit HeadRows(const Tensor& weight)
      : cols(weight.size(0)), depth(weight.size(1)), bf16(weight.scalar_type() == at::kBFloat16),
        stride(weight.stride(0) * weight.element_size()),
        from(static_cast<const char*>(weight.const_data_ptr())) {
    TORCH_CHECK(weight.stride(1) == 1 && (bf16 || weight.scalar_type() == at::kFloat),
                "targets: expected a row-major head in float32 or bfloat16");
  }
  bool has(int64_t id) const { return 0 <= id && id < cols; }
  const void* row(int64_t id) const { return from + id * stride; }
  int64_t cols, depth;
  bool bf16;
  int64_t stride;
  const char* from;
};

}  // namespace

void target_products(const Tensor& hidden, const Tensor& weight, const Tensor& ids, Tensor& out) {
  const HeadRows head(weight);
  TORCH_CHECK(hidden.stride(1) == 1 && hidden.scalar_type() == weight.scalar_type() &&
                  ids.is_contiguous() && out.is_contiguous(),
              "target_products: strided operands");
  const HeadRows tokens(hidden);
  const int64_t count = ids.size(1);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, ids.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * count; i < end * count; ++i)
      to[i] = head.has(id[i]) ? row_math().dot(tokens.row(i / count), head.row(id[i]), head.depth,
                                               head.bf16)
                              : 0.0f;
  });
}

void target_sums(const Tensor& factors, const Tensor& weight, const Tensor& ids, Tensor& out) {
  const HeadRows head(weight);
  TORCH_CHECK(factors.is_contiguous() && ids.is_contiguous() && out.is_contiguous(),
              "target_sums: strided operands");
  const int64_t count = ids.size(1);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const float* factor = factors.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, ids.size(0), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * count; i < end * count; ++i)
      if (head.has(id[i]) && factor[i] != 0.0f)
        row_math().add_scaled(to + i / count * head.depth, head.row(id[i]), factor[i], head.depth,
                              head.bf16);
  });
}

void store_entries(const Tensor& values, const Tensor& ids, Tensor& dz) {
  TORCH_CHECK(values.is_contiguous() && ids.is_contiguous() && dz.stride(1) == 1,
              "store_entries: strided operands");
  const int64_t rows = ids.size(0), count = ids.size(1), cols = dz.size(1), stride = dz.stride(0);
  const int64_t* id = ids.const_data_ptr<int64_t>();
  const float* from = values.const_data_ptr<float>();
  const auto write = [&](auto* to) {
    at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * count; i < end * count; ++i)
        if (0 <= id[i] && id[i] < cols) to[i / count * stride + id[i]] = from[i];
    });
  };
  if (dz.scalar_type() == at::kBFloat16)
    write(dz.data_ptr<at::BFloat16>());
  else
    write(dz.data_ptr<float>());
}

}  // namespace opsd
