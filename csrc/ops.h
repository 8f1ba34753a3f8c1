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

// The row arithmetic for the instruction set that torch itself uses (ATEN_CPU_CAPABILITY).
const RowMath& row_math();

// An uninitialized tensor in huge pages where the system has them. A `workspace` is kept, when it is
// freed, for the next call; the system may take its pages back.
Tensor large_empty(at::IntArrayRef shape, at::ScalarType dtype, bool workspace);

// Multiplies one or two heads' logits tile by tile, hidden (rows, D) by weight (cols, D), and folds
// them into statistics `out` (K, rows); one weight where both heads share it. label (rows,) int64
// is an index into the whole vocabulary, of which this shard starts at `offset`; softcap 0 is none.
// class_weight (cols,) float32 weighs the columns of the smoothed sums; `predicted` keeps the first
// column of the maximum, counted from this shard's first.
// `logits` (heads, rows, cols) receives the logits, unless it is empty. top_logit and top_column
// (rows, k) receive each row's k largest logits, and their columns in this shard, the largest first
// and the lower column first where two are equal: of one head. So does target_logit (rows, K) with
// the logits at target_column (rows, K), 0 where this shard has no such column.
void statistics(const std::vector<Tensor>& hidden, const std::vector<Tensor>& weight,
                const std::vector<MaybeTensor>& bias, const std::vector<double>& softcap,
                const std::vector<double>& temperature, const MaybeTensor& label, int64_t offset,
                bool entropy, bool smoothed, bool predicted, const MaybeTensor& class_weight,
                int64_t kind, Tensor& logits, Tensor& out, const MaybeTensor& top_logit,
                const MaybeTensor& top_column, const MaybeTensor& target_column,
                const MaybeTensor& target_logit);

// Merges statistics (K, count, rows) of `count` spans of the vocabulary, in order, into (K, rows).
void merge(const Tensor& parts, int64_t heads, bool entropy, bool smoothed, bool label,
           bool predicted, int64_t kind, Tensor& out);

// (2 or 3, rows): value, sum of shares and, with a clip, the unclipped value. With `keep` the
// logits are overwritten by what divergence_gradient needs.
Tensor divergence_sums(Tensor& logits, const Tensor& merged, int64_t per_head, double softcap,
                       double temperature, double beta, std::optional<double> clip, int64_t kind,
                       bool keep);

// Both at once, where no other rank's sums are needed: each row's gradient is made while its logits
// are in cache. Returns the sums.
Tensor divergence_sums_and_gradient(Tensor& logits, const Tensor& merged, int64_t per_head,
                                    const MaybeTensor& scale, double softcap, double temperature,
                                    double beta, std::optional<double> clip, int64_t kind,
                                    bool bf16);

// Writes d loss / d raw logits of the student over logits[0], as bfloat16 (`bf16`) or float32.
// `kept`: divergence_sums ran with `keep`. sum_share (rows,): the sum of shares, or the value of a KL
// without a clip.
void divergence_gradient(Tensor& logits, const Tensor& merged, int64_t per_head,
                         const Tensor& sum_share, const MaybeTensor& scale, double softcap,
                         double temperature, double beta, int64_t kind, bool kept, bool bf16);

// The same for a log-probability: dz = sharp [at the label] + uniform class_weight -
// mass p, with sharp and mass from `rates` (2, rows). The entropy's gradient is added
// where entropy_scale is given, or else written to out_entropy (rows, cols).
void logprob_gradient(Tensor& logits, const Tensor& merged, const Tensor& label, int64_t offset,
                      const MaybeTensor& entropy, const MaybeTensor& scale,
                      const MaybeTensor& entropy_scale, const Tensor& rates, double uniform,
                      const MaybeTensor& class_weight, double softcap, double temperature,
                      bool bf16, std::optional<Tensor> out_entropy);

// dz (rows, cols) transposed times hidden (rows, depth), both bfloat16: to `out` (cols, depth)
// bfloat16, or where there is none to `sum` (cols, depth) float32. With `add` it is added to `sum`.
void weight_gradient(const Tensor& dz, const Tensor& hidden, const MaybeTensor& sum, bool add,
                     const MaybeTensor& out);

// out (rows, D) float32 += sum over k of factors[row, k] weight[ids[row, k]], of weight (cols, D).
// Ids outside [0, cols) add nothing.
void target_sums(const Tensor& factors, const Tensor& weight, const Tensor& ids, Tensor& out);

// dz (rows, cols), float32 or bfloat16: dz[row, ids[row, k]] = values[row, k].
void store_entries(const Tensor& values, const Tensor& ids, Tensor& dz);

}  // namespace opsd
