// gae on the CPU: sequences over threads, each one scanned by one worker.
#include "gae.h"

#include <algorithm>

#include "cpu/share_sequences.h"

namespace prefcore {
namespace cpu {
namespace {

using Lanes = gae::Alone;

template <bool Whole, bool Masked, typename T>
gae::Affine run_row(const gae::Tokens<T>& tokens, const gae::Decay<Lanes>& decay, std::int32_t first,
                    double behind, T* advantages, T* returns) {
  gae::Row<Masked, Lanes, T> row;
  row.template load<Whole>(tokens, first);
  row.scan(decay);
  const gae::Affine whole = row.whole(decay);
  row.template finish<Whole>(decay, behind, first, advantages, returns);
  return whole;
}

template <bool Masked, typename T>
void run(const GaeCall<T>& call, int threads) {
  const gae::Decay<Lanes> decay(call.gamma, call.lam);
  share_sequences(call.ragged, 0, threads, [&](std::int64_t s, std::int64_t start, std::int64_t length) {
    const gae::Tokens<T> tokens{call.rewards + start, call.values == nullptr ? nullptr : call.values + start,
                                Masked ? call.mask + start : nullptr};
    T* advantages = call.advantages + start;
    T* returns = call.returns + start;
    double behind = call.bootstrap == nullptr ? 0.0 : static_cast<double>(call.bootstrap[s]);
    for (auto first = static_cast<std::int32_t>(length); first > 0;) {
      gae::Affine tile = gae::identity();
      for (int row = 0; row < gae::kRows && first > 0; ++row) {
        first -= gae::kRow;
        const auto body = first >= 0 ? run_row<true, Masked, T> : run_row<false, Masked, T>;
        tile = gae::compose(body(tokens, decay, first, tile(behind), advantages, returns), tile);
      }
      behind = tile(behind);
    }
  });
}

}  // namespace

template <typename T>
void run_gae(const GaeCall<T>& call, int threads) {
  call.mask == nullptr ? run<false>(call, threads) : run<true>(call, threads);
}

template void run_gae<float>(const GaeCall<float>&, int);
template void run_gae<double>(const GaeCall<double>&, int);

}  // namespace cpu
}  // namespace prefcore
