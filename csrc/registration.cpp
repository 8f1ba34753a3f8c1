// Registers the operators of the library `opsd_cpu`. The operators of opsd_kernels.ops call them
// and supply fake kernels and autograd.
#include <torch/library.h>

#include "ops.h"
#include "products.h"

TORCH_LIBRARY(opsd_cpu, m) {
  // A factory: its arguments hold no tensor by which to find the backend.
  m.def("large_empty(int[] shape, ScalarType dtype, bool workspace) -> Tensor", opsd::large_empty);
  m.def(
      "statistics(Tensor[] hidden, Tensor[] weight, Tensor?[] bias, float[] softcap, "
      "float[] temperature, Tensor? label, int offset, bool entropy, bool smoothed, "
      "bool predicted, Tensor? class_weight, int kind, Tensor(a!) logits, Tensor(b!) out, "
      "Tensor(c!)? top_logit=None, Tensor(d!)? top_column=None, Tensor? target_column=None, "
      "Tensor(e!)? target_logit=None) -> ()");
  m.def(
      "merge(Tensor parts, int heads, bool entropy, bool smoothed, bool label, bool predicted, "
      "int kind, Tensor(a!) out) -> ()");
  m.def(
      "divergence_sums(Tensor(a!) logits, Tensor merged, int per_head, float softcap, "
      "float temperature, float beta, float? clip, int kind, bool keep) -> Tensor");
  m.def(
      "divergence_sums_and_gradient(Tensor(a!) logits, Tensor merged, int per_head, Tensor? scale, "
      "float softcap, float temperature, float beta, float? clip, int kind, bool bf16) -> Tensor");
  m.def(
      "divergence_gradient(Tensor(a!) logits, Tensor merged, int per_head, Tensor sum_share, "
      "Tensor? scale, float softcap, float temperature, float beta, int kind, bool kept, "
      "bool bf16) -> ()");
  m.def(
      "logprob_gradient(Tensor(a!) logits, Tensor merged, Tensor label, int offset, "
      "Tensor? entropy, Tensor? scale, Tensor? entropy_scale, Tensor rates, float uniform, "
      "Tensor? class_weight, float softcap, float temperature, bool bf16, "
      "Tensor(b!)? out_entropy) -> ()");
  m.def("has_bf16_products() -> bool", opsd::has_bf16_products);
  m.def(
      "weight_gradient(Tensor dz, Tensor hidden, Tensor(a!)? sum, bool add, Tensor(b!)? out) -> ()");
  m.def("target_sums(Tensor factors, Tensor weight, Tensor ids, Tensor(a!) out) -> ()");
  m.def("store_entries(Tensor values, Tensor ids, Tensor(a!) dz) -> ()");
}

namespace {

using opsd::MaybeTensor;
using at::Tensor;

void statistics(at::TensorList hidden, at::TensorList weight,
                const c10::List<MaybeTensor>& bias, at::ArrayRef<double> softcap,
                at::ArrayRef<double> temperature, const MaybeTensor& label, int64_t offset,
                bool entropy, bool smoothed, bool predicted, const MaybeTensor& class_weight,
                int64_t kind, Tensor& logits, Tensor& out, const MaybeTensor& top_logit,
                const MaybeTensor& top_column, const MaybeTensor& target_column,
                const MaybeTensor& target_logit) {
  opsd::statistics(hidden.vec(), weight.vec(), {bias.begin(), bias.end()}, softcap.vec(),
                   temperature.vec(), label, offset, entropy, smoothed, predicted, class_weight,
                   kind, logits, out, top_logit, top_column, target_column, target_logit);
}

}  // namespace

TORCH_LIBRARY_IMPL(opsd_cpu, CPU, m) {
  m.impl("statistics", statistics);
  m.impl("merge", opsd::merge);
  m.impl("divergence_sums", opsd::divergence_sums);
  m.impl("divergence_sums_and_gradient", opsd::divergence_sums_and_gradient);
  m.impl("divergence_gradient", opsd::divergence_gradient);
  m.impl("logprob_gradient", opsd::logprob_gradient);
  m.impl("weight_gradient", opsd::weight_gradient);
  m.impl("target_sums", opsd::target_sums);
  m.impl("store_entries", opsd::store_entries);
}
