// token_rewards on the GPU: a thread has a few tokens, wherever sequences begin, and finds what belongs to
// them.
#include "cuda/launch.h"
#include "token_rewards.h"

namespace prefcore {
namespace cuda {
namespace {

constexpr int kBlock = 256;

// A thread's tokens, those of a block's threads side by side: see rewards::add_stream.
struct Run {
  static constexpr int kHeld = 4;
  std::int64_t first;
  std::int64_t total;

  __device__ __forceinline__ static constexpr int count() { return kHeld; }
  __device__ __forceinline__ std::int64_t at(int j) const { return first + j * kBlock; }
  __device__ __forceinline__ bool has(int j) const { return at(j) < total; }
};

constexpr std::int64_t kTile = kBlock * Run::kHeld;

// What only some tokens get: the scores of segments that end there, and the terminal reward. Sequence s is
// one of [low, high], to which the tile's tokens belong.
template <typename T>
__device__ __forceinline__ double sparse(const TokenRewards<T>& call, std::int64_t low, std::int64_t high,
                                         std::int64_t t) {
  // The last sequence that begins at or before t is not empty.
  const std::int64_t s = rewards::lower_bound(call.ragged.offsets, low, high + 1, t + 1) - 1;
  const std::int64_t start = call.ragged.offsets[s];
  const std::int64_t length = call.ragged.offsets[s + 1] - start;
  const bool* mask = call.mask == nullptr ? nullptr : call.mask + start;
  const std::int64_t own = t - start;
  double sum = 0.0;
  for (int k = 0; k < call.segment_count; ++k) {
    const rewards::Segments<T>& set = call.segments[k];
    const std::int64_t end = set.offsets[s + 1];
    std::int64_t j = rewards::lower_bound(set.ends, set.offsets[s], end, own);
    for (; j < end && rewards::place(set.ends[j], mask, length, call.moves) == own; ++j) sum += set.at(j);
  }
  if (call.terminal != nullptr && rewards::is_last(mask, own, length)) {
    sum += rewards::clip(static_cast<double>(call.terminal[s]), -call.terminal_most, call.terminal_most);
  }
  return sum;
}

template <typename T>
__global__ void __launch_bounds__(kBlock, 1) token_rewards_kernel(const TokenRewards<T> call) {
  const std::int64_t begin = blockIdx.x * kTile;
  const Run run{begin + threadIdx.x, call.total};
  double sums[Run::kHeld] = {};
  bool kept[Run::kHeld];
#pragma unroll
  for (int j = 0; j < Run::kHeld; ++j) kept[j] = run.has(j) && rewards::counts(call.mask, run.at(j));
  if (call.segment_count > 0 || call.terminal != nullptr) {
    // Offsets that wrongly end below the number of tokens still lead to a sequence.
    const std::int64_t end = begin + kTile < call.total ? begin + kTile : call.total;
    const std::int64_t low =
        rewards::lower_bound(call.ragged.offsets, 1, call.ragged.sequences, begin + 1) - 1;
    const std::int64_t high =
        rewards::lower_bound(call.ragged.offsets, low + 1, call.ragged.sequences, end) - 1;
#pragma unroll
    for (int j = 0; j < Run::kHeld; ++j) {
      if (kept[j]) sums[j] = sparse(call, low, high, run.at(j));
    }
  }
  rewards::add_dense(call.streams, call.stream_count, call.penalty, run, sums);
#pragma unroll
  for (int j = 0; j < Run::kHeld; ++j) {
    const double reward = rewards::clip(sums[j], call.low, call.high);
    if (run.has(j)) call.out[run.at(j)] = kept[j] ? static_cast<T>(reward) : T(0);
  }
}

}  // namespace

template <typename T>
void run_token_rewards(const TokenRewards<T>& call, int device, void* stream) {
  if (call.total == 0) return;
  const DeviceGuard guard(device);
  const auto blocks = static_cast<unsigned>((call.total + kTile - 1) / kTile);
  token_rewards_kernel<T><<<blocks, kBlock, 0, static_cast<cudaStream_t>(stream)>>>(call);
  check(cudaGetLastError(), "token_rewards");
}

template void run_token_rewards<float>(const TokenRewards<float>&, int, void*);
template void run_token_rewards<double>(const TokenRewards<double>&, int, void*);

}  // namespace cuda
}  // namespace prefcore
