#include "cpu/logprobs.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "bindings.h"

namespace py = pybind11;
using prefcore::Type;
using prefcore::cpu::LogitRows;
using prefcore::cpu::RowKernels;

namespace {

LogitRows make_rows(Address tile, int64_t tile_stride, int type, Address out, int64_t out_stride,
                    int out_type, int64_t rows, int64_t cols, int64_t col0, Address targets,
                    Address temperatures, Address bias, Address state, int64_t state_stride, int64_t vocab,
                    int64_t ignore_index, double logit_scale, double temperature, double softcap,
                    int round_to, bool entropy, bool mean, bool squares, bool top1) {
  return {pointer<>(tile),
          tile_stride,
          static_cast<Type>(type),
          pointer<>(out),
          out_stride,
          static_cast<Type>(out_type),
          rows,
          cols,
          col0,
          pointer<int64_t>(targets),
          pointer<>(temperatures),
          pointer<>(bias),
          pointer<>(state),
          state_stride,
          vocab,
          ignore_index,
          logit_scale,
          temperature,
          softcap,
          static_cast<Type>(round_to),
          entropy,
          mean,
          squares,
          top1};
}

std::vector<std::string> isa_names() {
  std::vector<std::string> names;
  for (int level = 0; level < prefcore::cpu::isa_count(); ++level)
    names.push_back(prefcore::cpu::isa_name(level));
  return names;
}

void run(prefcore::cpu::RowLoop RowKernels::* kernel, const LogitRows& rows, int level, int threads) {
  check_isa(level);
  py::gil_scoped_release release;
  prefcore::cpu::run_rows(kernel, rows, level, threads);
}

// Ask for huge pages in the whole ones of [address, address + bytes).
void advise_huge(Address address, size_t bytes) {
#ifdef __linux__
  constexpr Address kHuge = Address{1} << 21;
  const Address begin = (address + kHuge - 1) & ~(kHuge - 1), end = (address + bytes) & ~(kHuge - 1);
  if (end > begin) madvise(pointer<>(begin), end - begin, MADV_HUGEPAGE);  // advice: a refusal is no error
#else
  (void)address, (void)bytes;
#endif
}

}  // namespace

void check_isa(int level) {
  if (level < 0 || level >= prefcore::cpu::isa_count()) throw py::value_error("no such instruction set here");
}

void bind_logprobs(py::module_& m) {
  py::class_<LogitRows>(m, "LogitRows").def(py::init(&make_rows));
  m.def("cpu_isa_names", &isa_names, "Instruction sets that the row kernels can use here, slowest first.");
  m.def("logprobs_stats",
        [](const LogitRows& rows, int level, int threads) { run(&RowKernels::stats, rows, level, threads); });
  m.def("logprobs_weigh",
        [](LogitRows rows, Address acc, int64_t acc_cols, int64_t acc_stride, int level, int threads) {
          rows.acc = pointer<>(acc), rows.acc_cols = acc_cols, rows.acc_stride = acc_stride;
          run(&RowKernels::weigh, rows, level, threads);
        });
  m.def("logprobs_grad",
        [](LogitRows rows, Address entropies, Address coef, int64_t coef_stride, int level, int threads) {
          rows.entropies = pointer<>(entropies), rows.coef = pointer<>(coef), rows.coef_stride = coef_stride;
          run(&RowKernels::grad, rows, level, threads);
        });
  m.def("logprobs_stats_grad", [](const LogitRows& rows, int level, int threads) {
    run(&RowKernels::stats_grad, rows, level, threads);
  });
  m.def("advise_huge", &advise_huge);
}
