// SPDX-License-Identifier: Apache-2.0
// The encoders of fusae._cuda. Their arguments are many: they come as dictionaries with the names of the structs'
// fields (`fusae/cuda_encode.h`), addresses as numbers; what is missing is 0.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>

#include "fusae/cuda_encode.h"
#include "fusae/cuda_encode_plan.h"

namespace py = pybind11;
using namespace fusae;
using namespace fusae::cuda;

namespace {

struct Fields {
  py::dict from;
  int64_t number(const char* name) const { return from.contains(name) ? from[name].cast<int64_t>() : 0; }
  double real(const char* name) const { return from.contains(name) ? from[name].cast<double>() : 0.0; }
  template <class T>
  T* ptr(const char* name) const {
    return reinterpret_cast<T*>(from.contains(name) ? from[name].cast<uintptr_t>() : 0);
  }
  Fields part(const char* name) const { return {from.contains(name) ? from[name].cast<py::dict>() : py::dict()}; }
};

EncodeInput input_of(const Fields& f) {
  EncodeInput in{};
  in.x = f.ptr<void>("x");
  in.x_stride = f.number("x_stride");
  in.weight = f.ptr<void>("weight");
  in.w_stride = f.number("w_stride");
  in.dtype = static_cast<DType>(f.number("dtype"));
  in.tf32 = f.number("tf32") != 0;
  in.n = f.number("n");
  in.d = f.number("d");
  in.m = f.number("m");
  in.bias = f.ptr<float>("bias");
  in.norms = f.ptr<float>("norms");
  in.magnitude = f.number("magnitude") != 0;
  in.processors = static_cast<int>(f.number("processors"));
  in.hopper = f.number("hopper") != 0;
  return in;
}

Selection selection_of(const Fields& f) {
  Selection s{};
  s.k = f.number("k");
  s.mask = f.ptr<uint8_t>("mask");
  s.limit = f.ptr<int32_t>("limit");
  s.fill = f.ptr<int32_t>("fill");
  s.rank = static_cast<int>(f.number("rank"));
  s.cap = static_cast<int>(f.number("cap"));
  s.bound = f.ptr<float>("bound");
  s.last = f.ptr<int32_t>("last");
  s.tally = f.ptr<int32_t>("tally");
  s.entries = f.ptr<Entry>("entries");
  s.failed = f.ptr<int32_t>("failed");
  s.list = f.ptr<int32_t>("list");
  s.repair = f.ptr<Entry>("repair");
  s.repair_count = f.ptr<int32_t>("repair_count");
  s.units = f.number("units");
  s.repair_cap = f.number("repair_cap");
  s.splits = f.number("splits");
  s.values = f.ptr<void>("values");
  s.indices = f.ptr<int32_t>("indices");
  return s;
}

Pool pool_of(const Fields& f) {
  return {f.ptr<Found>("found"), f.number("cap"), f.ptr<int64_t>("total"), f.ptr<int32_t>("count"), f.ptr<Entry>("entries")};
}

EncodeThresholdArgs threshold_of(const Fields& f) {
  return {input_of(f.part("in")), f.ptr<float>("threshold"), static_cast<float>(f.real("half_window")),
          pool_of(f.part("pool")), f.ptr<int32_t>("above")};
}

void topk(const py::dict& from, uintptr_t stream) {
  const Fields f{from};
  const EncodeTopkArgs args{input_of(f.part("in")), f.number("relu") != 0,       f.number("sampled"),
                            f.ptr<float>("scores"), selection_of(f.part("main")), selection_of(f.part("aux"))};
  const py::gil_scoped_release release;
  encode_topk(args, reinterpret_cast<void*>(stream));
}

void group_max(const py::dict& from, uintptr_t stream) {
  const Fields f{from};
  const GroupMaxArgs args{input_of(f.part("in")), f.number("k"),         f.number("relu") != 0,  f.ptr<Entry>("best"),
                          f.ptr<float>("pre"),    f.ptr<void>("values"), f.ptr<int32_t>("indices")};
  const py::gil_scoped_release release;
  encode_group_max(args, reinterpret_cast<void*>(stream));
}

void find_passing(const py::dict& from, uintptr_t stream) {
  const EncodeThresholdArgs args = threshold_of({from});
  const py::gil_scoped_release release;
  threshold_find(args, reinterpret_cast<void*>(stream));
}

void write_codes(const py::dict& from, uintptr_t stream) {
  const Fields f{from};
  const ThresholdWriteArgs args{threshold_of(f),       f.ptr<int64_t>("offsets"), f.ptr<int32_t>("again"), f.ptr<void>("values"),
                                f.ptr<int32_t>("indices"), f.ptr<uint8_t>("state"),   f.number("capacity")};
  const py::gil_scoped_release release;
  threshold_write(args, reinterpret_cast<void*>(stream));
}

void batch_topk(const py::dict& from, uintptr_t stream) {
  const Fields f{from};
  const EncodeBatchArgs args{input_of(f.part("in")),    f.number("k"),           f.number("relu") != 0,
                             f.number("sampled"),       f.number("rank"),        f.ptr<float>("scores"),
                             pool_of(f.part("pool")),   f.ptr<BatchState>("state"), f.ptr<int64_t>("bins"),
                             f.ptr<int32_t>("equal"),   f.ptr<int64_t>("offsets"), f.ptr<int64_t>("place"),
                             f.ptr<void>("values"),     f.ptr<int32_t>("indices")};
  const py::gil_scoped_release release;
  encode_batch_topk(args, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_encode(py::module_& m) {
  m.def("encode_topk", &topk);
  m.def("encode_group_max", &group_max);
  m.def("threshold_find", &find_passing);
  m.def("threshold_write", &write_codes);
  m.def("encode_batch_topk", &batch_topk);
  m.attr("BATCH_STATE_BYTES") = sizeof(BatchState);
  m.attr("BATCH_SMALLEST_AT") = offsetof(BatchState, smallest);
  m.attr("FOUND_BYTES") = sizeof(Found);
  m.def("hopper_plan", [](int64_t n, int64_t columns, int processors) {
    const HopperPlan plan = hopper_plan(n, columns, processors);
    return std::make_tuple(plan.cluster, plan.clusters);
  }, "blocks of a cluster and persistent clusters");
  m.def("portable_blocks", &portable_blocks);
}
