#include "cpu/logprobs.h"

#include "cpu/share_rows.h"

namespace prefcore::cpu {
namespace {

constexpr const RowKernels* kLevels[] = {
    &baseline::kernels,
#ifdef PREFCORE_X86_LEVELS
    &avx2::kernels,
    &avx512::kernels,
#endif
};

}  // namespace

void run_rows(RowLoop RowKernels::* kernel, const LogitRows& rows, int level, int threads) {
  const RowLoop loop = kLevels[level]->*kernel;
  share_rows(rows.rows, rows.cols, threads, [&](int64_t begin, int64_t end) { loop(rows, begin, end); });
}

}  // namespace prefcore::cpu
