#include "gather_rows.h"

#include <pybind11/pybind11.h>

#include <cstdint>

#include "bindings.h"

namespace py = pybind11;

namespace prefcore {
namespace {

Gather make_gather(Address x, std::int64_t stride, std::int64_t rows, Address index, std::int64_t places,
                   std::int64_t bytes, Address out) {
  return {pointer<>(x), stride, rows, pointer<const std::int32_t>(index), places, bytes, pointer<>(out)};
}

GatherGrad make_gather_grad(int type, Address grad, std::int64_t stride, Address offsets, Address places,
                            std::int64_t rows, std::int64_t columns, Address out) {
  const RowInverse inverse{pointer<const std::int32_t>(offsets), pointer<const std::int32_t>(places)};
  return {static_cast<Type>(type), pointer<>(grad), stride, inverse, rows, columns, pointer<>(out)};
}

}  // namespace
}  // namespace prefcore

void bind_gather_rows(py::module_& m) {
  using prefcore::Gather;
  using prefcore::GatherGrad;
  const py::call_guard<py::gil_scoped_release> no_gil;
  py::class_<Gather>(m, "Gather").def(py::init(&prefcore::make_gather));
  py::class_<GatherGrad>(m, "GatherGrad").def(py::init(&prefcore::make_gather_grad));
  m.def("gather_rows_forward_cpu", &prefcore::cpu::gather_rows_forward, no_gil);
  m.def("gather_rows_backward_cpu", &prefcore::cpu::gather_rows_backward, no_gil);
#ifdef PREFCORE_CUDA
  m.def(
      "gather_rows_forward_cuda",
      [](const Gather& gather, int device, Address stream) {
        prefcore::cuda::gather_rows_forward(gather, device, pointer<>(stream));
      },
      no_gil);
  m.def(
      "gather_rows_backward_cuda",
      [](const GatherGrad& gather, int device, Address stream) {
        prefcore::cuda::gather_rows_backward(gather, device, pointer<>(stream));
      },
      no_gil);
#endif
}
