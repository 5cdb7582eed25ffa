// SPDX-License-Identifier: Apache-2.0
// fusae._cuda: the CUDA kernels. Tensors cross as addresses and sizes, the stream as the number torch gives; shapes,
// dtypes, devices and contiguity were checked in Python, which also allocates every workspace.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "fusae/cuda_ops.h"
#include "fusae/cuda_plan.h"

namespace py = pybind11;
using namespace fusae;

namespace {

// An address from tensor.data_ptr(); 0 stands for "not given".
template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

cuda::Stream stream_of(uintptr_t handle) { return ptr<void>(handle); }

// Sparse codes: addresses of values, indices, offsets (0: fixed width), then dtype, rows, width, storage and latents.
using CodesTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int, int64_t, int64_t, int64_t, int64_t>;

cuda::Entries entries_of(const CodesTuple& c) {
  const auto [values, indices, offsets, dtype, n, width, storage, m] = c;
  return {{ptr<void>(values), static_cast<DType>(dtype), ptr<int32_t>(indices), ptr<int64_t>(offsets), n, width}, storage, m};
}

void decode(const CodesTuple& codes, uintptr_t weight, uintptr_t bias, uintptr_t out, int dtype, int64_t d,
            uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::decode({entries_of(codes), ptr<void>(weight), ptr<void>(bias), ptr<void>(out), static_cast<DType>(dtype), d},
               stream_of(stream));
}

}  // namespace

PYBIND11_MODULE(FUSAE_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of fusae. Private: use the functions of the fusae package.";
#ifdef FUSAE_EMULATED
  m.attr("emulated") = true;
#else
  m.attr("emulated") = false;
#endif
  m.def("decode", &decode);
  m.def("gather_plan", [](int64_t d, int vector) {
    const cuda::GatherPlan plan = cuda::gather_plan(d, vector);
    return std::make_tuple(plan.threads, plan.column_blocks);
  }, "threads of a block and blocks of columns for rows of d elements");
}
