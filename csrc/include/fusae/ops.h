// SPDX-License-Identifier: Apache-2.0
// One plain-data argument struct per kernel, and the table of kernels that every CPU instruction set fills.
// Pointers are raw; matrices are row-major and contiguous unless a stride is given; strides are in elements.
// Indices of latents are int32, all sizes and offsets int64.
#pragma once
#include <cstdint>

#include "fusae/dtype.h"

namespace fusae {

// Running selection of the k best of every row while column tiles of the scores stream by in ascending order.
// Candidates of row i live in pre[i*cap ...], idx[i*cap ...]; count[i] of them, in order of arrival. A row's candidates
// are cut back to its k best whenever the next block of columns might not fit.
struct SelectState {
  float* pre;        // [n, cap] pre-activations of candidates
  int32_t* idx;      // [n, cap] their latents
  int32_t* count;    // [n]
  float* threshold;  // [n] score that a new candidate has to beat; NaN (all pass) until k were seen
  int64_t cap;       // >= k + 256 + 16: one block of columns that all pass, and a whole vector to spare
  int64_t k;
};

// A tile of products x·W_encᵀ (or given pre-activations) in memory.
struct ProductTile {
  const void* tile;   // [n, cols]
  DType dtype;        // of tile
  int64_t stride;     // between rows of tile
  int64_t n, cols;
  int64_t first;      // latent of the tile's first column
  const float* bias;  // [cols] of this tile, or null
  const float* norms; // [m] or null: score = pre * norms
  const uint8_t* mask;  // [cols] of this tile, or null: for `aux`
  bool magnitude;     // score = |pre|
  SelectState aux;    // k == 0: none. A top-k of its own, among mask != 0.
  int32_t threads;
};

// Products x·weightᵀ that never leave the registers. Strides are of rows, steps of columns.
struct Products {
  const void* x;  // [n, d]
  int64_t x_stride, x_step;
  const void* weight;  // [m, d]
  int64_t w_stride, w_step;
  DType dtype;  // of x and weight
  int64_t n, d, m;
  const float* bias;    // [m] or null
  const float* norms;   // [m] or null
  const uint8_t* mask;  // [m] or null: for `aux`
  bool magnitude;
  SelectState aux;  // as in ProductTile
  int32_t threads;
};

// The best of every group of `size` latents: idx is -1 where a group has not been met yet.
struct GroupState {
  float* pre;    // [n, k]
  int32_t* idx;  // [n, k]
  int64_t k, size;
};

// Entries of one row, latents ascending, in memory from malloc that grows: idx lies behind pre.
struct RowList {
  float* pre;
  int32_t* idx;
  int64_t count, cap;
};

// Entries that pass the threshold of their latent: score not at most threshold, or |pre - threshold| < half_window.
struct ThresholdState {
  RowList* lists;          // [n]
  const float* threshold;  // [m]
  float half_window;       // 0: none
};

// The `keep` best of all rows of a batch, of which n come at a time.
struct BatchState {
  RowList* lists;      // [rows]
  float* threshold;    // [rows] score that a new entry has to beat
  int64_t rows, keep;
  int64_t first_row;   // of the n
};

// Lists become ragged codes.
struct ListsArgs {
  const RowList* lists;  // [n]
  int64_t n;
  const float* norms;    // [m] or null
  bool relu;             // entries at or below 0 are left out
  int64_t* offsets;      // [n + 1]
  // The following for writing only.
  void* values;          // [capacity]
  DType dtype;
  int32_t* indices;      // [capacity]
  int64_t capacity;
  const float* threshold;  // [m], with state
  float half_window;
  uint8_t* state;        // [capacity] or null. Bit 0: score above the threshold (else the value is 0). Bit 1: in the window.
  float* l0;             // [n] or null: entries with bit 0
  int32_t threads;
};

// Sorts the candidates of every row, applies the activation, rounds and writes the codes.
struct SelectFinishArgs {
  SelectState state;
  int64_t n, m;
  const float* norms;   // [m] or null
  const uint8_t* mask;  // [m] or null; with it, rows short of k are filled with unmasked latents of value 0
  bool magnitude, relu;
  void* values;         // [n, k]
  DType dtype;
  int32_t* indices;     // [n, k]
  int32_t threads;
};

// Sparse codes: fixed width (offsets null, width entries a row) or ragged (offsets [n+1]).
struct Codes {
  const void* values;
  DType dtype;
  const int32_t* indices;
  const int64_t* offsets;
  int64_t n, width;
};

struct DecodeArgs {
  Codes codes;
  const void* weight;  // [m, d]
  const void* bias;    // [d] or null
  void* out;           // [n, d]
  DType dtype;         // of weight, bias, out
  int64_t m, d;
  int32_t threads;
};

// Nested reconstructions: number g is of the entries in groups 0..g. An entry's group is the number of prefixes, the last
// one left out, that are at most its latent, or with by_rank its place in the row.
struct Nesting {
  const int64_t* prefixes;  // [groups] ascending, or null where groups is 1
  int64_t groups;
  bool by_rank;
};

// residual[i] = target[i] - bias - Σ values[e] * weight[indices[e]], over the entries of row i in groups 0..g, for every g.
struct DecodeLossArgs {
  Codes codes;
  const void* weight;  // [m, d]
  const void* bias;    // [d] or null
  const void* target;  // [n, d]
  DType target_dtype;
  Nesting nesting;
  const float* mix;    // [groups] weights of the residuals; with one group it is 1
  float* sse;          // [groups] Σ residual²
  void* residual;      // [n, d] of all entries
  void* mixed;         // [groups, n, d] or null: mixed[g] = Σ mix[h] * residual_h over h >= g
  float* dots;         // mixed[group of e] · weight[indices[e]] of every stored entry, before rounding, or null
  DType dtype;         // of weight, bias, residual, mixed
  int64_t m, d;
  int32_t threads;
};

// A stable counting sort of the stored entries by latent: entries of latent j are order[start[j] .. start[j+1]).
struct ByLatentArgs {
  Codes codes;
  int64_t m;
  Nesting nesting;
  int64_t* start;  // [m + 1]
  int64_t* order;  // [entries] position of the entry in the storage
  int32_t* row;    // [entries] its row, plus n times its group
};

// One pass over the latents. For latent j and its entries e in row order:
//   sum[j]  = scale * Σ coef[e] * rows[row[e]]  (when sum is not null)
//   dots[e] = scale * (rows[row[e]] · weight[j])  (when dots is not null; for every stored entry)
//   coef_sum[j] = Σ coef[e]                     (when coef_sum is not null)
// With `latents`, only those u latents are visited and sum has u rows.
struct LatentPassArgs {
  Codes codes;             // values are coef
  const int64_t* start;
  const int64_t* order;
  const int32_t* row;
  const int64_t* latents;  // [u] or null: all m
  int64_t u;
  const void* rows;        // [n, d]; with groups [groups, n, d]
  const void* weight;      // [m, d], for dots
  float scale;
  DType dtype;             // of rows, weight, sum, coef_sum
  int64_t m, d;
  void* sum;
  void* dots;              // dtype of codes
  void* coef_sum;          // [m]
  int32_t threads;
};

// The non-zeros of a dense matrix: a bit for every entry and a count for every row; then, with the places of the rows
// known, the entries. Strides are of rows, steps of columns.
struct NonzeroMaskArgs {
  const void* dense;  // [n, m]
  int64_t stride, step;
  DType dtype;
  int64_t n, m;
  uint64_t* mask;     // [n, ceil(m / 64)], the lowest bit first
  int64_t* count;     // [n]
  int32_t threads;
};

struct NonzeroTakeArgs {
  const void* dense;  // as above
  int64_t stride, step;
  DType dtype;        // of dense, values
  int64_t n, m;
  const uint64_t* mask;
  const int64_t* offsets;  // [n + 1]
  int64_t capacity;        // entries from here on are left out
  void* values;            // [capacity]
  int32_t* indices;        // [capacity]
  int32_t threads;
};

// How a row of moments is stored: floats, or d 8-bit codes and an exponent for every 256 of them.
enum class Moments : int32_t { f32 = 0, bf16 = 1, codes = 2 };

struct AdamRowsArgs {
  void* param;       // [m, d]
  void* exp_avg;     // [m, d], or null: beta1 is 0
  void* exp_avg_sq;  // [m, d]
  const void* grad;     // [m, d] or [u, d]
  const int64_t* rows;  // [u] ascending, or null
  DType dtype;          // of param, grad
  int64_t m, d, u;
  // The update, with everything that is the same for all elements worked out in double by the caller.
  float decay;          // multiplies the weight first (1: none; AdamW)
  float l2;             // added to the gradient times the weight (0: none; Adam)
  float one_minus_beta1, beta2, one_minus_beta2;
  float step_size;      // lr / (1 - beta1^t)
  float root_correction2;  // sqrt(1 - beta2^t)
  float eps;
  bool masked, project, renormalise;
  int32_t threads;
  // What only some modes have.
  Moments avg_type, avg_sq_type;
  int32_t* last_step;  // [m] or null. Lazy: step in which a row last had a gradient; only rows with one are visited
  int64_t step;
  double beta2_exact;
  float* master;       // [m, d] or null: what is updated, of which param is a rounded copy
  bool stochastic;     // param (bf16, no master) is rounded stochastically
  uint64_t key;        // of the random bits: seed and step
  int64_t first_row;   // of the whole matrix, where this is a part of it
};

namespace cpu {

// The kernels of one instruction set.
struct Table {
  const char* name;
  void (*tile_topk)(const ProductTile&, const SelectState& main);
  void (*tile_group_max)(const ProductTile&, const GroupState&);
  void (*tile_threshold)(const ProductTile&, const ThresholdState&);
  void (*tile_batch_topk)(const ProductTile&, const BatchState&);
  void (*encode_topk)(const Products&, const SelectState& main);
  void (*encode_group_max)(const Products&, const GroupState&);
  void (*encode_threshold)(const Products&, const ThresholdState&);
  void (*encode_batch_topk)(const Products&, const BatchState&);
  void (*select_finish)(const SelectFinishArgs&);
  void (*batch_cut)(const BatchState&, const float* norms, int32_t threads);
  float (*lists_offsets)(const ListsArgs&);
  void (*lists_write)(const ListsArgs&);
  void (*decode)(const DecodeArgs&);
  void (*decode_loss)(const DecodeLossArgs&);
  void (*by_latent)(const ByLatentArgs&);
  void (*latent_pass)(const LatentPassArgs&);
  void (*nonzero_mask)(const NonzeroMaskArgs&);
  void (*nonzero_take)(const NonzeroTakeArgs&);
  void (*adam_rows)(const AdamRowsArgs&);
  double (*fma_burst)(int64_t iterations, int32_t threads);  // floating-point operations done
};

const Table& active();
// Name of every instruction set compiled in, best first; nullptr past the end.
const char* compiled(int i);
bool runnable(const char* name);
bool is_intel();
// False when the name is not compiled in or this processor cannot run it; nothing changes then.
bool set_active(const char* name);

}  // namespace cpu
}  // namespace fusae
