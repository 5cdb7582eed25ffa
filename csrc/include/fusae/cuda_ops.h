// SPDX-License-Identifier: Apache-2.0
// One plain-data argument struct per CUDA op, and the functions that launch it. Pointers are device memory, matrices
// row-major and contiguous; every call enqueues on `stream` and returns. A failed launch throws std::runtime_error.
#pragma once
#include <cstdint>

#include "fusae/ops.h"

namespace fusae::cuda {

using Stream = void*;  // cudaStream_t, without its header

// Bytes of shared memory that a block may ask for on the current device.
int64_t shared_limit();

// Codes whose contents no one has looked at: a look would wait for the device. Kernels leave out what lies past the
// storage, and a latent outside the dictionary makes what it touches NaN.
struct Entries {
  Codes codes;
  int64_t storage;  // entries that there is memory for
  int64_t m;        // latents
};

struct DecodeArgs {
  Entries entries;
  const void* weight;  // [m, d]
  const void* bias;    // [d] or null
  void* out;           // [n, d]
  DType dtype;         // of weight, bias, out
  int64_t d;
};

void decode(const DecodeArgs& args, Stream stream);

// out[e] = scale * (source[row of e] · weight[latent of e]) of every stored entry; with groups, of source[group of e].
constexpr int MAX_GROUPS = 256;
struct Groups {
  int count;  // 1: none
  bool by_rank;
  int32_t prefixes[MAX_GROUPS];  // ascending; as in Nesting
};
struct DotsArgs {
  Entries entries;     // values are not read
  const void* source;  // [count, n, d]
  const void* weight;  // [m, d]
  DType dtype;         // of source, weight
  Groups groups;
  const float* scale;  // one number, or null: 1
  void* out;           // [storage]; what no row has is not written
  DType out_dtype;
  int64_t d;
};
void dots(const DotsArgs& args, Stream stream);

// See DecodeLossArgs of the CPU.
struct LossArgs {
  Entries entries;
  const void* weight;  // [m, d]
  const void* bias;    // [d] or null
  DType dtype;         // of weight, bias, residual, mixed
  const void* target;  // [n, d]
  DType target_dtype;
  Groups groups;
  float mix[MAX_GROUPS];
  float* squares;   // [groups, n] Σ residual² of every row
  void* residual;   // [n, d]
  void* mixed;      // [groups, n, d] or null
  float* dots;      // [storage] or null; what no row has is not written
  float* kept;      // [groups, n, d] scratch, or null where a row's residuals stay in shared memory (cuda_plan.h)
  int64_t d;
};
void decode_loss(const LossArgs& args, Stream stream);

// The entries of codes in the order of their latents, those of a latent in the order of storage. Entries of value 0,
// or outside the storage or the dictionary, come last and belong to none.
struct SortArgs {
  Entries entries;
  Groups groups;
  uint32_t* keys;       // [storage] latents; filled with ~0
  int32_t* place;       // [storage] filled with 0, 1, 2 ...
  int64_t* row;         // [storage] row of an entry in storage, plus n times its group
  uint32_t* sorted;     // [storage] latents in order
  int32_t* order;       // [storage] their entries
  int64_t* start;       // [m + 1]: those of latent j are order[start[j] .. start[j+1])
  void* scratch;        // of sort_scratch(storage, m) bytes
  size_t scratch_bytes;
};
size_t sort_scratch(int64_t storage, int64_t m);
void sort_by_latent(const SortArgs& args, Stream stream);

// sum[i] = scale * Σ values[e] * source[row[e]] over the entries of latent i, or of latents[i].
// Latents of more than `chunk` entries are summed in chunks of that many, and those in order.
struct SumsArgs {
  Entries entries;
  const int64_t* row;
  const uint32_t* sorted;
  const int32_t* order;
  const int64_t* start;
  const int64_t* latents;  // [u] ascending, or null: all m
  int64_t u;
  const void* source;      // [groups * n, d]
  const float* scale;      // one number, or null: 1
  void* sum;               // [m, d] or [u, d]
  float* parts;            // [2 * ceil(storage / chunk), d] scratch
  DType dtype;             // of source, sum
  int64_t d, chunk;
};
void latent_sums(const SumsArgs& args, Stream stream);

// sum[j] = Σ values[e] over the entries of latent j.
struct CoefSumsArgs {
  Entries entries;
  const int32_t* order;
  const int64_t* start;
  void* sum;  // [m]
  DType dtype;
};
void coef_sums(const CoefSumsArgs& args, Stream stream);

// Row-wise top-k, NaN largest, ties to the lower index. k <= MAX_TOPK reads the input once.
constexpr int64_t MAX_TOPK = 2048;
struct TopkArgs {
  const void* pre;  // [n, m], rows `stride` elements apart
  int64_t stride;
  DType dtype;      // of pre, values
  int64_t n, m, k;
  void* values;     // [n, k]
  int32_t* indices; // [n, k]
};
void topk(const TopkArgs& args, Stream stream);
// Any k: the keys of the k largest in any order. A key is the ordered score above ~index, minus 2^63: as int64 they sort.
void topk_keys(const TopkArgs& args, int64_t* keys, Stream stream);

// The non-zeros of a dense matrix: bits and counts; then, with the places of the rows known, the entries.
struct NonzeroArgs {
  const void* dense;  // [n, m]
  int64_t stride, step;  // of rows, of columns
  DType dtype;
  int64_t n, m;
  uint32_t* mask;     // [n, ceil(m / 32)], the lowest bit first
  int64_t* count;     // [n]
  const int64_t* offsets;  // [n + 1], from here on for nonzero_take
  int64_t capacity;        // entries from here on are left out
  void* values;
  int32_t* indices;
};
void nonzero_mask(const NonzeroArgs& args, Stream stream);
void nonzero_take(const NonzeroArgs& args, Stream stream);

// dense[row, latent] = value of every entry. NaN, if some did not fit their storage: a part must not pass for the whole.
void scatter(const Entries& entries, void* dense, Stream stream);

// What a step at the thresholds gives the entries of encode_threshold. NaN as in scatter.
struct ThresholdArgs {
  Entries entries;              // values: their gradients, null for none
  const uint8_t* state;         // [storage]
  const float* grad_l0;         // [n] or null
  const float* threshold;       // [m]
  float bandwidth;
  bool straight_through;
  float* grad_pre;  // [storage]
  float* jumps;     // [storage] part of the gradient of the threshold
};
void threshold_gradients(const ThresholdArgs& args, Stream stream);

// One Adam step; the struct is that of the CPU (`threads` is not read).
void adam_rows(const AdamRowsArgs& args, Stream stream);

}  // namespace fusae::cuda
