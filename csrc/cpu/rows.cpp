#include "cpu/rows.h"

namespace prefcore::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512"};

int supported() {
#ifdef PREFCORE_X86_LEVELS
  __builtin_cpu_init();
  // Whatever has AVX2 has F16C too, which older compilers cannot ask for.
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  return avx512 ? 3 : avx2 ? 2 : 1;
#else
  return 1;
#endif
}

}  // namespace

int isa_count() {
  static const int count = supported();
  return count;
}

const char* isa_name(int level) { return kNames[level]; }

}  // namespace prefcore::cpu
