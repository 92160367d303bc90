#include "cpu/divergence.h"

#include "cpu/share_rows.h"

namespace prefcore::cpu {
namespace {

constexpr const PairKernels* kLevels[] = {
    &baseline::pair_kernels,
#ifdef PREFCORE_X86_LEVELS
    &avx2::pair_kernels,
    &avx512::pair_kernels,
#endif
};

}  // namespace

void run_pairs(PairLoop PairKernels::* kernel, const PairRows& rows, int level, int threads) {
  const PairLoop loop = kLevels[level]->*kernel;
  share_rows(rows.p.rows, rows.p.cols, threads, [&](int64_t begin, int64_t end) { loop(rows, begin, end); });
}

}  // namespace prefcore::cpu
