// SPDX-License-Identifier: Apache-2.0
// Launches of the Hopper GEMM: tensor maps, clusters, and the kernels themselves.
#include "cuda/encode_gemm.cuh"
#include "cuda/encode_hopper.cuh"
#include "fusae/cuda_encode_plan.h"

namespace fusae::cuda::hopper {
namespace {

#ifdef FUSAE_EMULATED
TensorMap tensor_map(const char*, Shape, const void* base, DType, int64_t rows, int64_t d, int64_t stride, int box) {
  return {static_cast<const unsigned char*>(base), rows, d, 2 * stride, box};
}
#else
using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// From the driver that runs, at the first call: nothing links to libcuda.
Encode encoder(const char* op, Shape shape) {
  static const Encode found = [&] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result{};
    check(op, shape, cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || !function)
      throw std::runtime_error(std::string(op) + ": the driver has no cuTensorMapEncodeTiled (CUDA 12 is needed)");
    return reinterpret_cast<Encode>(function);
  }();
  return found;
}

// A matrix [rows, d] of 16-bit elements, in boxes of `box` rows and 64 columns. What lies outside is read as zeros.
TensorMap tensor_map(const char* op, Shape shape, const void* base, DType dtype, int64_t rows, int64_t d, int64_t stride,
                     int box) {
  alignas(64) TensorMap map{};
  const cuuint64_t size[2] = {static_cast<cuuint64_t>(d), static_cast<cuuint64_t>(rows)};
  const cuuint64_t pitch[1] = {static_cast<cuuint64_t>(stride) * 2};
  const cuuint32_t part[2] = {DEPTH, static_cast<cuuint32_t>(box)}, each[2] = {1, 1};
  const CUresult result = encoder(op, shape)(
      &map, dtype == DType::bf16 ? CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 : CU_TENSOR_MAP_DATA_TYPE_FLOAT16, 2,
      const_cast<void*>(base), size, pitch, part, each, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error(std::string(op) + ": cuTensorMapEncodeTiled refused a matrix of " + std::to_string(rows) +
                             " rows and " + std::to_string(d) + " columns, " + std::to_string(stride) +
                             " elements from row to row (error " + std::to_string(static_cast<int>(result)) + ")");
  return map;
}
#endif

template <class T, template <class> class Epilogue, class Args>
void launch_hopper(const EncodeInput& in, const Args& args, const GemmLaunch& l) {
  constexpr bool sampled = Epilogue<Frame>::SAMPLED;
  const Shape shape = {{"n", in.n}, {"d", in.d}, {"m", in.m}};
  const HopperPlan plan = hopper_plan(in.n, l.columns, in.processors);
  if (plan.clusters == 0) return;
  const TensorMap x = tensor_map(l.op, shape, in.x, in.dtype, in.n, in.d, in.x_stride, BOX);
  const TensorMap w = tensor_map(l.op, shape, in.weight, in.dtype, in.m, in.d, in.w_stride, sampled ? RUN : BOX);
  auto* const kernel = hopper_kernel<T, Epilogue>;
#ifdef FUSAE_EMULATED
  emulated::state().blocks = plan.cluster;
  emulated::m().run(dim3(static_cast<unsigned>(plan.clusters)), static_cast<unsigned>(THREADS * plan.cluster),
                    static_cast<size_t>(SHARED_BYTES) * static_cast<size_t>(plan.cluster),
                    [&] { kernel(x, w, in, args, l.columns, l.step, l.run); });
  emulated::state().blocks = 1;
#else
  check(l.op, shape, cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          SHARED_BYTES));
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(plan.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.clusters * plan.cluster));
  config.blockDim = dim3(THREADS);
  config.dynamicSmemBytes = SHARED_BYTES;
  config.stream = static_cast<cudaStream_t>(l.stream);
  config.attrs = &cluster;
  config.numAttrs = 1;
  check(l.op, shape, cudaLaunchKernelEx(&config, kernel, x, w, in, args, l.columns, l.step, l.run));
  check(l.op, shape, cudaGetLastError());
#endif
}

template <template <class> class Epilogue, class Args>
void visit_hopper(const EncodeInput& in, const Args& args, const GemmLaunch& l) {
  if (in.dtype == DType::bf16) {
    launch_hopper<bf16, Epilogue>(in, args, l);
  } else {
    launch_hopper<f16, Epilogue>(in, args, l);
  }
}

}  // namespace

void gemm(const EncodeInput& in, const StoreArgs& args, const GemmLaunch& l) { visit_hopper<StoreScores>(in, args, l); }
void gemm(const EncodeInput& in, const GateTopkArgs& args, const GemmLaunch& l) { visit_hopper<GateTopk>(in, args, l); }
void gemm(const EncodeInput& in, const GateRaggedArgs& args, const GemmLaunch& l) { visit_hopper<GateRagged>(in, args, l); }
void gemm(const EncodeInput& in, const GroupMaxPass& args, const GemmLaunch& l) { visit_hopper<GroupMax>(in, args, l); }

}  // namespace fusae::cuda::hopper
