// Entry points of gae on each device. Buffers are dense and on that device; values, mask and bootstrap may be
// null.
#pragma once

#include <cstdint>

#include "core/gae.h"
#include "core/ragged.h"

namespace prefcore {

template <typename T>
struct GaeCall {
  const T* rewards;
  const T* values;
  const bool* mask;
  const T* bootstrap;  // one a sequence
  Ragged ragged;
  double gamma;
  double lam;
  T* advantages;
  T* returns;
};

namespace cpu {

// Runs on at most `threads` threads, whose number does not change any bit of the result.
template <typename T>
void run_gae(const GaeCall<T>& call, int threads);

}  // namespace cpu

namespace cuda {

// `total` is the number of tokens, `stream` a cudaStream_t of `device`. Throws std::runtime_error on a failed
// launch.
template <typename T>
void run_gae(const GaeCall<T>& call, std::int64_t total, int device, void* stream);

}  // namespace cuda

}  // namespace prefcore
