// The second pass of one head: the gradient of the log-probability, and of the entropy.
#include <ATen/Parallel.h>

#include "ops.h"

namespace opsd {
namespace {

// One number per row, or the same number for all rows.
struct Column {
  Column(const MaybeTensor& x, float otherwise)
      : kept(x ? x->to(at::kFloat).contiguous() : Tensor()),
        at(x ? kept.const_data_ptr<float>() : nullptr), otherwise(otherwise) {}
  float operator[](int64_t row) const { return at ? at[row] : otherwise; }
  Tensor kept;
  const float* at;
  float otherwise;
};

}  // namespace

void logprob_gradient(Tensor& logits, const Tensor& merged, const Tensor& label, int64_t offset,
                      const MaybeTensor& entropy, const MaybeTensor& scale,
                      const MaybeTensor& entropy_scale, const Tensor& rates, double uniform,
                      const MaybeTensor& class_weight, double softcap, double temperature,
                      bool bf16, std::optional<Tensor> out_entropy) {
  TORCH_CHECK(logits.is_contiguous() && merged.stride(1) == 1 && rates.is_contiguous(),
              "logprob: strided operands");
  const int64_t count = logits.size(1), cols = logits.size(2);
  float* z = logits.data_ptr<float>();
  const float* at = merged.const_data_ptr<float>();
  const Tensor column = label.sub(offset).contiguous();
  const int64_t* label_at = column.const_data_ptr<int64_t>();
  const float* rate = rates.const_data_ptr<float>();
  const float* weights = class_weight ? class_weight->const_data_ptr<float>() : nullptr;
  const Column entropies(entropy, 0.0f), scales(scale, 1.0f), entropy_scales(entropy_scale, 0.0f);
  char* entropy_out = out_entropy ? static_cast<char*>(out_entropy->data_ptr()) : nullptr;
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      LogprobRow x{};
      x.z = z + row * cols, x.cols = cols, x.label = label_at[row];
      x.row_max = at[row], x.log_sum = logf(at[merged.stride(0) + row]);
      x.sharp = rate[row], x.mass = rate[count + row];
      x.uniform = static_cast<float>(uniform), x.class_weight = weights;
      x.with_entropy = entropy.has_value(), x.entropy = entropies[row];
      x.scale = scales[row], x.entropy_scale = entropy_scales[row];
      x.temperature = static_cast<float>(temperature);
      x.inv_cap = softcap == 0.0 ? 0.0f : static_cast<float>(temperature / softcap);
      char* to = entropy_out ? entropy_out + row * cols * (bf16 ? 2 : 4) : nullptr;
      row_math().logprob_gradient(x, bf16, to);
    }
  });
}

}  // namespace opsd
