// Token losses of policy gradients and their derivatives on the CPU. What they compute is described in
// prefcore/ops/policy_terms.py; here it is raw memory, instruction sets, threads.
#pragma once

#include <stdint.h>

#include "core/number.h"

namespace prefcore::cpu {

// In the order of FORMS and KLS in prefcore/_types.py.
enum class Form : int { kNone, kReinforce, kClip, kCispo, kSapo, kLogClip, kValue };
enum class Kl : int { kNone, kK1, kK2, kK3, kK1Straight, kK3Straight, kK3Corrected, kExact };

// Sums of a block, in the order of PolicyStats; the number of tokens is the caller's to know.
constexpr int kPolicySums = 8;
// Tokens whose sums are one number, added in one order whatever the number of threads.
constexpr int64_t kPolicyBlock = 1 << 13;

// Arrays of n float32 or float64, all of one type; null pointers are absent inputs.
struct PolicyTokens {
  Type type;
  int64_t n;
  Form form;
  Kl kl;
  const void *logps, *old_logps, *advantages, *log_ratio, *weights, *ref_logps, *kl_values, *kl_coefs,
      *entropy;
  double low, high, dual, kl_coef, entropy_coef, clamp;
  void* losses;
  void* slopes;  // derivatives of the losses by logps; null: not wanted
  double* sums;  // [blocks, kPolicySums]
};

// One instruction set each: the same text, compiled again. A range begins and ends with a block, or at n.
namespace baseline {
void policy_terms(const PolicyTokens& t, int64_t begin, int64_t end);
}
#ifdef PREFCORE_X86_LEVELS
namespace avx2 {
void policy_terms(const PolicyTokens& t, int64_t begin, int64_t end);
}
namespace avx512 {
void policy_terms(const PolicyTokens& t, int64_t begin, int64_t end);
}
#endif

void run_policy_terms(const PolicyTokens& tokens, int level, int threads);

}  // namespace prefcore::cpu
