// The row kernels for one instruction set. A row is handled in blocks that stay in the first-level cache: the
// tile is read into a buffer of z, and everything after works on that buffer, so a tile's type matters only
// at its ends.
#include "cpu/logprobs_lanes.inl"

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

template <class A, bool kMoments, bool kKeep>
void add_exponentials(Block<A>& block, int64_t n, Running<A>& row) {
  using V = typename A::V;
  // Before the first finite logit the peak is -inf, and every exponential must come out 0.
  const typename A::Scalar peak = row.peak == -kInfinity<A> ? 0 : row.peak;
  V total{}, shifted{}, squares{};
  for (int64_t start = 0; start < n; start += kPart<A>) {
    const int64_t end = start + kPart<A> < n ? start + kPart<A> : n;
    V part{}, shifted_part{}, squares_part{};
    for (int64_t i = start; i < end; i += kLanes<A>) {
      const V t = load_vector<V>(block.z + i) - peak;
      const V e = exp<A>(t);
      part += e;
      if (kMoments) {
        shifted_part = e == 0 ? shifted_part : fma(e, t, shifted_part);  // t may be -inf
        squares_part = fma(e, e, squares_part);
      }
      if (kKeep) store_vector(block.z + i, e);
    }
    total += part, shifted += shifted_part, squares += squares_part;
  }
  row.total += sum_lanes<A>(total);
  if (kMoments) {
    row.shifted += sum_lanes<A>(shifted);
    row.squares += sum_lanes<A>(squares);
  }
}

// Add a block to a row whose peak has been raised to `top`, the block's maximum, at least. The target is
// counted from the block's start; with `keep` the block becomes exp(z - peak).
template <class A>
void add_block(const LogitRows& a, Block<A>& block, int64_t n, typename A::Scalar top, int64_t target,
               Running<A>& row, bool keep) {
  using V = typename A::V;
  if (target >= 0 && target < n) row.target = block.z[target];
  if (a.top1 && target > 0) {
    if (target < n) {
      top = -kInfinity<A>;
      for (int64_t i = 0; i < target; ++i) top = block.z[i] > top ? block.z[i] : top;
    }
    if (top > row.before) row.before = top;
  }
  if (a.mean) {
    const int64_t whole = n - n % kLanes<A>;
    V sum{};
    for (int64_t start = 0; start < whole; start += kPart<A>) {
      const int64_t end = start + kPart<A> < whole ? start + kPart<A> : whole;
      V part{};
      for (int64_t i = start; i < end; i += kLanes<A>) part += load_vector<V>(block.z + i);
      sum += part;
    }
    row.sum += sum_lanes<A>(sum);
    for (int64_t i = whole; i < n; ++i) row.sum += block.z[i];
  }
  const bool moments = a.entropy || a.squares;
  if (moments && keep) return add_exponentials<A, true, true>(block, n, row);
  if (moments) return add_exponentials<A, true, false>(block, n, row);
  if (keep) return add_exponentials<A, false, true>(block, n, row);
  add_exponentials<A, false, false>(block, n, row);
}

// Turn z into -(b p + c p (log p + H)).
template <class A, bool kEntropy>
void differentiate(Block<A>& block, int64_t n, const Running<A>& row, typename A::Scalar b,
                   typename A::Scalar c, typename A::Scalar entropy) {
  using S = typename A::Scalar;
  using V = typename A::V;
  const S inverse = static_cast<S>(1 / row.total);
  const S log_total = static_cast<S>(__builtin_log(row.total));
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const V t = load_vector<V>(block.z + i) - row.peak;
    const V p = exp<A>(t) * inverse;
    V v = p * -b;
    if (kEntropy) v -= p == 0 ? V{} : c * p * ((t - log_total) + entropy);  // t may be -inf
    store_vector(block.z + i, v);
  }
}

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

// Whether the row is ignored; if so its output is made zeros.
template <class Out>
bool skip_row(const LogitRows& a, int64_t row) {
  if (a.targets[row] != a.ignore_index) return false;
  __builtin_memset(out_row<Out>(a, row), 0, a.cols * sizeof(typename Out::Stored));
  return true;
}

template <class T>
void stats_row(const LogitRows& a, int64_t row, Block<typename T::A>& block) {
  using A = typename T::A;
  const Map<A> map(a, row);
  Running<A> running(a, row, true);
  if (outside(a, row)) running.target = kNaN<A>;
  for (int64_t start = 0; start < a.cols; start += kBlock) {
    const int64_t n = block_size(a, start);
    const typename A::Scalar top = read_block<T>(tile_row<T>(a, row), map, start, n, block, false);
    running.raise(top);
    add_block(a, block, n, top, a.targets[row] - a.col0 - start, running, false);
  }
  running.save(a, row);
}

template <class T, class Out>
void weigh_row(const LogitRows& a, int64_t row, Block<typename T::A>& block) {
  using A = typename T::A;
  using S = typename A::Scalar;
  const Map<A> map(a, row);
  Running<A> running(a, row, true);
  if (outside(a, row)) running.target = kNaN<A>;
  // The row comes from memory for its maximum and from the cache for the rest.
  S top = -kInfinity<A>;
  for (int64_t start = 0; start < a.cols; start += kBlock) {
    const S z = read_block<T>(tile_row<T>(a, row), map, start, block_size(a, start), block, false);
    top = z > top ? z : top;
  }
  const S scale = running.raise(top);
  if (a.acc && scale != 1) {
    S* acc = static_cast<S*>(a.acc) + row * a.acc_stride;
    for (int64_t i = 0; i < a.acc_cols; ++i) acc[i] *= scale;
  }
  for (int64_t start = 0; start < a.cols; start += kBlock) {
    const int64_t n = block_size(a, start);
    const S block_top = read_block<T>(tile_row<T>(a, row), map, start, n, block, map.capped);
    add_block(a, block, n, block_top, a.targets[row] - a.col0 - start, running, true);
    write_block<Out>(out_row<Out>(a, row) + start, block, n, 1, map.capped);
  }
  running.save(a, row);
}

template <class T, class Out>
void grad_row(const LogitRows& a, int64_t row, Block<typename T::A>& block) {
  using A = typename T::A;
  using S = typename A::Scalar;
  const Map<A> map(a, row);
  const Running<A> running(a, row, false);
  const bool wrong = outside(a, row) || running.target != running.target;
  const S factor = wrong ? kNaN<A> : map.factor;
  const S* coef = a.coef ? static_cast<const S*>(a.coef) + row : nullptr;
  const bool entropic = coef && a.entropies;
  const S for_target = coef ? coef[0] : 1, for_p = coef ? coef[a.coef_stride] : 1;
  const S for_entropy = entropic ? coef[2 * a.coef_stride] : 0;
  const S entropy = entropic ? static_cast<const S*>(a.entropies)[row] : 0;
  for (int64_t start = 0; start < a.cols; start += kBlock) {
    const int64_t n = block_size(a, start), target = a.targets[row] - a.col0 - start;
    read_block<T>(tile_row<T>(a, row), map, start, n, block, map.capped);
    if (entropic) {
      differentiate<A, true>(block, n, running, for_p, for_entropy, entropy);
    } else {
      differentiate<A, false>(block, n, running, for_p, for_entropy, entropy);
    }
    if (target >= 0 && target < n) block.z[target] += for_target;
    write_block<Out>(out_row<Out>(a, row) + start, block, n, factor, map.capped);
  }
}

template <class T>
void stats_rows(const LogitRows& a, int64_t begin, int64_t end) {
  Block<typename T::A> block;
  for (int64_t row = begin; row < end; ++row) {
    if (a.targets[row] != a.ignore_index) stats_row<T>(a, row, block);
  }
}

template <class T, class Out>
void weigh_rows(const LogitRows& a, int64_t begin, int64_t end) {
  Block<typename T::A> block;
  for (int64_t row = begin; row < end; ++row) {
    if (!skip_row<Out>(a, row)) weigh_row<T, Out>(a, row, block);
  }
}

template <class T, class Out>
void grad_rows(const LogitRows& a, int64_t begin, int64_t end) {
  Block<typename T::A> block;
  for (int64_t row = begin; row < end; ++row) {
    if (!skip_row<Out>(a, row)) grad_row<T, Out>(a, row, block);
  }
}

template <class T, class Out>
void stats_grad_rows(const LogitRows& a, int64_t begin, int64_t end) {
  Block<typename T::A> block;
  for (int64_t row = begin; row < end; ++row) {
    if (skip_row<Out>(a, row)) continue;
    stats_row<T>(a, row, block);
    grad_row<T, Out>(a, row, block);
  }
}

void stats(const LogitRows& a, int64_t begin, int64_t end) {
  switch (a.type) {
    case Type::kFloat32:
      return stats_rows<Float32>(a, begin, end);
    case Type::kBFloat16:
      return stats_rows<BFloat16>(a, begin, end);
    case Type::kFloat16:
      return stats_rows<Float16>(a, begin, end);
    case Type::kFloat64:
      return stats_rows<Float64>(a, begin, end);
  }
}

// The pairs of types that callers let through: equal ones, and float32 to a half type.
#define PREFCORE_ROW_LOOP(loop)                                                         \
  switch (a.type) {                                                                     \
    case Type::kFloat32:                                                                \
      if (a.out_type == Type::kFloat32) return loop<Float32, Float32>(a, begin, end);   \
      if (a.out_type == Type::kBFloat16) return loop<Float32, BFloat16>(a, begin, end); \
      return loop<Float32, Float16>(a, begin, end);                                     \
    case Type::kBFloat16:                                                               \
      return loop<BFloat16, BFloat16>(a, begin, end);                                   \
    case Type::kFloat16:                                                                \
      return loop<Float16, Float16>(a, begin, end);                                     \
    case Type::kFloat64:                                                                \
      return loop<Float64, Float64>(a, begin, end);                                     \
  }

void weigh(const LogitRows& a, int64_t begin, int64_t end) { PREFCORE_ROW_LOOP(weigh_rows) }
void grad(const LogitRows& a, int64_t begin, int64_t end) { PREFCORE_ROW_LOOP(grad_rows) }
void stats_grad(const LogitRows& a, int64_t begin, int64_t end) { PREFCORE_ROW_LOOP(stats_grad_rows) }

}  // namespace

const RowKernels kernels = {stats, weigh, grad, stats_grad};

}  // namespace prefcore::cpu::PREFCORE_ISA
