// Entry points of token_rewards on each device. Buffers are dense and on that device; terminal and mask may
// be null.
#pragma once

#include <cstdint>

#include "core/ragged.h"
#include "core/token_rewards.h"

namespace prefcore {

template <typename T>
struct TokenRewards {
  Ragged ragged;
  std::int64_t total;  // tokens
  const bool* mask;
  const T* terminal;  // one a sequence
  double terminal_most;
  rewards::Stream<T> streams[rewards::kMost];
  int stream_count;
  rewards::Segments<T> segments[rewards::kMost];
  int segment_count;
  bool moves;
  rewards::Penalty<T> penalty;
  double low;
  double high;
  T* out;
};

namespace cpu {

// Runs on at most `threads` threads, whose number does not change any bit of the result.
template <typename T>
void run_token_rewards(const TokenRewards<T>& call, int threads);

}  // namespace cpu

namespace cuda {

// `stream` is a cudaStream_t of `device`. Throws std::runtime_error on a failed launch.
template <typename T>
void run_token_rewards(const TokenRewards<T>& call, int device, void* stream);

}  // namespace cuda

}  // namespace prefcore
