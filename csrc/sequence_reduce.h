// Entry points of sequence_reduce on each device. Buffers are dense and on that device; offsets hold
// sequences + 1 positions, from 0 upwards; weights is read by Reduce::Weighted alone and may be null
// otherwise.
#pragma once

#include <cstdint>

#include "core/ragged.h"
#include "core/sequence_reduce.h"

namespace prefcore {

namespace cpu {

// Runs on at most `threads` threads, whose number does not change any bit of the result.
template <typename T>
void sequence_reduce_forward(Reduce mode, const T* x, const T* weights, Ragged ragged, double gamma, T* out,
                             int threads);

template <typename T>
void sequence_reduce_backward(Reduce mode, const T* grad, const T* weights, Ragged ragged, double gamma,
                              T* out, int threads);

}  // namespace cpu

namespace cuda {

// `total` is the number of elements, `stream` a cudaStream_t of `device`. Throws std::runtime_error on a
// failed launch.
template <typename T>
void sequence_reduce_forward(Reduce mode, const T* x, const T* weights, Ragged ragged, double gamma, T* out,
                             std::int64_t total, int device, void* stream);

template <typename T>
void sequence_reduce_backward(Reduce mode, const T* grad, const T* weights, Ragged ragged, double gamma,
                              T* out, std::int64_t total, int device, void* stream);

}  // namespace cuda

}  // namespace prefcore
