// sequence_reduce on the GPU: a warp per sequence, or a block where sequences are long. The result does not
// depend on the choice: both add in the order of core/sequence_reduce.h.
#include <algorithm>
#include <climits>

#include "cuda/launch.h"
#include "sequence_reduce.h"

namespace prefcore {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kBlock = 256;
static_assert(kBlock == kLanes, "the block's team has one lane a thread");

// Mean length from which a block serves a sequence: a warp's loop is then longer than the block's join.
constexpr std::int64_t kLong = 4096;

// Joins one lane a thread over the team, by core's tree; the result is valid in worker 0.
template <int Threads>
__device__ __forceinline__ double join_team(double value, int worker) {
  if constexpr (Threads > kWarp) {
    __shared__ double lanes[Threads];
    __syncthreads();  // the previous sequence's reads are over
    lanes[worker] = value;
    __syncthreads();
    for (int half = Threads / 2; half >= kWarp; half /= 2) {
      if (worker < half) lanes[worker] += lanes[worker + half];
      __syncthreads();
    }
    value = lanes[worker % kWarp];
  }
  for (int half = kWarp / 2; half > 0; half /= 2) value += __shfl_down_sync(0xffffffffu, value, half);
  return value;
}

template <Reduce Mode, int Threads, typename T>
__global__ void __launch_bounds__(kBlock)
    forward_kernel(const T* __restrict__ x, const T* __restrict__ weights, Ragged ragged, double gamma,
                   T* __restrict__ out) {
  const int worker = threadIdx.x % Threads;
  constexpr std::int64_t teams = kBlock / Threads;
  const auto powers = Team<Threads>::template discount<Mode>(gamma, worker);
  // The loop's bounds are equal across a team, so that all of it reaches the join.
  for (std::int64_t s = blockIdx.x * teams + threadIdx.x / Threads; s < ragged.sequences;
       s += gridDim.x * teams) {
    const std::int64_t first = ragged.offsets[s];
    const std::int64_t length = ragged.offsets[s + 1] - first;
    double sum[Team<Threads>::kHeld];
    Team<Threads>::template accumulate<Mode>(x + first, Mode == Reduce::Weighted ? weights + first : nullptr,
                                             length, powers, worker, sum);
    const double total = join_team<Threads>(Team<Threads>::join(sum), worker);
    if (worker == 0) out[s] = finish<Mode, T>(total, length);
  }
}

template <Reduce Mode, int Threads, typename T>
__global__ void __launch_bounds__(kBlock)
    backward_kernel(const T* __restrict__ grad, const T* __restrict__ weights, Ragged ragged, double gamma,
                    T* __restrict__ out) {
  const int worker = threadIdx.x % Threads;
  constexpr std::int64_t teams = kBlock / Threads;
  const auto powers = Team<Threads>::template discount<Mode>(gamma, worker);
  for (std::int64_t s = blockIdx.x * teams + threadIdx.x / Threads; s < ragged.sequences;
       s += gridDim.x * teams) {
    const std::int64_t first = ragged.offsets[s];
    const std::int64_t length = ragged.offsets[s + 1] - first;
    Team<Threads>::template spread<Mode>(static_cast<double>(grad[s]),
                                         Mode == Reduce::Weighted ? weights + first : nullptr, length, powers,
                                         worker, out + first);
  }
}

template <typename T>
using Kernel = void (*)(const T*, const T*, Ragged, double, T*);

template <bool Forward, int Threads, typename T>
Kernel<T> pick(Reduce mode) {
  switch (mode) {
    case Reduce::Mean:
      return Forward ? forward_kernel<Reduce::Mean, Threads, T> : backward_kernel<Reduce::Mean, Threads, T>;
    case Reduce::Discounted:
      return Forward ? forward_kernel<Reduce::Discounted, Threads, T>
                     : backward_kernel<Reduce::Discounted, Threads, T>;
    case Reduce::Weighted:
      return Forward ? forward_kernel<Reduce::Weighted, Threads, T>
                     : backward_kernel<Reduce::Weighted, Threads, T>;
    default:
      return Forward ? forward_kernel<Reduce::Sum, Threads, T> : backward_kernel<Reduce::Sum, Threads, T>;
  }
}

template <bool Forward, typename T>
void launch(Reduce mode, const T* in, const T* weights, Ragged ragged, double gamma, T* out,
            std::int64_t total, int device, void* stream) {
  if (ragged.sequences == 0) return;
  const DeviceGuard guard(device);
  const bool lengthy = total / ragged.sequences >= kLong;
  const std::int64_t teams = lengthy ? 1 : kBlock / kWarp;
  const std::int64_t blocks = std::min<std::int64_t>((ragged.sequences + teams - 1) / teams, INT_MAX);
  const Kernel<T> kernel = lengthy ? pick<Forward, kBlock, T>(mode) : pick<Forward, kWarp, T>(mode);
  kernel<<<static_cast<unsigned>(blocks), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(in, weights, ragged,
                                                                                          gamma, out);
  check(cudaGetLastError(), Forward ? "sequence_reduce forward" : "sequence_reduce backward");
}

}  // namespace

template <typename T>
void sequence_reduce_forward(Reduce mode, const T* x, const T* weights, Ragged ragged, double gamma, T* out,
                             std::int64_t total, int device, void* stream) {
  launch<true>(mode, x, weights, ragged, gamma, out, total, device, stream);
}

template <typename T>
void sequence_reduce_backward(Reduce mode, const T* grad, const T* weights, Ragged ragged, double gamma,
                              T* out, std::int64_t total, int device, void* stream) {
  launch<false>(mode, grad, weights, ragged, gamma, out, total, device, stream);
}

#define PREFCORE_INSTANTIATE(T)                                                                           \
  template void sequence_reduce_forward<T>(Reduce, const T*, const T*, Ragged, double, T*, std::int64_t,  \
                                           int, void*);                                                   \
  template void sequence_reduce_backward<T>(Reduce, const T*, const T*, Ragged, double, T*, std::int64_t, \
                                            int, void*);
PREFCORE_INSTANTIATE(float)
PREFCORE_INSTANTIATE(double)
#undef PREFCORE_INSTANTIATE

}  // namespace cuda
}  // namespace prefcore
