// SPDX-License-Identifier: Apache-2.0
// Launches of the portable GEMM, and the choice between it and Hopper's.
#include "cuda/encode_gemm.cuh"
#include "fusae/cuda_encode_plan.h"
#include "cuda/encode_portable.cuh"

namespace fusae::cuda {
namespace {

template <template <class> class Epilogue, class Args>
void run(const EncodeInput& in, const Args& args, const GemmLaunch& l) {
  portable::visit_elements(in, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    launch(l.op, {{"n", in.n}, {"d", in.d}, {"m", in.m}}, portable::portable_kernel<T, Epilogue>,
           {portable_blocks(in.n, l.columns, in.processors), 1, portable::THREADS, portable::SHARED_BYTES}, l.stream, in, args,
           l.columns, l.step, l.run);
  });
}

bool by_wgmma(const EncodeInput& in) { return in.hopper && in.dtype != DType::f32; }

}  // namespace

void gemm(const EncodeInput& in, const StoreArgs& args, const GemmLaunch& l) {
  by_wgmma(in) ? hopper::gemm(in, args, l) : run<StoreScores>(in, args, l);
}
void gemm(const EncodeInput& in, const GateTopkArgs& args, const GemmLaunch& l) {
  by_wgmma(in) ? hopper::gemm(in, args, l) : run<GateTopk>(in, args, l);
}
void gemm(const EncodeInput& in, const GateRaggedArgs& args, const GemmLaunch& l) {
  by_wgmma(in) ? hopper::gemm(in, args, l) : run<GateRagged>(in, args, l);
}
void gemm(const EncodeInput& in, const GroupMaxPass& args, const GemmLaunch& l) {
  by_wgmma(in) ? hopper::gemm(in, args, l) : run<GroupMax>(in, args, l);
}
void gemm(const EncodeInput& in, const CountArgs& args, const GemmLaunch& l) { run<CountScores>(in, args, l); }

}  // namespace fusae::cuda
