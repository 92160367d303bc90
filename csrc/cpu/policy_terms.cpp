#include "cpu/policy_terms.h"

#include <algorithm>

#include "cpu/share_rows.h"

namespace prefcore::cpu {
namespace {

constexpr void (*kLevels[])(const PolicyTokens&, int64_t, int64_t) = {
    baseline::policy_terms,
#ifdef PREFCORE_X86_LEVELS
    avx2::policy_terms,
    avx512::policy_terms,
#endif
};

}  // namespace

void run_policy_terms(const PolicyTokens& tokens, int level, int threads) {
  const int64_t blocks = (tokens.n + kPolicyBlock - 1) / kPolicyBlock;
  share_rows(blocks, kPolicyBlock, threads, [&](int64_t begin, int64_t end) {
    kLevels[level](tokens, begin * kPolicyBlock, std::min(tokens.n, end * kPolicyBlock));
  });
}

}  // namespace prefcore::cpu
