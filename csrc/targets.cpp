// Several targets of a token: their logits, sums of rows of the head, and entries of a gradient.
#include "targets.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <numeric>

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

TargetColumns::TargetColumns(const MaybeTensor& column, const MaybeTensor& logit, int64_t cols) {
  if (!column) return;
  TORCH_CHECK(logit && column->is_contiguous() && logit->is_contiguous() &&
                  column->sizes() == logit->sizes(),
              "statistics: target_logit does not fit target_column");
  const int64_t* at = column->const_data_ptr<int64_t>();
  const int64_t count = column->numel(), width = column->size(1);
  out_ = logit->data_ptr<float>();
  std::fill_n(out_, count, 0.0f);
  const auto has = [cols](int64_t c) { return 0 <= c && c < cols; };
  first_.resize((cols + TILE_COLS - 1) / TILE_COLS + 1);
  for (int64_t i = 0; i < count; ++i)
    if (has(at[i])) ++first_[at[i] / TILE_COLS + 1];
  std::partial_sum(first_.begin(), first_.end(), first_.begin());
  targets_.resize(first_.back());
  std::vector<int64_t> next(first_.begin(), first_.end() - 1);
  for (int64_t i = 0; i < count; ++i)
    if (has(at[i]))
      targets_[next[at[i] / TILE_COLS]++] = {i, static_cast<int32_t>(i / width),
                                             static_cast<int32_t>(at[i] % TILE_COLS)};
}

void TargetColumns::read(const Fold& fold, int64_t row, int64_t& next) const {
  const int64_t end = first_[fold.column / TILE_COLS + 1];
  for (; next < end && targets_[next].row < row + fold.rows; ++next) {
    const Target& x = targets_[next];
    out_[x.to] = fold.raw[0][(x.row - row) * TILE_COLS + x.column];
  }
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
