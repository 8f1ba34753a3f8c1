// The gradient of the head: dz.T times the hidden states, 128 rows of it at a time, so that it is
// rounded once, as it is written, and fp32 sums of several blocks are read and written once.
#include <ATen/Parallel.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>

#include "ops.h"
#include "products.h"

namespace opsd {
namespace {

using at::native::cpublas::brgemm;

constexpr int64_t PANEL = 64;  // columns of hidden states in one product
constexpr int64_t DEPTH_STEP = 32;  // rows of dz that are transposed at a time

// Hidden states (rows, depth) as panels of PANEL columns: word (k, c) of a panel holds rows 2 k and
// 2 k + 1 of column c. Zeros fill the last panel and the rows up to DEPTH_STEP.
Tensor packed_panels(const Tensor& hidden, int64_t padded_rows) {
  const int64_t rows = hidden.size(0), depth = hidden.size(1);
  const int64_t panels = (depth + PANEL - 1) / PANEL;
  const Tensor padded = at::zeros({padded_rows, panels * PANEL}, hidden.options());
  padded.narrow(0, 0, rows).narrow(1, 0, depth).copy_(hidden);
  return padded.view({padded_rows / 2, 2, panels, PANEL}).permute({2, 0, 3, 1}).contiguous();
}

}  // namespace

void weight_gradient(const Tensor& dz, const Tensor& hidden, const MaybeTensor& sum, bool add,
                     const MaybeTensor& out) {
  const int64_t rows = dz.size(0), cols = dz.size(1), depth = hidden.size(1);
  TORCH_CHECK(dz.stride(1) == 1 && (!sum || sum->is_contiguous()) && (!out || out->is_contiguous()),
              "weight_gradient: strided operands");
  const int64_t padded = (rows + DEPTH_STEP - 1) / DEPTH_STEP * DEPTH_STEP;
  const Tensor panels = packed_panels(hidden, padded);
  const auto* from = reinterpret_cast<const uint16_t*>(dz.const_data_ptr<at::BFloat16>());
  const auto* h = panels.const_data_ptr<at::BFloat16>();
  float* sums = sum ? sum->data_ptr<float>() : nullptr;
  auto* to = out ? reinterpret_cast<uint16_t*>(out->data_ptr<at::BFloat16>()) : nullptr;
  at::parallel_for(0, (cols + TILE_COLS - 1) / TILE_COLS, 1, [&](int64_t begin, int64_t end) {
    const Tensor tile = at::empty({TILE_COLS, padded}, dz.options());
    const Tensor product = at::empty({TILE_COLS, PANEL}, at::kFloat);
    for (int64_t first = begin * TILE_COLS; first < std::min(end * TILE_COLS, cols);
         first += TILE_COLS) {
      const int64_t height = std::min(TILE_COLS, cols - first);
      row_math().transpose_halves(from + first, dz.stride(0), rows, height, padded,
                                  reinterpret_cast<uint16_t*>(tile.data_ptr()));
      for (int64_t c = 0; c < depth; c += PANEL) {
        brgemm(TILE_COLS, PANEL, padded, padded, PANEL, PANEL, false,
               tile.const_data_ptr<at::BFloat16>(), h + c * padded, product.data_ptr<float>(), true);
        const int64_t at = first * depth + c;
        row_math().add_rows(product.const_data_ptr<float>(), PANEL, height,
                            std::min(PANEL, depth - c), add ? sums + at : nullptr,
                            to ? nullptr : sums + at, to ? to + at : nullptr, depth);
      }
    }
    row_math().finish_streams();
    at::native::cpublas::brgemm_release(true);
  });
}

}  // namespace opsd
