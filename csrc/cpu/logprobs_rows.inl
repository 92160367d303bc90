// The kernels of one distribution's rows, for one instruction set.
#include "cpu/logprobs.h"
#include "cpu/rows.inl"

namespace prefcore::cpu::PREFCORE_ISA {
namespace {

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
    if (!skip_row(a, row)) weigh_row<T, Out>(a, row, block);
  }
}

template <class T, class Out>
void grad_rows(const LogitRows& a, int64_t begin, int64_t end) {
  Block<typename T::A> block;
  for (int64_t row = begin; row < end; ++row) {
    if (!skip_row(a, row)) grad_row<T, Out>(a, row, block);
  }
}

template <class T, class Out>
void stats_grad_rows(const LogitRows& a, int64_t begin, int64_t end) {
  Block<typename T::A> block;
  for (int64_t row = begin; row < end; ++row) {
    if (skip_row(a, row)) continue;
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
