// What row kernels share, for one instruction set. A row is handled in blocks that stay in the first-level
// cache: the tile is read into a buffer of z, and everything after works on that buffer, so a tile's type
// matters only at its ends.
#pragma once

#include "cpu/lanes.inl"
#include "cpu/rows.h"

namespace prefcore::cpu::PREFCORE_ISA {
namespace {

constexpr int64_t kBlock = 1024;

template <class A>
constexpr typename A::Scalar kInfinity = static_cast<typename A::Scalar>(__builtin_inf());

template <class A>
constexpr typename A::Scalar kNaN = static_cast<typename A::Scalar>(__builtin_nan(""));

template <class A>
struct Block {
  alignas(64) typename A::Scalar z[kBlock];      // -inf beyond the row's end
  alignas(64) typename A::Scalar slope[kBlock];  // 1 - tanh^2 of the softcap, where it is asked for
};

PREFCORE_INLINE int64_t block_size(const LogitRows& a, int64_t start) {
  return a.cols - start < kBlock ? a.cols - start : kBlock;
}

// z of one row: inner * (x + bias), or outer * tanh(inner * (x + bias)) with a softcap. Where the temperature
// alone scales, (x + bias) / inner: the rounding of a reciprocal would show.
template <class A>
struct Map {
  using S = typename A::Scalar;
  S inner, outer;
  S factor;  // dz/dx without the softcap's slope
  const S* bias;
  bool capped, divided, rounded, plain;
  Type round_to;

  Map(const LogitRows& a, int64_t row) {
    const S* temperatures = static_cast<const S*>(a.temperatures);
    const double temperature = temperatures ? temperatures[row] : a.temperature;
    capped = a.softcap != 0;
    factor = static_cast<S>(a.logit_scale / temperature);
    divided = !capped && a.logit_scale == 1 && temperature != 1;
    inner = static_cast<S>(capped    ? a.logit_scale / a.softcap
                           : divided ? temperature
                                     : a.logit_scale / temperature);
    outer = static_cast<S>(a.softcap / temperature);
    bias = static_cast<const S*>(a.bias);
    round_to = a.round_to;
    rounded = round_to != a.type;
    plain = !capped && !bias && !rounded;
  }
};

template <class T, bool kPlain>
PREFCORE_INLINE typename T::A::Scalar read_block_as(const typename T::Stored* x,
                                                    const Map<typename T::A>& map,
                                                    const typename T::A::Scalar* bias, int64_t n,
                                                    Block<typename T::A>& block, bool with_slope) {
  using A = typename T::A;
  using S = typename A::Scalar;
  using V = typename A::V;
  constexpr int L = kLanes<A>;
  const V inner = splat<A>(map.inner), outer = splat<A>(map.outer);
  const auto z_of = [&](V v, const S* b, int64_t i) __attribute__((always_inline)) {
    if (!kPlain) {
      if (map.rounded) v = round_to(map.round_to, v);
      if (b) v += load_vector<V>(b);
    }
    v = map.divided ? v / inner : v * inner;
    if (kPlain || !map.capped) return v;
    V slope;
    v = tanh<A>(v, with_slope, slope) * outer;
    if (with_slope) store_vector(block.slope + i, slope);
    return v;
  };
  V top = splat<A>(-kInfinity<A>);
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    const V z = z_of(T::load(x + i), bias ? bias + i : bias, i);
    store_vector(block.z + i, z);
    top = larger(z, top);
  }
  if (i < n) {
    typename T::Stored rest[L] = {};
    S rest_bias[L] = {};
    __builtin_memcpy(rest, x + i, (n - i) * sizeof *rest);
    if (bias) __builtin_memcpy(rest_bias, bias + i, (n - i) * sizeof *rest_bias);
    store_vector(block.z + i, z_of(T::load(rest), bias ? rest_bias : bias, i));
    for (int64_t j = n; j < i + L; ++j) block.z[j] = -kInfinity<A>;
    top = larger(load_vector<V>(block.z + i), top);
  }
  return max_lanes<A>(top);
}

// Fill the block with z of columns [start, start + n) of a row; returns its maximum, NaN passed over.
template <class T>
typename T::A::Scalar read_block(const typename T::Stored* x, const Map<typename T::A>& map, int64_t start,
                                 int64_t n, Block<typename T::A>& block, bool with_slope) {
  if (map.plain) return read_block_as<T, true>(x + start, map, nullptr, n, block, with_slope);
  return read_block_as<T, false>(x + start, map, map.bias ? map.bias + start : nullptr, n, block, with_slope);
}

// Write z * factor, times the slope where it was asked for.
template <class T>
void write_block(typename T::Stored* out, const Block<typename T::A>& block, int64_t n,
                 typename T::A::Scalar factor, bool with_slope) {
  using V = typename T::A::V;
  constexpr int L = kLanes<typename T::A>;
  for (int64_t i = 0; i < n; i += L) {
    V v = load_vector<V>(block.z + i) * factor;
    if (with_slope) v *= load_vector<V>(block.slope + i);
    if (i + L <= n) {
      T::store(out + i, v);
    } else {
      typename T::Stored rest[L];
      T::store(rest, v);
      __builtin_memcpy(out + i, rest, (n - i) * sizeof *rest);
    }
  }
}

// The statistics of a row so far, as prefcore.ops._spec.Row has them.
template <class A>
struct Running {
  using S = typename A::Scalar;
  S peak, target, before;
  double total, shifted, sum, squares;  // of this many blocks; a float would collect their roundings

  // A final state may be cut off behind the target; `more` reads what comes after it, where it is kept.
  Running(const LogitRows& a, int64_t row, bool more) {
    const S* state = static_cast<const S*>(a.state) + row;
    const int64_t stride = a.state_stride;
    peak = state[0], total = state[stride], target = state[2 * stride];
    shifted = more && a.entropy ? state[3 * stride] : 0;
    sum = more && a.mean ? state[4 * stride] : 0;
    squares = more && a.squares ? state[5 * stride] : 0;
    before = more && a.top1 ? state[6 * stride] : -kInfinity<A>;
  }

  void save(const LogitRows& a, int64_t row) const {
    S* state = static_cast<S*>(a.state) + row;
    const int64_t stride = a.state_stride;
    state[0] = peak, state[stride] = static_cast<S>(total), state[2 * stride] = target;
    if (a.entropy) state[3 * stride] = static_cast<S>(shifted);
    if (a.mean) state[4 * stride] = static_cast<S>(sum);
    if (a.squares) state[5 * stride] = static_cast<S>(squares);
    if (a.top1) state[6 * stride] = before;
  }

  // Let the peak, to which the sums are relative, rise to `top`. Returns exp(old - new).
  S raise(S top) {
    if (!(top > peak)) return 1;
    const double delta = static_cast<double>(peak) - top, scale = __builtin_exp(delta);
    if (peak > -kInfinity<A>) {
      shifted = scale * (shifted + delta * total);
      total *= scale;
      squares *= scale * scale;
    }
    peak = top;
    return static_cast<S>(scale);
  }
};

// Sums over a block go in two levels, parts of it first: one long chain of additions collects its roundings.
template <class A>
constexpr int64_t kPart = 16 * kLanes<A>;

PREFCORE_INLINE bool outside(const LogitRows& a, int64_t row) {
  return a.targets[row] < 0 || a.targets[row] >= a.vocab;
}

template <class T>
const typename T::Stored* tile_row(const LogitRows& a, int64_t row) {
  return static_cast<const typename T::Stored*>(a.tile) + row * a.tile_stride;
}

template <class T>
typename T::Stored* out_row(const LogitRows& a, int64_t row) {
  return static_cast<typename T::Stored*>(a.out) + row * a.out_stride;
}

// Whether the row is ignored; if so its output, where it has one, is made zeros.
PREFCORE_INLINE bool skip_row(const LogitRows& a, int64_t row) {
  if (a.targets[row] != a.ignore_index) return false;
  if (a.out) {
    const int64_t size = a.out_type == Type::kFloat64 ? 8 : a.out_type == Type::kFloat32 ? 4 : 2;
    __builtin_memset(static_cast<char*>(a.out) + row * a.out_stride * size, 0, a.cols * size);
  }
  return true;
}

}  // namespace
}  // namespace prefcore::cpu::PREFCORE_ISA
