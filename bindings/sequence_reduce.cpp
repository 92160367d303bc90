#include "sequence_reduce.h"

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"

namespace py = pybind11;

namespace prefcore {
namespace {

template <bool Forward>
void run_cpu(int itemsize, int mode, std::uintptr_t in, std::uintptr_t weights, std::uintptr_t offsets,
             std::int64_t sequences, double gamma, std::uintptr_t out, int threads) {
  const Ragged ragged{pointer<const std::int32_t>(offsets), sequences};
  with_float_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const auto run = Forward ? cpu::sequence_reduce_forward<T> : cpu::sequence_reduce_backward<T>;
    run(static_cast<Reduce>(mode), pointer<const T>(in), pointer<const T>(weights), ragged, gamma,
        pointer<T>(out), threads);
  });
}

#ifdef PREFCORE_CUDA
template <bool Forward>
void run_cuda(int itemsize, int mode, std::uintptr_t in, std::uintptr_t weights, std::uintptr_t offsets,
              std::int64_t sequences, double gamma, std::uintptr_t out, std::int64_t total, int device,
              std::uintptr_t stream) {
  const Ragged ragged{pointer<const std::int32_t>(offsets), sequences};
  with_float_type(itemsize, [&](auto type) {
    using T = decltype(type);
    const auto run = Forward ? cuda::sequence_reduce_forward<T> : cuda::sequence_reduce_backward<T>;
    run(static_cast<Reduce>(mode), pointer<const T>(in), pointer<const T>(weights), ragged, gamma,
        pointer<T>(out), total, device, pointer<void>(stream));
  });
}
#endif

}  // namespace
}  // namespace prefcore

void bind_sequence_reduce(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  // Arguments: itemsize, mode, x (backward: gradient), weights or 0, offsets, sequences, gamma, out, then the
  // device's.
  m.def("sequence_reduce_forward_cpu", &prefcore::run_cpu<true>, no_gil);
  m.def("sequence_reduce_backward_cpu", &prefcore::run_cpu<false>, no_gil);
#ifdef PREFCORE_CUDA
  m.def("sequence_reduce_forward_cuda", &prefcore::run_cuda<true>, no_gil);
  m.def("sequence_reduce_backward_cuda", &prefcore::run_cuda<false>, no_gil);
#endif
}
