#include "cpu/divergence.h"

#include <pybind11/pybind11.h>

#include "bindings.h"

namespace py = pybind11;
using prefcore::cpu::Divergence;
using prefcore::cpu::LogitRows;
using prefcore::cpu::PairKernels;
using prefcore::cpu::PairRows;

namespace {

void run(prefcore::cpu::PairLoop PairKernels::* kernel, const PairRows& rows, int level, int threads) {
  check_isa(level);
  py::gil_scoped_release release;
  prefcore::cpu::run_pairs(kernel, rows, level, threads);
}

}  // namespace

void bind_divergence(py::module_& m) {
  py::enum_<Divergence>(m, "Divergence")
      .value("kl", Divergence::kKl)
      .value("alpha", Divergence::kAlpha)
      .value("js", Divergence::kJs)
      .value("tv", Divergence::kTv);
  m.def("divergence_stats", [](const LogitRows& p, const LogitRows& q, Divergence kind, double weight,
                               Address cross, int64_t cross_stride, int level, int threads) {
    run(&PairKernels::stats, {p, q, kind, weight, pointer<>(cross), cross_stride}, level, threads);
  });
  m.def("divergence_sums", [](const LogitRows& p, const LogitRows& q, Divergence kind, double weight,
                              Address cross, int64_t cross_stride, int level, int threads) {
    run(&PairKernels::sums, {p, q, kind, weight, pointer<>(cross), cross_stride}, level, threads);
  });
  m.def("divergence_grad", [](LogitRows p, LogitRows q, Divergence kind, double weight, Address p_coef,
                              int64_t p_stride, Address q_coef, int64_t q_stride, int level, int threads) {
    p.coef = pointer<>(p_coef), p.coef_stride = p_stride;
    q.coef = pointer<>(q_coef), q.coef_stride = q_stride;
    run(&PairKernels::grad, {p, q, kind, weight, nullptr, 0}, level, threads);
  });
}
