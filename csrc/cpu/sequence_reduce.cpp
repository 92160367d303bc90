// sequence_reduce on the CPU: sequences over threads, each one summed by a team of one worker.
#include "sequence_reduce.h"

#include "cpu/share_sequences.h"

namespace prefcore {
namespace cpu {
namespace {

using Solo = Team<1>;

template <Reduce Mode, typename T>
void forward(const T* x, const T* weights, Ragged ragged, double gamma, T* out, int threads) {
  const Solo::Discount powers = Solo::discount<Mode>(gamma, 0);
  share_sequences(ragged, kLanes, threads, [&](std::int64_t s, std::int64_t first, std::int64_t length) {
    double sum[kLanes];
    Solo::accumulate<Mode>(x + first, Mode == Reduce::Weighted ? weights + first : nullptr, length, powers, 0,
                           sum);
    out[s] = finish<Mode, T>(Solo::join(sum), length);
  });
}

template <Reduce Mode, typename T>
void backward(const T* grad, const T* weights, Ragged ragged, double gamma, T* out, int threads) {
  const Solo::Discount powers = Solo::discount<Mode>(gamma, 0);
  share_sequences(ragged, kLanes, threads, [&](std::int64_t s, std::int64_t first, std::int64_t length) {
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
