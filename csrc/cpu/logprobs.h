// Row kernels over tiles of raw logits on the CPU. What they compute is described in
// prefcore/ops/_rows_cpu.py; here it is raw memory, instruction sets, threads.
#pragma once

#include "cpu/rows.h"

namespace prefcore::cpu {

using RowLoop = void (*)(const LogitRows&, int64_t begin, int64_t end);

struct RowKernels {
  RowLoop stats, weigh, grad, stats_grad;
};

// One instruction set each: the same text, compiled again.
namespace baseline {
extern const RowKernels kernels;
}
#ifdef PREFCORE_X86_LEVELS
namespace avx2 {
extern const RowKernels kernels;
}
namespace avx512 {
extern const RowKernels kernels;
}
#endif

// Each row is one thread's work, so that results do not depend on the number of threads.
void run_rows(RowLoop RowKernels::* kernel, const LogitRows& rows, int level, int threads);

}  // namespace prefcore::cpu
