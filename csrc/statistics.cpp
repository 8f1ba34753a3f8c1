// The first pass: chunks of the vocabulary in parallel, each multiplied and folded into statistics
// tile by tile.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <mutex>

#include "largest.h"
#include "ops.h"
#include "products.h"
#include "targets.h"

namespace opsd {
namespace {

// Chunks do not depend on the number of threads and are merged in order, so neither do the bits.
constexpr int64_t CHUNK_COLS = 1024;

struct Pass {
  Layout layout;
  LogitTransform transform[2];
  std::vector<Hidden> hidden;
  std::vector<Weight> weight;  // one where both heads share it
  float* z[2];                 // (rows, cols) or null
  const int64_t* label;
  const float* class_weight;
  int64_t rows, cols, chunks;
  int64_t count;  // largest logits to choose of each row
  const TargetColumns* targets;
  float* parts;   // (K, chunks, rows)
};

// Buffers of one thread.
struct ThreadBuffers {
  ThreadBuffers(const Pass& pass, int64_t chunks) : state(pass.rows) {
    if (pass.count) largest = Largest(pass.rows, pass.count, chunks * CHUNK_COLS);
    for (const Weight& weight : pass.weight)
      packed.push_back(at::empty({weight.tile_bytes()}, at::kByte));
    logits = at::empty({2, TILE_ROWS, TILE_COLS}, at::kFloat);
    raw[0] = logits.data_ptr<float>();
    raw[1] = raw[0] + TILE_ROWS * TILE_COLS;
  }
  std::vector<RowState> state;
  std::vector<Tensor> packed;
  Tensor logits;
  float* raw[2];
  Largest largest;
};

void fold_chunk(const Pass& pass, int64_t chunk, ThreadBuffers& buffers) {
  const RowMath& math = row_math();
  const int64_t begin = chunk * CHUNK_COLS, end = std::min(begin + CHUNK_COLS, pass.cols);
  math.reset(buffers.state.data(), pass.rows);
  for (int64_t col = begin; col < end; col += TILE_COLS) {
    const int64_t cols = std::min(TILE_COLS, end - col);
    for (size_t i = 0; i < pass.weight.size(); ++i)
      pass.weight[i].pack(col, cols, buffers.packed[i].data_ptr());
    int64_t target = pass.targets->begin(col);
    for (int64_t row = 0; row < pass.rows; row += TILE_ROWS) {
      Fold fold{};
      fold.layout = pass.layout;
      fold.rows = std::min(TILE_ROWS, pass.rows - row);
      fold.column = col, fold.cols = cols, fold.z_stride = pass.cols;
      fold.label = pass.label ? pass.label + row : nullptr;
      fold.class_weight = pass.class_weight;
      fold.state = buffers.state.data() + row;
      if (pass.count) buffers.largest.attach(fold, row);
      for (int64_t i = 0; i < pass.layout.heads; ++i) {
        fold.transform[i] = pass.transform[i];
        fold.raw[i] = buffers.raw[i];
        fold.z[i] = pass.z[i] ? pass.z[i] + row * pass.cols : nullptr;
        const Tensor& tile = buffers.packed[std::min<size_t>(i, pass.weight.size() - 1)];
        pass.hidden[i].multiply(row, tile.const_data_ptr(), fold.raw[i]);
      }
      math.fold(fold);
      if (!pass.targets->empty()) pass.targets->read(fold, row, target);
    }
  }
  math.store_statistics(buffers.state.data(), pass.rows, pass.layout,
                        pass.parts + chunk * pass.rows, pass.chunks * pass.rows);
}

// sum p (u - v) rescaled to new maxima; where p becomes 0 the result is 0, not 0 * inf.
double rescaled(float sum, float shift, float weight, float other) {
  const float shrink = expf(shift);
  return shrink > 0.0f ? (sum + (shift - other) * static_cast<double>(weight)) * shrink : 0.0;
}

// Merges the statistics of one row's spans; at(k, i) is statistic k of span i.
template <class At, class Put>
void merge_row(const Layout& layout, int64_t count, const At& at, const Put& put) {
  float row_max[2];
  for (int64_t head = 0; head < layout.heads; ++head) {
    int64_t k = head * layout.per_head();
    row_max[head] = LOG_ZERO;
    for (int64_t i = 0; i < count; ++i) row_max[head] = std::max(at(k, i), row_max[head]);
    double sum_exp = 0, sum_exp_logit = 0, sum_logit = 0, sum_weight = 0, label_logit = 0;
    float argmax = INFINITY;
    for (int64_t i = 0; i < count; ++i) {
      const float shift = at(k, i) - row_max[head], weight = at(k + 1, i);
      int64_t next = k + 2;
      sum_exp += static_cast<double>(weight) * expf(shift);
      if (layout.entropy) sum_exp_logit += rescaled(at(next++, i), shift, weight, 0.0f);
      if (layout.smoothed) {
        sum_logit += at(next, i) + static_cast<double>(shift) * at(next + 1, i);
        sum_weight += at(next + 1, i);
        next += 2;
      }
      if (layout.label) label_logit += at(next++, i);
      if (layout.predicted && shift == 0.0f) argmax = std::min(at(next, i), argmax);
    }
    put(k++, row_max[head]);
    put(k++, sum_exp);
    if (layout.entropy) put(k++, sum_exp_logit);
    if (layout.smoothed) {
      put(k++, sum_logit);
      put(k++, sum_weight);
    }
    if (layout.label) put(k++, label_logit);
    if (layout.predicted) put(k++, argmax);
  }
  if (!layout.has_cross()) return;
  const int64_t k = 2 * layout.per_head(), per_head = layout.per_head();
  const int64_t p = layout.kind == FORWARD_KL ? 1 : 0, q = 1 - p;  // the KL of p from q
  double cross = 0;
  float infinite = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float shift_p = at(p * per_head, i) - row_max[p];
    const float shift_q = at(q * per_head, i) - row_max[q];
    cross += rescaled(at(k, i), shift_p, at(p * per_head + 1, i), shift_q);
    infinite = std::max(at(k + 1, i), infinite);
  }
  put(k, cross);
  put(k + 1, infinite);
}

void merge_into(const Tensor& parts, const Layout& layout, Tensor& out) {
  const int64_t count = parts.size(1), rows = parts.size(2), stride = out.stride(0);
  const float* from = parts.const_data_ptr<float>();
  float* to = out.data_ptr<float>();
  at::parallel_for(0, rows, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      merge_row(
          layout, count,
          [&](int64_t k, int64_t i) { return from[(k * count + i) * rows + row]; },
          [&](int64_t k, double x) { to[k * stride + row] = static_cast<float>(x); });
  });
}

}  // namespace

void statistics(const std::vector<Tensor>& hidden, const std::vector<Tensor>& weight,
                const std::vector<MaybeTensor>& bias, const std::vector<double>& softcap,
                const std::vector<double>& temperature, const MaybeTensor& label, int64_t offset,
                bool entropy, bool smoothed, bool predicted, const MaybeTensor& class_weight,
                int64_t kind, Tensor& logits, Tensor& out, const MaybeTensor& top_logit,
                const MaybeTensor& top_column, const MaybeTensor& target_column,
                const MaybeTensor& target_logit) {
  Pass pass{};
  const int64_t heads = hidden.size();
  pass.layout = {heads, entropy, smoothed, label.has_value(), predicted, kind};
  pass.rows = hidden[0].size(0), pass.cols = weight[0].size(0);
  TORCH_CHECK(out.size(0) == pass.layout.count() && out.size(1) == pass.rows && out.stride(1) == 1,
              "statistics: out does not fit the layout");
  pass.count = top_logit ? top_logit->size(1) : 0;
  TORCH_CHECK(!pass.count || (heads == 1 && pass.count <= pass.cols && top_column &&
                              top_logit->is_contiguous() && top_column->is_contiguous() &&
                              top_logit->size(0) == pass.rows &&
                              top_column->sizes() == top_logit->sizes()),
              "statistics: top_logit and top_column do not fit the logits");
  std::vector<Tensor> kept;  // what the pointers below point into
  for (int64_t i = 0; i < heads; ++i) {
    pass.hidden.emplace_back(hidden[i]);
    if (bias[i]) kept.push_back(bias[i]->to(at::kFloat).contiguous());
    pass.transform[i] = {bias[i] ? kept.back().const_data_ptr<float>() : nullptr,
                      static_cast<float>(softcap[i]), static_cast<float>(temperature[i])};
    pass.z[i] = logits.numel() ? logits[i].data_ptr<float>() : nullptr;
  }
  for (const Tensor& w : weight) pass.weight.emplace_back(w);
  if (label) {
    kept.push_back(label->sub(offset).contiguous());
    pass.label = kept.back().const_data_ptr<int64_t>();
  }
  pass.class_weight = class_weight ? class_weight->const_data_ptr<float>() : nullptr;
  TORCH_CHECK(!target_column || (heads == 1 && target_column->size(0) == pass.rows),
              "statistics: target_column does not fit the logits");
  const TargetColumns targets(target_column, target_logit, pass.cols);
  pass.targets = &targets;
  pass.chunks = (pass.cols + CHUNK_COLS - 1) / CHUNK_COLS;
  const Tensor parts = at::empty({pass.layout.count(), pass.chunks, pass.rows}, at::kFloat);
  pass.parts = parts.data_ptr<float>();
  std::vector<Largest> largest;
  std::mutex mutex;
  at::parallel_for(0, pass.chunks, 1, [&](int64_t begin, int64_t end) {
    ThreadBuffers buffers(pass, end - begin);
    for (int64_t chunk = begin; chunk < end; ++chunk) fold_chunk(pass, chunk, buffers);
    for (const Hidden& h : pass.hidden) h.release();
    const std::lock_guard<std::mutex> lock(mutex);
    largest.push_back(std::move(buffers.largest));
  });
  if (pass.count) store_largest(largest, *top_logit, *top_column);
  merge_into(parts, pass.layout, out);
}

void merge(const Tensor& parts, int64_t heads, bool entropy, bool smoothed, bool label,
           bool predicted, int64_t kind, Tensor& out) {
  merge_into(parts.contiguous(), {heads, entropy, smoothed, label, predicted, kind}, out);
}

}  // namespace opsd
