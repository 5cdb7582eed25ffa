// SPDX-License-Identifier: Apache-2.0
// All algorithm bodies, in the namespace of the instruction set being compiled, and its table of kernels.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "cpu/parallel.h"
#include "fusae/dtype.h"
#include "fusae/ops.h"

#define FUSAE_STRING_(x) #x
#define FUSAE_STRING(x) FUSAE_STRING_(x)

namespace fusae::cpu::FUSAE_ISA {
namespace {
#include "cpu/simd.h"
#include "cpu/elements-inl.h"
#include "cpu/topk-inl.h"
#include "cpu/encode_gemm-inl.h"
#include "cpu/encode_topk-inl.h"
#include "cpu/row_lists-inl.h"
#include "cpu/decode-inl.h"
#include "cpu/decode_loss-inl.h"
#include "cpu/latent_pass-inl.h"
#include "cpu/nonzero-inl.h"
#include "cpu/moments-inl.h"
#include "cpu/adam_rows-inl.h"
#include "cpu/fma_burst-inl.h"
}  // namespace

extern const Table table;
const Table table = {
    FUSAE_STRING(FUSAE_ISA), tile_topk, tile_group_max, tile_threshold, tile_batch_topk, encode_topk, encode_group_max,
    encode_threshold, encode_batch_topk, select_finish, batch_cut, lists_offsets, lists_write, decode, decode_loss,
    by_latent, latent_pass, nonzero_mask, nonzero_take, adam_rows, fma_burst,
};

}  // namespace fusae::cpu::FUSAE_ISA
