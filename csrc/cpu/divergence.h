// Row kernels over the tiles of two distributions on the CPU, what divergences are made of. What they compute
// is described in prefcore/ops/_pair_rows_cpu.py.
#pragma once

#include "cpu/rows.h"

namespace prefcore::cpu {

enum class Divergence : int { kKl = 0, kAlpha = 1, kJs = 2, kTv = 3 };

struct PairRows {
  LogitRows p, q;  // of one type, over the same rows and columns; without `out` where no gradient is wanted
  Divergence kind;
  double weight;
  void* cross;  // [3, rows] acc
  int64_t cross_stride;
};

using PairLoop = void (*)(const PairRows&, int64_t begin, int64_t end);

struct PairKernels {
  PairLoop stats, sums, grad;
};

// One instruction set each: the same text, compiled again.
namespace baseline {
extern const PairKernels pair_kernels;
}
#ifdef PREFCORE_X86_LEVELS
namespace avx2 {
extern const PairKernels pair_kernels;
}
namespace avx512 {
extern const PairKernels pair_kernels;
}
#endif

// Each row is one thread's work, so that results do not depend on the number of threads.
void run_pairs(PairLoop PairKernels::* kernel, const PairRows& rows, int level, int threads);

}  // namespace prefcore::cpu
