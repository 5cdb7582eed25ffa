// SPDX-License-Identifier: Apache-2.0
// fusae._cuda: the CUDA kernels. Tensors cross as addresses and sizes, the stream as the number torch gives; shapes,
// dtypes, devices and contiguity were checked in Python, which also allocates every workspace.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

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

// One group where there are no prefixes.
cuda::Groups groups_of(const std::vector<int64_t>& prefixes, bool by_rank) {
  if (prefixes.size() > cuda::MAX_GROUPS)
    throw std::invalid_argument("at most " + std::to_string(cuda::MAX_GROUPS) + " prefixes, got " +
                                std::to_string(prefixes.size()));
  cuda::Groups groups{};
  groups.count = prefixes.empty() ? 1 : static_cast<int>(prefixes.size());
  groups.by_rank = by_rank;
  for (size_t i = 0; i < prefixes.size(); ++i)  // the last one may be as large as it likes
    groups.prefixes[i] = static_cast<int32_t>(std::min<int64_t>(prefixes[i], INT32_MAX));
  return groups;
}

void dots(const CodesTuple& codes, uintptr_t source, uintptr_t weight, int dtype, const std::vector<int64_t>& prefixes,
          bool by_rank, uintptr_t scale, uintptr_t out, int out_dtype, int64_t d, uintptr_t stream) {
  const cuda::DotsArgs args{entries_of(codes), ptr<void>(source), ptr<void>(weight), static_cast<DType>(dtype),
                            groups_of(prefixes, by_rank), ptr<float>(scale), ptr<void>(out),
                            static_cast<DType>(out_dtype), d};
  const py::gil_scoped_release release;
  cuda::dots(args, stream_of(stream));
}

void decode_loss(const CodesTuple& codes, uintptr_t weight, uintptr_t bias, int dtype, uintptr_t target, int target_dtype,
                 const std::vector<int64_t>& prefixes, bool by_rank, const std::vector<float>& mix, uintptr_t squares,
                 uintptr_t residual, uintptr_t mixed, uintptr_t dots, uintptr_t kept, int64_t d, uintptr_t stream) {
  cuda::LossArgs args{};
  args.entries = entries_of(codes);
  args.weight = ptr<void>(weight);
  args.bias = ptr<void>(bias);
  args.dtype = static_cast<DType>(dtype);
  args.target = ptr<void>(target);
  args.target_dtype = static_cast<DType>(target_dtype);
  args.groups = groups_of(prefixes, by_rank);
  std::copy(mix.begin(), mix.begin() + std::min<size_t>(mix.size(), cuda::MAX_GROUPS), args.mix);
  args.squares = ptr<float>(squares);
  args.residual = ptr<void>(residual);
  args.mixed = ptr<void>(mixed);
  args.dots = ptr<float>(dots);
  args.kept = ptr<float>(kept);
  args.d = d;
  const py::gil_scoped_release release;
  cuda::decode_loss(args, stream_of(stream));
}

void sort_by_latent(const CodesTuple& codes, const std::vector<int64_t>& prefixes, bool by_rank, uintptr_t keys,
                    uintptr_t place, uintptr_t row, uintptr_t sorted, uintptr_t order, uintptr_t start, uintptr_t scratch,
                    size_t scratch_bytes, uintptr_t stream) {
  const cuda::SortArgs args{entries_of(codes),     groups_of(prefixes, by_rank), ptr<uint32_t>(keys),
                            ptr<int32_t>(place),   ptr<int64_t>(row),            ptr<uint32_t>(sorted),
                            ptr<int32_t>(order),   ptr<int64_t>(start),          ptr<void>(scratch),
                            scratch_bytes};
  const py::gil_scoped_release release;
  cuda::sort_by_latent(args, stream_of(stream));
}

void latent_sums(const CodesTuple& codes, uintptr_t row, uintptr_t sorted, uintptr_t order, uintptr_t start,
                 uintptr_t latents, int64_t u, uintptr_t source, uintptr_t scale, uintptr_t sum, uintptr_t parts, int dtype,
                 int64_t d, int64_t chunk, uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::latent_sums({entries_of(codes), ptr<int64_t>(row), ptr<uint32_t>(sorted), ptr<int32_t>(order), ptr<int64_t>(start),
                     ptr<int64_t>(latents), u, ptr<void>(source), ptr<float>(scale), ptr<void>(sum), ptr<float>(parts),
                     static_cast<DType>(dtype), d, chunk},
                    stream_of(stream));
}

void coef_sums(const CodesTuple& codes, uintptr_t order, uintptr_t start, uintptr_t sum, int dtype, uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::coef_sums({entries_of(codes), ptr<int32_t>(order), ptr<int64_t>(start), ptr<void>(sum), static_cast<DType>(dtype)},
                  stream_of(stream));
}

// With `keys`, these instead of values and indices.
void topk(uintptr_t pre, int64_t stride, int dtype, int64_t n, int64_t m, int64_t k, uintptr_t values, uintptr_t indices,
          uintptr_t keys, uintptr_t stream) {
  const py::gil_scoped_release release;
  const cuda::TopkArgs args{ptr<void>(pre),    stride, static_cast<DType>(dtype), n, m, k, ptr<void>(values),
                            ptr<int32_t>(indices)};
  if (keys) {
    cuda::topk_keys(args, ptr<int64_t>(keys), stream_of(stream));
  } else {
    cuda::topk(args, stream_of(stream));
  }
}

// Dense matrix: address, strides, dtype, rows, columns, and the mask.
using DenseTuple = std::tuple<uintptr_t, int64_t, int64_t, int, int64_t, int64_t, uintptr_t>;

cuda::NonzeroArgs nonzero_of(const DenseTuple& dense) {
  const auto [data, stride, step, dtype, n, m, mask] = dense;
  cuda::NonzeroArgs args{};
  args.dense = ptr<void>(data);
  args.stride = stride;
  args.step = step;
  args.dtype = static_cast<DType>(dtype);
  args.n = n;
  args.m = m;
  args.mask = ptr<uint32_t>(mask);
  return args;
}

void nonzero_mask(const DenseTuple& dense, uintptr_t count, uintptr_t stream) {
  cuda::NonzeroArgs args = nonzero_of(dense);
  args.count = ptr<int64_t>(count);
  const py::gil_scoped_release release;
  cuda::nonzero_mask(args, stream_of(stream));
}

void nonzero_take(const DenseTuple& dense, uintptr_t offsets, int64_t capacity, uintptr_t values, uintptr_t indices,
                  uintptr_t stream) {
  cuda::NonzeroArgs args = nonzero_of(dense);
  args.offsets = ptr<int64_t>(offsets);
  args.capacity = capacity;
  args.values = ptr<void>(values);
  args.indices = ptr<int32_t>(indices);
  const py::gil_scoped_release release;
  cuda::nonzero_take(args, stream_of(stream));
}

void scatter(const CodesTuple& codes, uintptr_t dense, uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::scatter(entries_of(codes), ptr<void>(dense), stream_of(stream));
}

void threshold_gradients(const CodesTuple& codes, uintptr_t state, uintptr_t grad_l0, uintptr_t threshold,
                         double bandwidth, bool straight_through, uintptr_t grad_pre, uintptr_t jumps, uintptr_t stream) {
  const py::gil_scoped_release release;
  cuda::threshold_gradients({entries_of(codes), ptr<uint8_t>(state), ptr<float>(grad_l0), ptr<float>(threshold),
                             static_cast<float>(bandwidth), straight_through, ptr<float>(grad_pre), ptr<float>(jumps)},
                            stream_of(stream));
}

// The last tuple is what only some modes have, in the order of the struct: addresses, the kinds of moments, and so on.
using AdamModes = std::tuple<int, int, uintptr_t, int64_t, uintptr_t, bool, uint64_t, int64_t>;

void adam_rows(uintptr_t param, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t grad, uintptr_t rows, int dtype,
               int64_t m, int64_t d, int64_t u, double decay, double l2, double one_minus_beta1, double beta2,
               double one_minus_beta2, double step_size, double root_correction2, double eps, bool masked, bool project,
               bool renormalise, const AdamModes& modes, uintptr_t stream) {
  const auto f = [](double a) { return static_cast<float>(a); };
  const auto [avg_type, avg_sq_type, last_step, step, master, stochastic, key, first_row] = modes;
  const py::gil_scoped_release release;
  cuda::adam_rows({ptr<void>(param), ptr<void>(exp_avg), ptr<void>(exp_avg_sq), ptr<void>(grad), ptr<int64_t>(rows),
                   static_cast<DType>(dtype), m, d, u, f(decay), f(l2), f(one_minus_beta1), f(beta2), f(one_minus_beta2),
                   f(step_size), f(root_correction2), f(eps), masked, project, renormalise, 0,
                   static_cast<Moments>(avg_type), static_cast<Moments>(avg_sq_type), ptr<int32_t>(last_step), step, beta2,
                   ptr<float>(master), stochastic, key, first_row},
                  stream_of(stream));
}

}  // namespace

void bind_encode(py::module_& m);  // cuda_encode.cpp

PYBIND11_MODULE(FUSAE_CUDA_MODULE, m) {
  m.doc() = "CUDA kernels of fusae. Private: use the functions of the fusae package.";
#ifdef FUSAE_EMULATED
  m.attr("emulated") = true;
#else
  m.attr("emulated") = false;
#endif
  bind_encode(m);
  m.def("decode", &decode);
  m.def("dots", &dots);
  m.def("decode_loss", &decode_loss);
  m.def("sort_scratch", &cuda::sort_scratch);
  m.def("sort_by_latent", &sort_by_latent);
  m.def("latent_sums", &latent_sums);
  m.def("coef_sums", &coef_sums);
  m.def("topk", &topk);
  m.def("nonzero_mask", &nonzero_mask);
  m.def("nonzero_take", &nonzero_take);
  m.def("scatter", &scatter);
  m.def("threshold_gradients", &threshold_gradients);
  m.def("adam_rows", &adam_rows);
  m.def("shared_limit", &cuda::shared_limit, "bytes of shared memory that a block of the current device may ask for");
  m.attr("MAX_TOPK") = cuda::MAX_TOPK;
  m.attr("MAX_GROUPS") = cuda::MAX_GROUPS;
  m.def("vector_width", &cuda::vector_width);
  m.def("key_bits", &cuda::key_bits);
  m.def("topk_plan", [](int64_t k, int64_t block) {
    const cuda::TopkPlan plan = cuda::topk_plan(k, block);
    return std::make_tuple(plan.capacity, plan.sorted);
  }, "keys that a row's buffer holds, and how many of them the last sort has");
  m.def("loss_plan", [](int64_t d, int64_t groups, int64_t width, int64_t item, bool keep, bool dots, int64_t limit) {
    const cuda::LossPlan plan = cuda::loss_plan(d, groups, width, item, keep, dots, 128, limit);
    return std::make_tuple(plan.near, plan.cached, plan.bytes);
  }, "whether residuals stay in shared memory, rows that do, and the bytes");
  m.def("gather_plan", [](int64_t d, int vector) {
    const cuda::GatherPlan plan = cuda::gather_plan(d, vector);
    return std::make_tuple(plan.threads, plan.column_blocks);
  }, "threads of a block and blocks of columns for rows of d elements");
}
