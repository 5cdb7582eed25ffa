// SPDX-License-Identifier: Apache-2.0
// Which GEMM runs an epilogue. The units that compile them are `encode_hopper*.cu` and `encode_portable*.cu`.
#pragma once
#include "cuda/encode_epilogue.cuh"

namespace fusae::cuda {

// What a launch needs to know beside the input and the epilogue's arguments.
struct GemmLaunch {
  const char* op;
  int64_t columns;      // latents, or sampled ones
  int32_t step;         // of the sample
  const int32_t* run;   // with it, nothing happens unless it points to something else than 0
  Stream stream;
};

// On tensor cores by TMA and wgmma where the device and the elements have them, else portable.
void gemm(const EncodeInput& in, const StoreArgs& args, const GemmLaunch& l);
void gemm(const EncodeInput& in, const GateTopkArgs& args, const GemmLaunch& l);
void gemm(const EncodeInput& in, const GateRaggedArgs& args, const GemmLaunch& l);
void gemm(const EncodeInput& in, const GroupMaxPass& args, const GemmLaunch& l);
void gemm(const EncodeInput& in, const CountArgs& args, const GemmLaunch& l);

namespace hopper {
void gemm(const EncodeInput& in, const StoreArgs& args, const GemmLaunch& l);
void gemm(const EncodeInput& in, const GateTopkArgs& args, const GemmLaunch& l);
void gemm(const EncodeInput& in, const GateRaggedArgs& args, const GemmLaunch& l);
void gemm(const EncodeInput& in, const GroupMaxPass& args, const GemmLaunch& l);
}  // namespace hopper

}  // namespace fusae::cuda
