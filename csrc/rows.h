// Interface of the row arithmetic, which is compiled once for each instruction set.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace opsd {

// Finite, in place of log 0: its exp is exactly 0, and the difference of two does not overflow.
constexpr float LOG_ZERO = -1e38f;
// Between any logit and LOG_ZERO.
constexpr float BANNED = -5e37f;

enum Kind : int64_t { FORWARD_KL = 0, REVERSE_KL = 1, JSD = 2 };

// A tile of logits: 64 rows of both heads stay in L1 and L2 while they are folded.
constexpr int64_t TILE_COLS = 128;
constexpr int64_t TILE_ROWS = 64;

// z = softcap(raw + bias) / temperature, of one head.
struct LogitTransform {
  const float* bias;  // (V,) or null
  float softcap;      // 0: none
  float temperature;
};

// Which statistics a pass keeps, in the order of Layout in opsd_kernels/backends/passes.py.
struct Layout {
  int64_t heads;
  bool entropy, smoothed, label, predicted;
  int64_t kind;  // a Kind; JSD where no cross sums are kept
  bool has_cross() const { return heads == 2 && kind != JSD; }
  int64_t per_head() const { return 2 + entropy + 2 * smoothed + label + predicted; }
  int64_t count() const { return heads * per_head() + 2 * has_cross(); }
};

// Running statistics of one row. Every lane has a maximum of its own, row_max, and sums over
// u = z - row_max: no tile needs a maximum over lanes. At most 16 lanes are in use.
struct HeadState {
  float row_max[16], sum_exp[16], sum_exp_logit[16], sum_logit[16], sum_weight[16];
  float label_logit;
  float largest;   // over all lanes, where the prediction is kept
  int64_t argmax;  // the first column of the maximum
};
struct RowState {
  HeadState head[2];
  float cross[16];
  float infinite;
};

// The largest logits of one row among the columns that have passed, and others that came since the
// last choice, in the order of the columns.
struct RowLargest {
  int32_t* order;  // see order_of
  int32_t* column;
  int32_t size;
  float least;  // what a further logit must exceed
};

// The logit of a place in the order of integers.
inline float logit_of(int32_t order) {
  order ^= (order >> 31) & 0x7fffffff;
  float logit;
  memcpy(&logit, &order, sizeof logit);
  return logit;
}

// One tile of one or two heads, to be folded into its rows' statistics.
struct Fold {
  Layout layout;
  int64_t rows, column, cols;  // `cols` columns from `column` on
  LogitTransform transform[2];
  float* raw[2];         // (rows, TILE_COLS), overwritten
  float* z[2];           // (rows, z_stride) receives the logits, or null
  int64_t z_stride;
  const int64_t* label;  // (rows,) column of the label, or null
  const float* class_weight;  // (V,) of a smoothed loss, or null: all 1
  RowState* state;       // (rows,)
  RowLargest* largest;   // (rows,) or null: none are chosen
  int64_t largest_count, largest_limit;  // chosen anew where there are more than the limit
};

// A row of both heads' logits, and what is known of it.
struct PairRow {
  float* z_s;
  float* z_t;
  int64_t cols, kind;
  float row_max_s, log_sum_s, row_max_t, log_sum_t;
  float beta, one_minus_beta;
  bool clipped;
  float clip;
  float inv_cap;       // the student's temperature / softcap, 0: no softcap
  float sum_share;    // or, of a KL without a clip, its value
  float factor;        // d loss / d value / temperature
};

struct Sums {
  float value, shares, unclipped;
};

struct LogprobRow {
  float* z;
  int64_t cols, label;  // column of the label; outside [0, cols) where another shard owns it
  float row_max, log_sum;
  float sharp, uniform;  // dz = sharp [at the label] + uniform w - mass p
  const float* class_weight;  // w, or null: all 1
  float mass;
  float scale, entropy_scale, entropy;
  bool with_entropy;     // the entropy has a gradient
  float temperature, inv_cap;
};

// The row arithmetic of one instruction set.
struct RowMath {
  void (*reset)(RowState*, int64_t rows);
  void (*fold)(const Fold&);
  // Statistic k of each of `rows` rows goes to out[k * stride + row].
  void (*store_statistics)(const RowState*, int64_t rows, const Layout&, float* out,
                           int64_t stride);
  // Value and sum of shares; with `keep` share and s, times the softcap's slope, over
  // z_s and z_t.
  Sums (*sums)(const PairRow&, bool keep);
  // d loss / d raw logits over z_s, as float or bfloat16; writes never overtake reads. The first
  // reads what `sums` kept, the second the logits of a KL without a clip.
  void (*kept_gradient)(const PairRow&, bool bf16);
  void (*kl_gradient)(const PairRow&, bool bf16);
  // The same over z; the entropy's gradient by itself into out_entropy unless that is null.
  void (*logprob_gradient)(const LogprobRow&, bool bf16, void* out_entropy);
  // to[k * TILE_COLS + row] = k-th word of 4 bytes of from's row: two bfloat16, or one float.
  // `last` bytes of the row's last word exist; missing rows and bytes are 0.
  void (*pack)(const char* from, int64_t stride, int64_t rows, int64_t words, int64_t last,
               uint32_t* to);
  // to (cols, padded) = the transpose of from (rows, cols), rows `stride` apart; zeros fill the
  // rows up to `padded`, a multiple of 32.
  void (*transpose_halves)(const uint16_t* from, int64_t stride, int64_t rows, int64_t cols,
                           int64_t padded, uint16_t* to);
  // x (rows, cols), rows `stride` apart and whole vectors long, plus `added`, if there is any, to
  // `sum` as float or to `out` as bfloat16, whose rows are `to_stride` apart.
  void (*add_rows)(const float* x, int64_t stride, int64_t rows, int64_t cols, const float* added,
                   float* sum, uint16_t* out, int64_t to_stride);
  // to (n) += scale * x, which holds floats or bfloat16 (`bf16`).
  void (*add_scaled)(float* to, const void* x, float scale, int64_t n, bool bf16);
  // What other threads read may have been stored past the cache: call it before they do.
  void (*finish_streams)();
};

const RowMath& rows_plain();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define OPSD_X86 1
const RowMath& rows_avx2();
const RowMath& rows_avx512();
#endif

}  // namespace opsd
