#include "gae.h"

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"

namespace py = pybind11;

namespace prefcore {
namespace {

template <typename T>
GaeCall<T> call(Address rewards, Address values, Address mask, Address bootstrap, Address offsets,
                std::int64_t sequences, double gamma, double lam, Address advantages, Address returns) {
  return {pointer<const T>(rewards),
          pointer<const T>(values),
          pointer<const bool>(mask),
          pointer<const T>(bootstrap),
          {pointer<const std::int32_t>(offsets), sequences},
          gamma,
          lam,
          pointer<T>(advantages),
          pointer<T>(returns)};
}

void run_cpu(int itemsize, Address rewards, Address values, Address mask, Address bootstrap, Address offsets,
             std::int64_t sequences, double gamma, double lam, Address advantages, Address returns,
             int threads) {
  with_float_type(itemsize, [&](auto type) {
    cpu::run_gae(call<decltype(type)>(rewards, values, mask, bootstrap, offsets, sequences, gamma, lam,
                                      advantages, returns),
                 threads);
  });
}

#ifdef PREFCORE_CUDA
void run_cuda(int itemsize, Address rewards, Address values, Address mask, Address bootstrap, Address offsets,
              std::int64_t sequences, double gamma, double lam, Address advantages, Address returns,
              std::int64_t total, int device, Address stream) {
  with_float_type(itemsize, [&](auto type) {
    cuda::run_gae(call<decltype(type)>(rewards, values, mask, bootstrap, offsets, sequences, gamma, lam,
                                       advantages, returns),
                  total, device, pointer<void>(stream));
  });
}
#endif

}  // namespace
}  // namespace prefcore

void bind_gae(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  // Arguments: itemsize, rewards, values or 0, mask or 0, bootstrap or 0, offsets, sequences, gamma, lam,
  // advantages, returns, then the device's.
  m.def("gae_cpu", &prefcore::run_cpu, no_gil);
#ifdef PREFCORE_CUDA
  m.def("gae_cuda", &prefcore::run_cuda, no_gil);
#endif
}
