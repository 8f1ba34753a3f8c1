// The second pass of a pair of heads: sums of the divergence, and the gradient of the logits.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "ops.h"

namespace opsd {
namespace {

// What is known of each row. merged (K, rows): row_max and sum_exp of the student, `per_head` rows
// further those of the teacher.
class PairRows {
 public:
  PairRows(Tensor& logits, const Tensor& merged, int64_t per_head, double softcap,
           double temperature, double beta, std::optional<double> clip, int64_t kind)
      : z_(logits.data_ptr<float>()), rows_(logits.size(1)), cols_(logits.size(2)),
        at_(merged.const_data_ptr<float>()), stride_(merged.stride(0)), per_head_(per_head) {
    TORCH_CHECK(logits.is_contiguous() && merged.stride(1) == 1, "divergence: strided operands");
    row_.cols = cols_, row_.kind = kind;
    row_.beta = static_cast<float>(beta), row_.one_minus_beta = static_cast<float>(1.0 - beta);
    row_.inv_cap = softcap == 0.0 ? 0.0f : static_cast<float>(temperature / softcap);
    row_.clipped = clip.has_value(), row_.clip = static_cast<float>(clip.value_or(0.0));
  }

  PairRow operator[](int64_t row) const {
    PairRow x = row_;
    x.z_s = z_ + row * cols_;
    x.z_t = x.z_s + rows_ * cols_;
    const float* s = at_ + row;
    const float* t = s + per_head_ * stride_;
    x.row_max_s = s[0], x.log_sum_s = logf(s[stride_]);
    x.row_max_t = t[0], x.log_sum_t = logf(t[stride_]);
    return x;
  }

 private:
  float* z_;
  int64_t rows_, cols_;
  const float* at_;
  int64_t stride_, per_head_;
  PairRow row_{};
};

// (2 or 3, rows) of sums(row, i).
template <class RowSums>
Tensor sums_of_rows(const Tensor& logits, bool clipped, const RowSums& sums_of) {
  const int64_t rows = logits.size(1);
  const Tensor out = at::empty({clipped ? 3 : 2, rows}, logits.options());
  float* to = out.data_ptr<float>();
  at::parallel_for(0, rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const Sums sums = sums_of(row);
      to[row] = sums.value;
      to[rows + row] = sums.shares;
      if (clipped) to[2 * rows + row] = sums.unclipped;
    }
  });
  return out;
}

// d loss / d value of each row over the temperature.
class Factors {
 public:
  Factors(const MaybeTensor& scale, double temperature)
      : scale_(scale ? scale->to(at::kFloat).contiguous() : Tensor()),
        at_(scale ? scale_.const_data_ptr<float>() : nullptr),
        temperature_(static_cast<float>(temperature)) {}
  float operator[](int64_t row) const { return (at_ ? at_[row] : 1.0f) / temperature_; }

 private:
  Tensor scale_;
  const float* at_;
  float temperature_;
};

}  // namespace

Tensor divergence_sums(Tensor& logits, const Tensor& merged, int64_t per_head, double softcap,
                       double temperature, double beta, std::optional<double> clip, int64_t kind,
                       bool keep) {
  const PairRows pairs(logits, merged, per_head, softcap, temperature, beta, clip, kind);
  return sums_of_rows(logits, clip.has_value(),
                      [&](int64_t row) { return row_math().sums(pairs[row], keep); });
}

Tensor divergence_sums_and_gradient(Tensor& logits, const Tensor& merged, int64_t per_head,
                                    const MaybeTensor& scale, double softcap, double temperature,
                                    double beta, std::optional<double> clip, int64_t kind,
                                    bool bf16) {
  const PairRows pairs(logits, merged, per_head, softcap, temperature, beta, clip, kind);
  const Factors factors(scale, temperature);
  return sums_of_rows(logits, clip.has_value(), [&](int64_t row) {
    PairRow x = pairs[row];
    const Sums sums = row_math().sums(x, true);
    x.sum_share = sums.shares, x.factor = factors[row];
    row_math().kept_gradient(x, bf16);
    return sums;
  });
}

void divergence_gradient(Tensor& logits, const Tensor& merged, int64_t per_head,
                         const Tensor& sum_share, const MaybeTensor& scale, double softcap,
                         double temperature, double beta, int64_t kind, bool kept, bool bf16) {
  const PairRows pairs(logits, merged, per_head, softcap, temperature, beta, {}, kind);
  const Factors factors(scale, temperature);
  const Tensor shares = sum_share.contiguous();
  const float* shares_at = shares.const_data_ptr<float>();
  at::parallel_for(0, logits.size(1), 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      PairRow x = pairs[row];
      x.sum_share = shares_at[row], x.factor = factors[row];
      kept ? row_math().kept_gradient(x, bf16) : row_math().kl_gradient(x, bf16);
    }
  });
}

}  // namespace opsd
