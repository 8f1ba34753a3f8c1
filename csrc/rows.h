// What is computed on rows of logits, whatever instruction set computes it. Formulas: kernels.md §1.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace opsd {

// A finite stand-in for log 0: exp gives exactly 0, and differences of two of them do not overflow.
constexpr float LOG_ZERO = -1e38f;
// Between any logit and LOG_ZERO.
constexpr float BANNED = -5e37f;

enum Kind : int64_t { FORWARD_KL = 0, REVERSE_KL = 1, JSD = 2 };

// A tile of logits: 64 rows of both heads stay in L1 and L2 while they are folded.
constexpr int64_t TILE_COLS = 128;
constexpr int64_t TILE_ROWS = 64;

// z = softcap(raw + bias) / temperature, of one head.
struct Finish {
  const float* bias;  // (V,) or null
  float softcap;      // 0: none
  float temperature;
};

// Which statistics a pass keeps, in the order of passes.Layout.
struct Layout {
  int64_t heads;
  bool entropy, smoothed, label, predicted;
  int64_t kind;  // JSD where nothing crosses
  bool crosses() const { return heads == 2 && kind != JSD; }
  int64_t per_head() const { return 2 + entropy + 2 * smoothed + label + predicted; }
  int64_t count() const { return heads * per_head() + 2 * crosses(); }
};

// Running statistics of one row: sums by lane, relative to the maximum so far.
struct HeadState {
  float total[16], weighted[16], plain[16];
  float top, picked;
  int64_t best;  // the first column of the maximum
};
struct RowState {
  HeadState head[2];
  float cross[16];
  float infinite;
  float number;  // of columns, or their class weights' sum
};

// One tile of one or two heads, to be folded into its rows' statistics.
struct Fold {
  Layout layout;
  int64_t rows, column, cols;  // `cols` columns from `column` on
  Finish finish[2];
  float* raw[2];         // (rows, TILE_COLS), overwritten
  float* z[2];           // (rows, z_stride) receives finished logits, or null
  int64_t z_stride;
  const int64_t* label;  // (rows,) column of the label, or null
  const float* class_weight;  // (V,) of a smoothed loss, or null: all 1
  RowState* state;       // (rows,)
};

// A row of both heads' finished logits, and what is known of it.
struct PairRow {
  float* z_s;
  float* z_t;
  int64_t cols, kind;
  float top_s, log_total_s, top_t, log_total_t;
  float beta, rest;    // rest = 1 - beta
  bool clipped;
  float clip;
  float height;        // the student's temperature / softcap, 0: no softcap
  float total;         // sum of shares
  float factor;        // d loss / d value / temperature
};

struct Sums {
  float value, shares, unclipped;
};

struct LogprobRow {
  float* z;
  int64_t cols, label;  // label: its column, negative where another shard owns it
  float top, log_total;
  float sharp, uniform;  // the value is sharp log p(label) + uniform sum w log p + ...
  const float* class_weight;  // w, null: all 1
  float mass;            // what the gradient takes off for each p
  float scale, entropy_scale, entropy;
  bool with_entropy;     // the entropy has a gradient
  float temperature, height;
};

// The row arithmetic of one instruction set.
struct Rows {
  void (*start)(RowState*, int64_t rows);
  void (*fold)(const Fold&);
  // Statistics of `rows` rows into out[k * stride + row].
  void (*close)(const RowState*, int64_t rows, const Layout&, float* out, int64_t stride);
  // Value and sum of shares; with `keep`, z_s and z_t become share and s, times the softcap's slope.
  Sums (*sums)(const PairRow&, bool keep);
  // d loss / d raw logits over z_s, as float or bfloat16: no entry overtakes those unread.
  // From what `sums` kept, or of a KL without a clip from its logits.
  void (*kept_gradient)(const PairRow&, bool half);
  void (*kl_gradient)(const PairRow&, bool half);
  // The same over z; the entropy's own gradient into out_entropy unless that is null.
  void (*logprob_gradient)(const LogprobRow&, bool half, void* out_entropy);
  // to[k * TILE_COLS + row] = k-th word of 4 bytes of from's row: two bfloat16, or one float.
  // `last` bytes of the row's last word exist; missing rows and bytes are 0.
  void (*pack)(const char* from, int64_t stride, int64_t rows, int64_t words, int64_t last,
               uint32_t* to);
};

const Rows& rows_plain();
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define OPSD_X86 1
const Rows& rows_avx2();
const Rows& rows_avx512();
#endif

}  // namespace opsd
