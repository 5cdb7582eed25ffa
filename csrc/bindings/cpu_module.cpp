// SPDX-License-Identifier: Apache-2.0
// fusae._C: the CPU kernels. Tensors cross as addresses and sizes; shapes, dtypes and contiguity were checked in Python.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

#include "fusae/check.h"
#include "fusae/ops.h"

namespace py = pybind11;
using namespace fusae;

namespace {

// An address from tensor.data_ptr(); 0 stands for "not given".
template <class T>
T* ptr(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Buffers of a running selection, as Python holds them: addresses of pre, idx, count, threshold, then cap and k.
using State = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, int64_t, int64_t>;

SelectState state_of(const State& s) {
  const auto [pre, idx, count, threshold, cap, k] = s;
  return {ptr<float>(pre), ptr<int32_t>(idx), ptr<int32_t>(count), ptr<float>(threshold), cap, k};
}

// Sparse codes: addresses of values, indices, offsets (0: fixed width), then dtype, rows, width and storage.
using CodesTuple = std::tuple<uintptr_t, uintptr_t, uintptr_t, int, int64_t, int64_t, int64_t>;

Codes codes_of(const CodesTuple& c, int64_t m, bool check) {
  const auto [values, indices, offsets, dtype, n, width, storage] = c;
  const Codes codes{ptr<void>(values), static_cast<DType>(dtype), ptr<int32_t>(indices), ptr<int64_t>(offsets), n, width};
  if (check) check_codes(codes, storage, m);
  return codes;
}

// One group where there are no prefixes.
Nesting nesting_of(const std::vector<int64_t>& prefixes, bool by_rank) {
  return {prefixes.data(), prefixes.empty() ? 1 : static_cast<int64_t>(prefixes.size()), by_rank};
}

// As the structs of the same name hold them; addresses first, the auxiliary selection and the threads last.
using TileTuple = std::tuple<uintptr_t, int, int64_t, int64_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t, bool,
                             State, int>;
using ProductsTuple = std::tuple<uintptr_t, int64_t, int64_t, uintptr_t, int64_t, int64_t, int, int64_t, int64_t, int64_t,
                                 uintptr_t, uintptr_t, uintptr_t, bool, State, int>;

ProductTile tile_of(const TileTuple& t) {
  const auto& [tile, dtype, stride, n, cols, first, bias, norms, mask, magnitude, aux, threads] = t;
  return {ptr<void>(tile), static_cast<DType>(dtype), stride, n, cols, first, ptr<float>(bias), ptr<float>(norms),
          ptr<uint8_t>(mask), magnitude, state_of(aux), threads};
}

Products products_of(const ProductsTuple& p) {
  const auto& [x, x_stride, x_step, weight, w_stride, w_step, dtype, n, d, m, bias, norms, mask, magnitude, aux,
               threads] = p;
  return {ptr<void>(x), x_stride, x_step, ptr<void>(weight), w_stride, w_step, static_cast<DType>(dtype), n, d, m,
          ptr<float>(bias), ptr<float>(norms), ptr<uint8_t>(mask), magnitude, state_of(aux), threads};
}

// The lists of all rows of a batch. Their memory is the object's.
struct RowLists {
  explicit RowLists(int64_t n) : rows(static_cast<size_t>(n), RowList{nullptr, nullptr, 0, 0}) {}
  ~RowLists() {
    for (const RowList& list : rows) std::free(list.pre);
  }
  RowLists(const RowLists&) = delete;
  RowLists& operator=(const RowLists&) = delete;
  std::vector<RowList> rows;
};

void tile_topk(const TileTuple& tile, const State& main) {
  const py::gil_scoped_release release;
  cpu::active().tile_topk(tile_of(tile), state_of(main));
}

void encode_topk(const ProductsTuple& products, const State& main) {
  const py::gil_scoped_release release;
  cpu::active().encode_topk(products_of(products), state_of(main));
}

void tile_group_max(const TileTuple& tile, uintptr_t pre, uintptr_t idx, int64_t k, int64_t size) {
  const py::gil_scoped_release release;
  cpu::active().tile_group_max(tile_of(tile), {ptr<float>(pre), ptr<int32_t>(idx), k, size});
}

void encode_group_max(const ProductsTuple& products, uintptr_t pre, uintptr_t idx, int64_t k, int64_t size) {
  const py::gil_scoped_release release;
  cpu::active().encode_group_max(products_of(products), {ptr<float>(pre), ptr<int32_t>(idx), k, size});
}

void tile_threshold(const TileTuple& tile, RowLists& lists, int64_t first_row, uintptr_t threshold, double half_window) {
  const py::gil_scoped_release release;
  cpu::active().tile_threshold(
      tile_of(tile), {lists.rows.data() + first_row, ptr<float>(threshold), static_cast<float>(half_window)});
}

void encode_threshold(const ProductsTuple& products, RowLists& lists, int64_t first_row, uintptr_t threshold,
                      double half_window) {
  const py::gil_scoped_release release;
  cpu::active().encode_threshold(
      products_of(products), {lists.rows.data() + first_row, ptr<float>(threshold), static_cast<float>(half_window)});
}

BatchState batch_of(RowLists& lists, int64_t first_row, uintptr_t threshold, int64_t keep) {
  return {lists.rows.data(), ptr<float>(threshold), static_cast<int64_t>(lists.rows.size()), keep, first_row};
}

void tile_batch_topk(const TileTuple& tile, RowLists& lists, int64_t first_row, uintptr_t threshold, int64_t keep) {
  const py::gil_scoped_release release;
  cpu::active().tile_batch_topk(tile_of(tile), batch_of(lists, first_row, threshold, keep));
}

void encode_batch_topk(const ProductsTuple& products, RowLists& lists, int64_t first_row, uintptr_t threshold,
                       int64_t keep) {
  const py::gil_scoped_release release;
  cpu::active().encode_batch_topk(products_of(products), batch_of(lists, first_row, threshold, keep));
}

// Cuts the lists back to the `keep` best where they hold more than `most`.
void batch_cut(RowLists& lists, uintptr_t threshold, int64_t keep, int64_t most, uintptr_t norms, int threads) {
  const py::gil_scoped_release release;
  int64_t total = 0;
  for (const RowList& list : lists.rows) total += list.count;
  if (total > most) cpu::active().batch_cut(batch_of(lists, 0, threshold, keep), ptr<float>(norms), threads);
}

float lists_offsets(const RowLists& lists, uintptr_t norms, bool relu, uintptr_t offsets) {
  const py::gil_scoped_release release;
  ListsArgs args{};
  args.lists = lists.rows.data();
  args.n = static_cast<int64_t>(lists.rows.size());
  args.norms = ptr<float>(norms);
  args.relu = relu;
  args.offsets = ptr<int64_t>(offsets);
  return cpu::active().lists_offsets(args);
}

void lists_write(const RowLists& lists, bool relu, uintptr_t offsets, uintptr_t values, int dtype, uintptr_t indices,
                 int64_t capacity, uintptr_t threshold, double half_window, uintptr_t state, uintptr_t l0, int threads) {
  const py::gil_scoped_release release;
  cpu::active().lists_write({lists.rows.data(), static_cast<int64_t>(lists.rows.size()), nullptr, relu,
                             ptr<int64_t>(offsets), ptr<void>(values), static_cast<DType>(dtype), ptr<int32_t>(indices),
                             capacity, ptr<float>(threshold), static_cast<float>(half_window), ptr<uint8_t>(state),
                             ptr<float>(l0), threads});
}

void select_finish(const State& state, int64_t n, int64_t m, uintptr_t norms, uintptr_t mask, bool magnitude, bool relu,
                   uintptr_t values, int dtype, uintptr_t indices, int threads) {
  const SelectFinishArgs args{state_of(state), n, m, ptr<float>(norms), ptr<uint8_t>(mask), magnitude, relu,
                              ptr<void>(values), static_cast<DType>(dtype), ptr<int32_t>(indices), threads};
  const py::gil_scoped_release release;
  cpu::active().select_finish(args);
}

void decode(const CodesTuple& codes, uintptr_t weight, uintptr_t bias, uintptr_t out, int dtype, int64_t m, int64_t d,
            int threads) {
  const py::gil_scoped_release release;
  cpu::active().decode({codes_of(codes, m, true), ptr<void>(weight), ptr<void>(bias), ptr<void>(out),
                        static_cast<DType>(dtype), m, d, threads});
}

void decode_loss(const CodesTuple& codes, uintptr_t weight, uintptr_t bias, uintptr_t target, int target_dtype,
                 const std::vector<int64_t>& prefixes, bool by_rank, const std::vector<float>& mix, uintptr_t sse,
                 uintptr_t residual, uintptr_t mixed, uintptr_t dots, int dtype, int64_t m, int64_t d, int threads) {
  const py::gil_scoped_release release;
  cpu::active().decode_loss({codes_of(codes, m, true), ptr<void>(weight), ptr<void>(bias), ptr<void>(target),
                             static_cast<DType>(target_dtype), nesting_of(prefixes, by_rank), mix.data(),
                             ptr<float>(sse), ptr<void>(residual), ptr<void>(mixed), ptr<float>(dots),
                             static_cast<DType>(dtype), m, d, threads});
}

void by_latent(const CodesTuple& codes, int64_t m, const std::vector<int64_t>& prefixes, bool by_rank, uintptr_t start,
               uintptr_t order, uintptr_t row) {
  const py::gil_scoped_release release;
  const Codes checked = codes_of(codes, m, true);
  const Nesting nesting = nesting_of(prefixes, by_rank);
  check_rows_of_groups(checked.n, nesting.groups);
  cpu::active().by_latent({checked, m, nesting, ptr<int64_t>(start), ptr<int64_t>(order), ptr<int32_t>(row)});
}

// `codes` were checked by by_latent.
void latent_pass(const CodesTuple& codes, uintptr_t start, uintptr_t order, uintptr_t row, uintptr_t latents, int64_t u,
                 uintptr_t rows, uintptr_t weight, double scale, int dtype, int64_t m, int64_t d, uintptr_t sum,
                 uintptr_t dots, uintptr_t coef_sum, int threads) {
  const py::gil_scoped_release release;
  cpu::active().latent_pass({codes_of(codes, m, false), ptr<int64_t>(start), ptr<int64_t>(order), ptr<int32_t>(row),
                             ptr<int64_t>(latents), u, ptr<void>(rows), ptr<void>(weight), static_cast<float>(scale),
                             static_cast<DType>(dtype), m, d, ptr<void>(sum), ptr<void>(dots), ptr<void>(coef_sum),
                             threads});
}

void nonzero_mask(uintptr_t dense, int64_t stride, int64_t step, int dtype, int64_t n, int64_t m, uintptr_t mask,
                  uintptr_t count, int threads) {
  const py::gil_scoped_release release;
  cpu::active().nonzero_mask({ptr<void>(dense), stride, step, static_cast<DType>(dtype), n, m, ptr<uint64_t>(mask),
                              ptr<int64_t>(count), threads});
}

void nonzero_take(uintptr_t dense, int64_t stride, int64_t step, int dtype, int64_t n, int64_t m, uintptr_t mask,
                  uintptr_t offsets, int64_t capacity, uintptr_t values, uintptr_t indices, int threads) {
  const py::gil_scoped_release release;
  cpu::active().nonzero_take({ptr<void>(dense), stride, step, static_cast<DType>(dtype), n, m, ptr<uint64_t>(mask),
                              ptr<int64_t>(offsets), capacity, ptr<void>(values), ptr<int32_t>(indices), threads});
}

// The last tuple is what only some modes have, in the order of the struct: addresses, the kinds of moments, and so on.
using AdamModes = std::tuple<int, int, uintptr_t, int64_t, uintptr_t, bool, uint64_t, int64_t>;

void adam_rows(uintptr_t param, uintptr_t exp_avg, uintptr_t exp_avg_sq, uintptr_t grad, uintptr_t rows, int dtype,
               int64_t m, int64_t d, int64_t u, double decay, double l2, double one_minus_beta1, double beta2,
               double one_minus_beta2, double step_size, double root_correction2, double eps, bool masked, bool project,
               bool renormalise, int threads, const AdamModes& modes) {
  const auto f = [](double a) { return static_cast<float>(a); };
  const auto [avg_type, avg_sq_type, last_step, step, master, stochastic, key, first_row] = modes;
  const py::gil_scoped_release release;
  check_rows(ptr<int64_t>(rows), u, m);
  cpu::active().adam_rows({ptr<void>(param), ptr<void>(exp_avg), ptr<void>(exp_avg_sq), ptr<void>(grad),
                           ptr<int64_t>(rows), static_cast<DType>(dtype), m, d, u, f(decay), f(l2), f(one_minus_beta1),
                           f(beta2), f(one_minus_beta2), f(step_size), f(root_correction2), f(eps), masked, project,
                           renormalise, threads, static_cast<Moments>(avg_type), static_cast<Moments>(avg_sq_type),
                           ptr<int32_t>(last_step), step, beta2, ptr<float>(master), stochastic, key, first_row});
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "CPU kernels of fusae. Private: use the functions of the fusae package.";
  m.def("isa", [] { return std::string(cpu::active().name); }, "instruction set in use");
  m.def("compiled_isas", [] {
    std::vector<std::string> names;
    for (int i = 0; cpu::compiled(i); ++i) names.emplace_back(cpu::compiled(i));
    return names;
  }, "instruction sets compiled in, best first");
  m.def("runnable", [](const std::string& name) { return cpu::runnable(name.c_str()); });
  m.def("set_isa", [](const std::string& name) { return cpu::set_active(name.c_str()); },
        "False, and no change, when the set is not compiled in or cannot run here");
  m.def("is_intel", &cpu::is_intel);
  py::class_<RowLists>(m, "RowLists").def(py::init<int64_t>());
  m.def("tile_topk", &tile_topk);
  m.def("tile_group_max", &tile_group_max);
  m.def("tile_threshold", &tile_threshold);
  m.def("tile_batch_topk", &tile_batch_topk);
  m.def("encode_topk", &encode_topk);
  m.def("encode_group_max", &encode_group_max);
  m.def("encode_threshold", &encode_threshold);
  m.def("encode_batch_topk", &encode_batch_topk);
  m.def("batch_cut", &batch_cut);
  m.def("lists_offsets", &lists_offsets);
  m.def("lists_write", &lists_write);
  m.def("select_finish", &select_finish);
  m.def("decode", &decode);
  m.def("decode_loss", &decode_loss);
  m.def("by_latent", &by_latent);
  m.def("latent_pass", &latent_pass);
  m.def("nonzero_mask", &nonzero_mask);
  m.def("nonzero_take", &nonzero_take);
  m.def("adam_rows", &adam_rows);
  m.def("fma_burst", [](int64_t iterations, int threads) {
    const py::gil_scoped_release release;
    return cpu::active().fma_burst(iterations, threads);
  }, "multiply-adds on registers alone; the number of floating-point operations done");
}
