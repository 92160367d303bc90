// sequence_reduce on the CPU: sequences over threads, each one summed by a team of one worker.
#include "sequence_reduce.h"

#include <algorithm>

namespace prefcore {
namespace cpu {
namespace {

using Solo = Team<1>;

// Additions, about 0.1 ms of one core's time, from which on waking a second one pays.
constexpr std::int64_t kParallel = 1 << 19;

template <typename Body>
void for_each_sequence(Ragged ragged, int threads, const Body& body) {
  if (ragged.sequences == 0) return;
  // Elements, and for each sequence the join of its lanes.
  const std::int64_t work = ragged.offsets[ragged.sequences] + kLanes * ragged.sequences;
  // Lengths vary, so threads take short runs of sequences as they become free, or single ones of a few.
  const std::int64_t run = std::min<std::int64_t>(16, 1 + ragged.sequences / (4 * threads));
#pragma omp parallel for schedule(dynamic, run) num_threads(threads) if (threads > 1 && work >= kParallel)
  for (std::int64_t s = 0; s < ragged.sequences; ++s) {
    body(s, static_cast<std::int64_t>(ragged.offsets[s]),
         static_cast<std::int64_t>(ragged.offsets[s + 1]) - ragged.offsets[s]);
  }
}

template <Reduce Mode, typename T>
void forward(const T* x, const T* weights, Ragged ragged, double gamma, T* out, int threads) {
  const Solo::Discount powers = Solo::discount<Mode>(gamma, 0);
  for_each_sequence(ragged, threads, [&](std::int64_t s, std::int64_t first, std::int64_t length) {
    double sum[kLanes];
    Solo::accumulate<Mode>(x + first, Mode == Reduce::Weighted ? weights + first : nullptr, length, powers, 0,
                           sum);
    out[s] = finish<Mode, T>(Solo::join(sum), length);
  });
}

template <Reduce Mode, typename T>
void backward(const T* grad, const T* weights, Ragged ragged, double gamma, T* out, int threads) {
  const Solo::Discount powers = Solo::discount<Mode>(gamma, 0);
  for_each_sequence(ragged, threads, [&](std::int64_t s, std::int64_t first, std::int64_t length) {
    Solo::spread<Mode>(static_cast<double>(grad[s]), Mode == Reduce::Weighted ? weights + first : nullptr,
                       length, powers, 0, out + first);
  });
}

}  // namespace

template <typename T>
void sequence_reduce_forward(Reduce mode, const T* x, const T* weights, Ragged ragged, double gamma, T* out,
                             int threads) {
  switch (mode) {
    case Reduce::Sum:
      return forward<Reduce::Sum>(x, weights, ragged, gamma, out, threads);
    case Reduce::Mean:
      return forward<Reduce::Mean>(x, weights, ragged, gamma, out, threads);
    case Reduce::Discounted:
      return forward<Reduce::Discounted>(x, weights, ragged, gamma, out, threads);
    case Reduce::Weighted:
      return forward<Reduce::Weighted>(x, weights, ragged, gamma, out, threads);
  }
}

template <typename T>
void sequence_reduce_backward(Reduce mode, const T* grad, const T* weights, Ragged ragged, double gamma,
                              T* out, int threads) {
  switch (mode) {
    case Reduce::Sum:
      return backward<Reduce::Sum>(grad, weights, ragged, gamma, out, threads);
    case Reduce::Mean:
      return backward<Reduce::Mean>(grad, weights, ragged, gamma, out, threads);
    case Reduce::Discounted:
      return backward<Reduce::Discounted>(grad, weights, ragged, gamma, out, threads);
    case Reduce::Weighted:
      return backward<Reduce::Weighted>(grad, weights, ragged, gamma, out, threads);
  }
}

#define PREFCORE_INSTANTIATE(T)                                                                  \
  template void sequence_reduce_forward<T>(Reduce, const T*, const T*, Ragged, double, T*, int); \
  template void sequence_reduce_backward<T>(Reduce, const T*, const T*, Ragged, double, T*, int);
PREFCORE_INSTANTIATE(float)
PREFCORE_INSTANTIATE(double)
#undef PREFCORE_INSTANTIATE

}  // namespace cpu
}  // namespace prefcore
