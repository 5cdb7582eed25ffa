// SPDX-License-Identifier: Apache-2.0
// Arguments of the CUDA encoders. Matrices have rows that begin at multiples of 16 bytes, elements side by side;
// strides are of rows, in elements. What is scratch is said so: Python allocates it, its contents don't matter.
#pragma once
#include <cstdint>

#include "fusae/dtype.h"

namespace fusae::cuda {

// An entry of a row before it is a code: the latent, below it the 32 bits of the pre-activation.
using Entry = unsigned long long;

// Pre-activations x weightᵀ + bias, and their scores.
struct EncodeInput {
  const void* x;  // [n, d]
  int64_t x_stride;
  const void* weight;  // [m, d]
  int64_t w_stride;
  DType dtype;         // of x and weight
  bool tf32;           // float32 products by tensor cores, operands rounded to 10 bits
  int64_t n, d, m;     // n, m and d below 2^31
  const float* bias;   // [m] or null
  const float* norms;  // [m] or null: score = pre * norms
  bool magnitude;      // score = |pre|
  int processors;      // multiprocessors
  bool hopper;         // compute capability 9.0: TMA and wgmma for 16-bit elements
};

// The k best of every row, among the latents of a mask.
struct Selection {
  int64_t k;              // 0: none
  const uint8_t* mask;    // [m] or null
  const int32_t* limit;   // one number: latents in the mask; null without a mask
  const int32_t* fill;    // [k] latents for the places that a mask with fewer than k leaves, or null
  int rank;               // of the sampled score that bounds a row
  int cap;                // entries of a row's buffer
  float* bound;           // [n] scratch
  int32_t* last;          // [n] scratch
  int32_t* tally;         // [n] scratch: what passed the bound
  Entry* entries;         // [n, cap] scratch
  int32_t* failed;        // 1 scratch: rows on the list
  int32_t* list;          // [n] scratch: rows that were not certified
  Entry* repair;          // [units, 128, repair_cap] scratch
  int32_t* repair_count;  // [units, 128] scratch
  int64_t units;
  int64_t repair_cap;     // >= k + 128, a power of two
  int64_t splits;         // ranges of columns that a block of listed rows is cut into at most; 1 if k > 1024
  void* values;           // [n, k] in the dtype of x
  int32_t* indices;       // [n, k]
};

struct EncodeTopkArgs {
  EncodeInput in;
  bool relu;
  int64_t sampled;  // latents, a multiple of 16; 0: no sample, every row goes the way of the repair
  float* scores;    // [n, sampled] scratch
  Selection main, aux;
};
void encode_topk(const EncodeTopkArgs& args, void* stream);

struct GroupMaxArgs {
  EncodeInput in;
  int64_t k;      // divides m
  bool relu;
  Entry* best;    // [n, k] scratch
  float* pre;     // [n, k] scratch, with norms
  void* values;   // [n, k]
  int32_t* indices;
};
void encode_group_max(const GroupMaxArgs& args, void* stream);

// An entry on its way to ragged codes: `slot` is its place among the row's entries, in the order of arrival.
struct alignas(16) Found {
  int32_t row, latent, slot;
  float pre;
};

// Entries that pass, of all rows together, in the order of arrival.
struct Pool {
  Found* found;        // [cap] scratch
  int64_t cap;
  int64_t* total;      // 1: what passed, beyond the pool's end too
  int32_t* count;      // [n]: of every row
  Entry* entries;      // [cap] scratch: by row
};

struct EncodeThresholdArgs {
  EncodeInput in;
  const float* threshold;  // [m]
  float half_window;       // 0: none
  Pool pool;
  int32_t* above;          // [n] or null: entries above their threshold
};
// Fills the pool and its counts.
void threshold_find(const EncodeThresholdArgs& args, void* stream);

struct ThresholdWriteArgs {
  EncodeThresholdArgs find;
  const int64_t* offsets;  // [n + 1] of find.pool.count
  int32_t* again;          // [n + 1] scratch: counts of a second pass, and whether there is one
  void* values;            // [capacity]
  int32_t* indices;        // [capacity]
  uint8_t* state;          // [capacity] or null
  int64_t capacity;        // the pool must hold capacity + m entries, or all
};
// The pool as codes. Where it was too small, the rows that begin before `capacity` are found a second time.
void threshold_write(const ThresholdWriteArgs& args, void* stream);

// What a batch is compared with. The host never reads it.
struct BatchState {
  int64_t wanted;        // entries to select
  int64_t left;          // of them, those that equal the pivot
  uint32_t prefix;       // digits of the pivot, as far as they are known; in the end the pivot
  int32_t failed;        // 1: the pool does not hold the `wanted` best
  int32_t last_row;      // entries that equal the pivot pass up to this row,
  int32_t tie_latent;    // in it up to this latent
  float smallest;        // positive score that was selected
};

struct EncodeBatchArgs {
  EncodeInput in;
  int64_t k;
  bool relu;
  int64_t sampled, rank;  // rank of the sampled score, of all rows together, that bounds the batch
  float* scores;          // [n, sampled] scratch
  Pool pool;              // holds n·k + m entries at least
  BatchState* state;      // scratch
  int64_t* bins;          // [256] scratch
  int32_t* equal;         // [n] scratch: entries that equal the pivot
  int64_t* offsets;       // [n + 1]
  int64_t* place;         // [n + 1] scratch: where a row's entries lie in the pool
  void* values;           // [n·k], zeros
  int32_t* indices;       // [n·k], zeros
};
void encode_batch_topk(const EncodeBatchArgs& args, void* stream);

}  // namespace fusae::cuda
