// token_rewards on the CPU: sequences over threads, runs of tokens whose sums stay in cache.
#include "token_rewards.h"

#include <algorithm>
#include <vector>

#include "cpu/share_sequences.h"

namespace prefcore {
namespace cpu {
namespace {

// Tokens one after another: see rewards::add_stream.
struct Run {
  static constexpr int kHeld = 256;
  std::int64_t first;
  int held;

  int count() const { return held; }
  std::int64_t at(int j) const { return first + j; }
  static constexpr bool has(int) { return true; }
};

// Scores of all sets at their places among the sequence's tokens.
template <typename T>
void add_segments(const TokenRewards<T>& call, std::int64_t s, const bool* mask, std::int64_t length,
                  double* sums) {
  for (int k = 0; k < call.segment_count; ++k) {
    const rewards::Segments<T>& set = call.segments[k];
    for (std::int64_t j = set.offsets[s]; j < set.offsets[s + 1]; ++j) {
      const std::int64_t t = rewards::place(set.ends[j], mask, length, call.moves);
      if (t >= 0) sums[t] += set.at(j);
    }
  }
}

template <typename T>
void run_tokens(const TokenRewards<T>& call, const Run& run, double (&sums)[Run::kHeld]) {
  rewards::add_dense(call.streams, call.stream_count, call.penalty, run, sums);
  for (int j = 0; j < run.count(); ++j) sums[j] = rewards::clip(sums[j], call.low, call.high);
  T* out = call.out + run.first;
  if (call.mask == nullptr) {
    for (int j = 0; j < run.count(); ++j) out[j] = static_cast<T>(sums[j]);
    return;
  }
  const bool* mask = call.mask + run.first;
  for (int j = 0; j < run.count(); ++j) out[j] = mask[j] ? static_cast<T>(sums[j]) : T(0);
}

template <typename T>
void run_sequence(const TokenRewards<T>& call, std::int64_t s, std::int64_t start, std::int64_t length) {
  const bool* mask = call.mask == nullptr ? nullptr : call.mask + start;
  std::vector<double> scores(call.segment_count > 0 ? static_cast<std::size_t>(length) : 0);
  add_segments(call, s, mask, length, scores.data());
  const std::int64_t last = call.terminal == nullptr ? -1 : rewards::place(length, mask, length, true);
  for (std::int64_t first = 0; first < length; first += Run::kHeld) {
    const std::int64_t end = std::min<std::int64_t>(first + Run::kHeld, length);
    double sums[Run::kHeld] = {};
    if (!scores.empty()) std::copy(scores.begin() + first, scores.begin() + end, sums);
    if (first <= last && last < end) {
      const double reward = static_cast<double>(call.terminal[s]);
      sums[last - first] += rewards::clip(reward, -call.terminal_most, call.terminal_most);
    }
    run_tokens(call, {start + first, static_cast<int>(end - first)}, sums);
  }
}

}  // namespace

template <typename T>
void run_token_rewards(const TokenRewards<T>& call, int threads) {
  // A sequence's last run of tokens is as dear as half a whole one.
  share_sequences(
      call.ragged, Run::kHeld / 2, threads,
      [&](std::int64_t s, std::int64_t start, std::int64_t length) { run_sequence(call, s, start, length); });
}

template void run_token_rewards<float>(const TokenRewards<float>&, int);
template void run_token_rewards<double>(const TokenRewards<double>&, int);

}  // namespace cpu
}  // namespace prefcore
