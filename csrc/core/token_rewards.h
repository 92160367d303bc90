// Rewards of the tokens of a ragged batch: the arithmetic that the CPU and the GPU share.
//
// A token's reward is a sum in double precision, in this order: segment scores set by set, the terminal
// reward, the dense streams, the KL penalty; then one rounding. So its bits are the same whoever computes it,
// and whatever else is in the batch. This needs multiplications and additions to stay apart: compile without
// contraction to fused multiply-adds.
#pragma once

#include <cstdint>
#include <limits>

#include "core/number.h"
#include "core/portable.h"

namespace prefcore {
namespace rewards {

enum class Kl : int { None = 0, Given = 1, K1 = 2, K2 = 3, K3 = 4 };

constexpr int kMost =
    32;  // streams, and sets of segments: they travel as a kernel's arguments, 4 KB at the most

// Limits that are not given are infinite. NaN passes.
PREFCORE_HD double clip(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

// exp(u) - 1 - u, also where that is far below u, by the same operations on every device.
PREFCORE_HD double exp_excess(double u) {
  // u = n ln 2 + r; adding 1.5 2^52 rounds to an integer and leaves it in the low bits.
  constexpr double kShift = 6755399441055744.0;
  const double shifted = clip(u, -60.0, 1000.0) * 1.4426950408889634 + kShift;
  const double n = shifted - kShift;
  // ln 2 in two parts, of which the first times n is exact.
  const double r = (clip(u, -60.0, 1000.0) - n * 6.93147180369123816490e-01) - n * 1.90821492927058770002e-10;
  double series = 1.0 / 87178291200.0;  // 1 / 14!: |r| is at most ln 2 / 2
  series = series * r + 1.0 / 6227020800.0;
  series = series * r + 1.0 / 479001600.0;
  series = series * r + 1.0 / 39916800.0;
  series = series * r + 1.0 / 3628800.0;
  series = series * r + 1.0 / 362880.0;
  series = series * r + 1.0 / 40320.0;
  series = series * r + 1.0 / 5040.0;
  series = series * r + 1.0 / 720.0;
  series = series * r + 1.0 / 120.0;
  series = series * r + 1.0 / 24.0;
  series = series * r + 1.0 / 6.0;
  series = series * r + 0.5;
  const double excess = series * r * r;
  const std::uint64_t exponent =
      reinterpret_bits<std::uint64_t>(shifted) - reinterpret_bits<std::uint64_t>(kShift);
  const double half_scale = reinterpret_bits<double>((exponent + 1022) << 52);  // 2^(n - 1), for n = 1024 too
  const double far = half_scale * (1.0 + r + excess) * 2.0 - 1.0 - u;
  const double scaled = u > 709.78 ? std::numeric_limits<double>::infinity() : far;
  return n == 0.0 ? excess : u < -50.0 ? -1.0 - u : scaled;
}

// The penalty of one token under a sampled estimator; `most` bounds the log-ratio on both sides.
template <Kl Kind>
PREFCORE_HD double estimate(double logp, double reference, double most) {
  const double ratio = clip(logp - reference, -most, most);
  if (Kind == Kl::K1) return ratio;
  if (Kind == Kl::K2) return 0.5 * ratio * ratio;
  return exp_excess(-ratio);
}

template <typename T>
struct Stream {
  const T* values;
  const T* baseline;  // subtracted, may be null
  double weight;
  double most;  // of the magnitude of weight * (value - baseline)
};

// Of each sequence, tokens that end a segment, in rising order and counted from its first token, and their
// scores.
template <typename T>
struct Segments {
  const std::int32_t* ends;
  const T* scores;
  const std::int32_t* offsets;  // of each sequence's into ends, from 0 upwards
  double weight;

  PREFCORE_HD double at(std::int64_t j) const { return weight * static_cast<double>(scores[j]); }
};

template <typename T>
struct Penalty {
  Kl kind;
  const T* logps;  // or the divergence, of Kl::Given
  const T* reference;
  double most;
  const T* coefficients;      // of tokens, or of turns; null where `coefficient` is that of all
  const std::int32_t* turns;  // of tokens, may be null
  std::int64_t turn_count;
  double coefficient;

  // A turn without a coefficient makes NaN of its tokens.
  PREFCORE_HD double of_turn(std::int64_t turn) const {
    return turn >= 0 && turn < turn_count ? static_cast<double>(coefficients[turn])
                                          : std::numeric_limits<double>::quiet_NaN();
  }
};

// The tokens of a worker are a Run: count() of them, the j-th at(j), which is there if has(j). Branches are
// outside of the loops, for the sake of compilers that vectorise them.
template <class Run, typename T>
PREFCORE_HD void add_stream(const Stream<T>& stream, const Run& run, double (&sums)[Run::kHeld]) {
  if (stream.baseline == nullptr) {
    for (int j = 0; j < run.count(); ++j) {
      if (!run.has(j)) continue;
      sums[j] +=
          clip(stream.weight * static_cast<double>(stream.values[run.at(j)]), -stream.most, stream.most);
    }
    return;
  }
  for (int j = 0; j < run.count(); ++j) {
    if (!run.has(j)) continue;
    const double gap =
        static_cast<double>(stream.values[run.at(j)]) - static_cast<double>(stream.baseline[run.at(j)]);
    sums[j] += clip(stream.weight * gap, -stream.most, stream.most);
  }
}

template <Kl Kind, class Run, typename T>
PREFCORE_HD void subtract_penalty(const Penalty<T>& penalty, const Run& run, double (&sums)[Run::kHeld]) {
  double kl[Run::kHeld];
  for (int j = 0; j < run.count(); ++j) {
    if (!run.has(j)) continue;
    const double value = static_cast<double>(penalty.logps[run.at(j)]);
    kl[j] = Kind == Kl::Given
                ? value
                : estimate<Kind>(value, static_cast<double>(penalty.reference[run.at(j)]), penalty.most);
  }
  if (penalty.coefficients == nullptr) {
    for (int j = 0; j < run.count(); ++j) {
      if (run.has(j)) sums[j] -= penalty.coefficient * kl[j];
    }
  } else if (penalty.turns == nullptr) {
    for (int j = 0; j < run.count(); ++j) {
      if (run.has(j)) sums[j] -= static_cast<double>(penalty.coefficients[run.at(j)]) * kl[j];
    }
  } else {
    for (int j = 0; j < run.count(); ++j) {
      if (run.has(j)) sums[j] -= penalty.of_turn(penalty.turns[run.at(j)]) * kl[j];
    }
  }
}

// Adds the terms that depend on a token alone.
template <class Run, typename T>
PREFCORE_HD void add_dense(const Stream<T>* streams, int stream_count, const Penalty<T>& penalty,
                           const Run& run, double (&sums)[Run::kHeld]) {
  for (int k = 0; k < stream_count; ++k) add_stream(streams[k], run, sums);
  switch (penalty.kind) {
    case Kl::Given:
      return subtract_penalty<Kl::Given>(penalty, run, sums);
    case Kl::K1:
      return subtract_penalty<Kl::K1>(penalty, run, sums);
    case Kl::K2:
      return subtract_penalty<Kl::K2>(penalty, run, sums);
    case Kl::K3:
      return subtract_penalty<Kl::K3>(penalty, run, sums);
    case Kl::None:
      return;
  }
}

// Masks, and positions in them, are those of one sequence; without a mask all of its tokens count.
PREFCORE_HD bool counts(const bool* mask, std::int64_t t) { return mask == nullptr || mask[t]; }

// Whether no token behind t counts.
PREFCORE_HD bool is_last(const bool* mask, std::int64_t t, std::int64_t length) {
  for (++t; t < length; ++t) {
    if (counts(mask, t)) return false;
  }
  return true;
}

// The token that a score for `end` goes to, -1 for none: itself if it counts, else where `moves` is true the
// last one before it that does.
PREFCORE_HD std::int64_t place(std::int64_t end, const bool* mask, std::int64_t length, bool moves) {
  if (end < 0 || (end >= length && !moves)) return -1;
  std::int64_t t = end < length ? end : length - 1;
  while (moves && t >= 0 && !counts(mask, t)) --t;
  return t >= 0 && counts(mask, t) ? t : -1;
}

// The first of rising[first .. end) that is not below `bound`, or `end`.
PREFCORE_HD std::int64_t lower_bound(const std::int32_t* rising, std::int64_t first, std::int64_t end,
                                     std::int64_t bound) {
  while (first < end) {
    const std::int64_t middle = first + (end - first) / 2;
    if (rising[middle] < bound) {
      first = middle + 1;
    } else {
      end = middle;
    }
  }
  return first;
}

}  // namespace rewards
}  // namespace prefcore
