// The operators, as registration.cpp names them and cpp_backend.py calls them. All tensors are on
// the CPU, statistics and logits float32. rows is N, cols is V, K the number of statistics.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "rows.h"

namespace opsd {

using at::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The row arithmetic of the instruction set that torch chose for its own (ATEN_CPU_CAPABILITY).
const Rows& rows();

// Tiles of logits of one head (rows, D) x (cols, D), or of two, folded into statistics (K, rows);
// one weight where both heads share it. label (rows,) int64 counts from the whole vocabulary's
// first entry, `offset` entries before this shard's; softcap 0 is none.
// class_weight (cols,) float32 weighs the columns of the smoothed sums; `predicted` keeps the first
// column of the maximum, counted from this shard's first.
// `logits` (heads, rows, cols) receives the finished logits, unless it is empty.
void statistics(const std::vector<Tensor>& hidden, const std::vector<Tensor>& weight,
                const std::vector<MaybeTensor>& bias, const std::vector<double>& softcap,
                const std::vector<double>& temperature, const MaybeTensor& label, int64_t offset,
                bool entropy, bool smoothed, bool predicted, const MaybeTensor& class_weight,
                int64_t kind, Tensor& logits, Tensor& out);

// Statistics (K, count, rows) of `count` spans of the vocabulary, in order, into (K, rows).
void merge(const Tensor& parts, int64_t heads, bool entropy, bool smoothed, bool label,
           bool predicted, int64_t kind, Tensor& out);

// (2 or 3, rows): value, sum of shares and, with a clip, the value without it. With `keep` the
// logits become what divergence_gradient needs.
Tensor divergence_sums(Tensor& logits, const Tensor& merged, int64_t step, double softcap,
                       double temperature, double beta, std::optional<double> clip, int64_t kind,
                       bool keep);

// d loss / d raw logits of the student over logits[0], as bfloat16 (`half`) or float32.
void divergence_gradient(Tensor& logits, const Tensor& merged, int64_t step, const Tensor& totals,
                         const MaybeTensor& scale, double softcap, double temperature, double beta,
                         int64_t kind, bool kept, bool half);

// The same of a smoothed log-probability: (sharp at the label) + uniform class_weight - mass p, with
// `rates` (2, rows) the rows' sharp and mass; the entropy's is added where its scale is known, or
// written to out_entropy (rows, cols).
void logprob_gradient(Tensor& logits, const Tensor& merged, const Tensor& label, int64_t offset,
                      const MaybeTensor& entropy, const MaybeTensor& scale,
                      const MaybeTensor& entropy_scale, const Tensor& rates, double uniform,
                      const MaybeTensor& class_weight, double softcap, double temperature,
                      bool half, std::optional<Tensor> out_entropy);

}  // namespace opsd
