#include "cpu/logprobs.h"

#include <algorithm>

namespace prefcore::cpu {
namespace {

struct Level {
  const char* name;
  const RowKernels* kernels;
};

#ifdef PREFCORE_X86_LEVELS
constexpr Level kLevels[] = {
    {"baseline", &baseline::kernels}, {"avx2", &avx2::kernels}, {"avx512", &avx512::kernels}};

int supported() {
  __builtin_cpu_init();
  // Whatever has AVX2 has F16C too, which older compilers cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 3 : avx2 ? 2 : 1;
}
#else
constexpr Level kLevels[] = {{"baseline", &baseline::kernels}};

int supported() { return 1; }
#endif

// A task is about this many elements: some tens of microseconds, far more than it costs to hand one out.
constexpr int64_t kTask = 1 << 15;

}  // namespace

int isa_count() {
  static const int count = supported();
  return count;
}

const char* isa_name(int level) { return kLevels[level].name; }

void run_rows(RowLoop RowKernels::* kernel, const LogitRows& rows, int level, int threads) {
  if (rows.rows == 0 || rows.cols == 0) return;
  const RowLoop loop = kLevels[level].kernels->*kernel;
  const int64_t step = std::max<int64_t>(1, kTask / rows.cols);
  const int64_t tasks = (rows.rows + step - 1) / step;
  threads = static_cast<int>(std::min<int64_t>(threads, tasks));
  if (threads <= 1) return loop(rows, 0, rows.rows);
  // Ignored rows cost next to nothing and come in runs, hence the dynamic schedule.
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t task = 0; task < tasks; ++task) {
    loop(rows, task * step, std::min(rows.rows, (task + 1) * step));
  }
}

}  // namespace prefcore::cpu
