#include "token_rewards.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <tuple>
#include <vector>

#include "bindings.h"

namespace py = pybind11;

namespace prefcore {
namespace {

using Streams = std::vector<std::tuple<Address, Address, double, double>>;
using Sets = std::vector<std::tuple<Address, Address, Address, double>>;
using Kl = std::tuple<int, Address, Address, double, Address, Address, std::int64_t, double>;

template <typename T>
TokenRewards<T> call(Address offsets, std::int64_t sequences, std::int64_t total, Address mask,
                     Address terminal, double terminal_most, const Streams& streams, const Sets& sets,
                     bool moves, const Kl& kl, double low, double high, Address out) {
  if (streams.size() > rewards::kMost || sets.size() > rewards::kMost) {
    throw std::invalid_argument("at most " + std::to_string(rewards::kMost) +
                                " streams and sets of segments");
  }
  TokenRewards<T> made = {};
  made.ragged = {pointer<const std::int32_t>(offsets), sequences};
  made.total = total;
  made.mask = pointer<const bool>(mask);
  made.terminal = pointer<const T>(terminal);
  made.terminal_most = terminal_most;
  for (const auto& [values, baseline, weight, most] : streams) {
    made.streams[made.stream_count++] = {pointer<const T>(values), pointer<const T>(baseline), weight, most};
  }
  for (const auto& [ends, scores, set_offsets, weight] : sets) {
    made.segments[made.segment_count++] = {pointer<const std::int32_t>(ends), pointer<const T>(scores),
                                           pointer<const std::int32_t>(set_offsets), weight};
  }
  made.moves = moves;
  const auto& [kind, logps, reference, most, coefficients, turns, turn_count, coefficient] = kl;
  made.penalty = {static_cast<rewards::Kl>(kind),
                  pointer<const T>(logps),
                  pointer<const T>(reference),
                  most,
                  pointer<const T>(coefficients),
                  pointer<const std::int32_t>(turns),
                  turn_count,
                  coefficient};
  made.low = low;
  made.high = high;
  made.out = pointer<T>(out);
  return made;
}

void run_cpu(int itemsize, Address offsets, std::int64_t sequences, std::int64_t total, Address mask,
             Address terminal, double terminal_most, const Streams& streams, const Sets& sets, bool moves,
             const Kl& kl, double low, double high, Address out, int threads) {
  with_float_type(itemsize, [&](auto type) {
    cpu::run_token_rewards(call<decltype(type)>(offsets, sequences, total, mask, terminal, terminal_most,
                                                streams, sets, moves, kl, low, high, out),
                           threads);
  });
}

#ifdef PREFCORE_CUDA
void run_cuda(int itemsize, Address offsets, std::int64_t sequences, std::int64_t total, Address mask,
              Address terminal, double terminal_most, const Streams& streams, const Sets& sets, bool moves,
              const Kl& kl, double low, double high, Address out, int device, Address stream) {
  with_float_type(itemsize, [&](auto type) {
    cuda::run_token_rewards(call<decltype(type)>(offsets, sequences, total, mask, terminal, terminal_most,
                                                 streams, sets, moves, kl, low, high, out),
                            device, pointer<void>(stream));
  });
}
#endif

}  // namespace
}  // namespace prefcore

void bind_token_rewards(py::module_& m) {
  const py::call_guard<py::gil_scoped_release> no_gil;
  // Arguments: itemsize, offsets, sequences, tokens, mask or 0, terminal or 0, its bound, streams of (values,
  // baseline or 0, weight, bound), sets of (ends, scores, offsets, weight), whether ends move, the penalty
  // (kind, log-probs, reference, bound, coefficients or 0, turns or 0, number of turns, coefficient), low,
  // high, out, then the device's.
  m.def("token_rewards_cpu", &prefcore::run_cpu, no_gil);
#ifdef PREFCORE_CUDA
  m.def("token_rewards_cuda", &prefcore::run_cuda, no_gil);
#endif
}
