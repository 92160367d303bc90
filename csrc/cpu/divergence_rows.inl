// The kernels of a pair of distributions' rows, for one instruction set: the tiles are read block by block
// side by side.
#include "cpu/divergence.h"
#include "cpu/rows.inl"

namespace prefcore::cpu::PREFCORE_ISA {
namespace {

template <class A>
struct Blocks {
  Block<A> p, q;
};

// The types of tiles and outputs are told apart once a block: other than in the kernels of one distribution
// the loops are compiled once for all of them.
template <class A>
typename A::Scalar read_any(const LogitRows& a, int64_t row, const Map<A>& map, int64_t start,
                            Block<A>& block, bool with_slope) {
  const int64_t n = block_size(a, start);
  if constexpr (sizeof(typename A::Scalar) == sizeof(double)) {
    return read_block<Float64>(tile_row<Float64>(a, row), map, start, n, block, with_slope);
  } else {
    if (a.type == Type::kFloat32)
      return read_block<Float32>(tile_row<Float32>(a, row), map, start, n, block, with_slope);
    if (a.type == Type::kBFloat16)
      return read_block<BFloat16>(tile_row<BFloat16>(a, row), map, start, n, block, with_slope);
    return read_block<Float16>(tile_row<Float16>(a, row), map, start, n, block, with_slope);
  }
}

template <class A>
void write_any(const LogitRows& a, int64_t row, int64_t start, const Block<A>& block,
               typename A::Scalar factor, bool with_slope) {
  const int64_t n = block_size(a, start);
  if constexpr (sizeof(typename A::Scalar) == sizeof(double)) {
    write_block<Float64>(out_row<Float64>(a, row) + start, block, n, factor, with_slope);
  } else {
    if (a.out_type == Type::kFloat32)
      return write_block<Float32>(out_row<Float32>(a, row) + start, block, n, factor, with_slope);
    if (a.out_type == Type::kBFloat16)
      return write_block<BFloat16>(out_row<BFloat16>(a, row) + start, block, n, factor, with_slope);
    write_block<Float16>(out_row<Float16>(a, row) + start, block, n, factor, with_slope);
  }
}

// Let both peaks rise. Returns the sum over what came before, `cross`, relative to the new ones.
template <class A, Divergence kKind>
double raise_both(Running<A>& p, Running<A>& q, typename A::Scalar top_p, typename A::Scalar top_q,
                  double weight, double cross) {
  const double peak_p = p.peak, peak_q = q.peak, total = p.total;
  p.raise(top_p), q.raise(top_q);
  const double by_p = p.peak == peak_p ? 0 : peak_p - p.peak;
  const double by_q = q.peak == peak_q ? 0 : peak_q - q.peak;
  if (kKind == Divergence::kAlpha) return cross * __builtin_exp(weight * by_p + (1 - weight) * by_q);
  // Terms whose p has become 0 are 0, infinite though they were; before p's first finite logit there are
  // none.
  if (total == 0 || by_p < A::kUnderflow) return 0;
  return __builtin_exp(by_p) * (cross + (by_p - by_q) * total);
}

// exp(t), summed up as in add_exponentials.
template <class A, bool kMoments>
struct Exponentials {
  using V = typename A::V;
  V total{}, shifted{};

  PREFCORE_MEMBER V add(V t) {
    const V e = exp<A>(t);
    total += e;
    if (kMoments) shifted = e == 0 ? shifted : fma(e, t, shifted);  // t may be -inf
    return e;
  }

  PREFCORE_MEMBER void add(const Exponentials& part) { total += part.total, shifted += part.shifted; }

  PREFCORE_MEMBER void save(Running<A>& row) const {
    row.total += sum_lanes<A>(total);
    if (kMoments) row.shifted += sum_lanes<A>(shifted);
  }
};

// Add a block to both sides, whose peaks have been raised. Returns its cross sum.
template <class A, Divergence kKind, bool kMoments>
double add_blocks(const Blocks<A>& blocks, int64_t n, Running<A>& p, Running<A>& q, double weight) {
  using S = typename A::Scalar;
  using V = typename A::V;
  // As in add_exponentials: a peak of -inf counts as 0, and every exponential comes out 0.
  const S peak_p = p.peak == -kInfinity<A> ? 0 : p.peak, peak_q = q.peak == -kInfinity<A> ? 0 : q.peak;
  const S of_p = static_cast<S>(weight), of_q = static_cast<S>(1 - weight);
  Exponentials<A, kMoments> sums_p, sums_q;
  V cross{};
  for (int64_t start = 0; start < n; start += kPart<A>) {
    const int64_t end = start + kPart<A> < n ? start + kPart<A> : n;
    Exponentials<A, kMoments> part_p, part_q;
    V cross_part{};
    for (int64_t i = start; i < end; i += kLanes<A>) {
      const V t_p = load_vector<V>(blocks.p.z + i) - peak_p, t_q = load_vector<V>(blocks.q.z + i) - peak_q;
      const V e_p = part_p.add(t_p);
      part_q.add(t_q);
      if (kKind == Divergence::kAlpha) {
        cross_part += exp<A>(t_p * of_p + t_q * of_q);
      } else {
        cross_part = e_p == 0 ? cross_part : fma(e_p, t_p - t_q, cross_part);  // t_p may be -inf
      }
    }
    sums_p.add(part_p), sums_q.add(part_q), cross += cross_part;
  }
  sums_p.save(p), sums_q.save(q);
  return sum_lanes<A>(cross);
}

template <class A, Divergence kKind>
void stats_row(const PairRows& a, int64_t row, Blocks<A>& blocks) {
  using S = typename A::Scalar;
  const Map<A> map_p(a.p, row), map_q(a.q, row);
  Running<A> p(a.p, row, true), q(a.q, row, true);
  S* const cross = static_cast<S*>(a.cross) + row;
  double sum = *cross;
  if (outside(a.p, row)) p.target = q.target = kNaN<A>;
  for (int64_t start = 0; start < a.p.cols; start += kBlock) {
    const int64_t n = block_size(a.p, start), target = a.p.targets[row] - a.p.col0 - start;
    const S top_p = read_any(a.p, row, map_p, start, blocks.p, false);
    const S top_q = read_any(a.q, row, map_q, start, blocks.q, false);
    sum = raise_both<A, kKind>(p, q, top_p, top_q, a.weight, sum);
    if (target >= 0 && target < n) p.target = blocks.p.z[target], q.target = blocks.q.z[target];
    sum += a.p.entropy || a.q.entropy ? add_blocks<A, kKind, true>(blocks, n, p, q, a.weight)
                                      : add_blocks<A, kKind, false>(blocks, n, p, q, a.weight);
  }
  p.save(a.p, row), q.save(a.q, row);
  *cross = static_cast<S>(sum);
}

// What turns z of both sides into probabilities.
template <class A>
struct Normal {
  using S = typename A::Scalar;
  S peak_p, peak_q;
  S inverse_p, inverse_q;  // of the totals
  S log_p, log_q;          // their logarithms
  S shift;                 // log_p - log_q
  S of_p, of_q;            // the weights

  Normal(const Running<A>& p, const Running<A>& q, double weight) {
    const double log_total_p = __builtin_log(p.total), log_total_q = __builtin_log(q.total);
    peak_p = p.peak, peak_q = q.peak;
    inverse_p = static_cast<S>(1 / p.total), inverse_q = static_cast<S>(1 / q.total);
    log_p = static_cast<S>(log_total_p), log_q = static_cast<S>(log_total_q);
    shift = static_cast<S>(log_total_p - log_total_q);
    of_p = static_cast<S>(weight), of_q = static_cast<S>(1 - weight);
  }
};

// A logit relative to its peak, -inf cut off: products with a probability, which is 0 there, stay 0.
template <class A>
PREFCORE_INLINE typename A::V relative(const typename A::Scalar* z, typename A::Scalar peak) {
  const typename A::V t = load_vector<typename A::V>(z) - peak, lowest = splat<A>(-0x1p100f);
  return lowest > t ? lowest : t;
}

// Both probabilities by way of the larger: what tells them apart keeps its relative accuracy where they are
// close.
template <class A>
struct Compared {
  using V = typename A::V;
  decltype(V{} > V{}) p_larger;
  V ratio;       // log p - log q
  V big, small;  // the larger and the smaller probability
  V quotient;    // small / big
  V less;        // that less 1

  PREFCORE_MEMBER Compared(V t_p, V t_q, const Normal<A>& normal) {
    ratio = (t_p - t_q) - normal.shift;
    p_larger = ratio > 0;
    big = exp<A>(p_larger ? t_p : t_q) * (p_larger ? splat<A>(normal.inverse_p) : splat<A>(normal.inverse_q));
    less = expm1<A>(p_larger ? -ratio : ratio, quotient);
    small = big * quotient;
  }

  PREFCORE_MEMBER V p() const { return p_larger ? big : small; }
  PREFCORE_MEMBER V q() const { return p_larger ? small : big; }
  PREFCORE_MEMBER V difference() const { return big * (p_larger ? -less : less); }  // p - q
  PREFCORE_MEMBER V sign() const {
    return ratio > 0 ? splat<A>(1) : ratio < 0 ? splat<A>(-1) : V{};
  }  // of that

  // log(p / m) and log(q / m). That of the larger is -log(1 + weight of the smaller * less), of the smaller
  // it is less by |log p - log q|: neither has an error that is not proportional to log p - log q.
  PREFCORE_MEMBER void to_mixture(const Normal<A>& normal, V& log_p, V& log_q) const {
    const V of_p = splat<A>(normal.of_p), of_q = splat<A>(normal.of_q);
    const V of_big = p_larger ? of_p : of_q, of_small = p_larger ? of_q : of_p;
    const V log_big = -log1p<A>(of_small * less, fma(of_small, quotient, of_big));
    log_p = p_larger ? log_big : log_big + ratio;
    log_q = p_larger ? log_big - ratio : log_big;
  }
};

template <class A, Divergence kKind>
void sum_blocks(const Blocks<A>& blocks, int64_t n, const Normal<A>& normal, double* cross) {
  using V = typename A::V;
  V sums[3] = {};
  for (int64_t start = 0; start < n; start += kPart<A>) {
    const int64_t end = start + kPart<A> < n ? start + kPart<A> : n;
    V parts[3] = {};
    for (int64_t i = start; i < end; i += kLanes<A>) {
      const Compared<A> x(relative<A>(blocks.p.z + i, normal.peak_p),
                          relative<A>(blocks.q.z + i, normal.peak_q), normal);
      if (kKind == Divergence::kJs) {
        V log_p, log_q;
        x.to_mixture(normal, log_p, log_q);
        const V of_p = x.p() * log_p, of_q = x.q() * log_q;
        parts[0] += of_p, parts[1] += of_q;
        parts[2] += normal.of_p * of_p + normal.of_q * of_q;
      } else {
        const V sign = x.sign();
        parts[0] = fma(x.p(), sign, parts[0]), parts[1] = fma(x.q(), sign, parts[1]);
        parts[2] -= x.big * x.less;
      }
    }
    for (int k = 0; k < 3; ++k) sums[k] += parts[k];
  }
  for (int k = 0; k < 3; ++k) cross[k] += sum_lanes<A>(sums[k]);
}

template <class A, Divergence kKind>
void sums_row(const PairRows& a, int64_t row, Blocks<A>& blocks) {
  using S = typename A::Scalar;
  const Map<A> map_p(a.p, row), map_q(a.q, row);
  const Normal<A> normal(Running<A>(a.p, row, false), Running<A>(a.q, row, false), a.weight);
  S* const cross = static_cast<S*>(a.cross) + row;
  double sums[3];
  for (int k = 0; k < 3; ++k) sums[k] = cross[k * a.cross_stride];
  for (int64_t start = 0; start < a.p.cols; start += kBlock) {
    read_any(a.p, row, map_p, start, blocks.p, false);
    read_any(a.q, row, map_q, start, blocks.q, false);
    sum_blocks<A, kKind>(blocks, block_size(a.p, start), normal, sums);
  }
  for (int k = 0; k < 3; ++k) cross[k * a.cross_stride] = static_cast<S>(sums[k]);
}

// A side's coefficients, as prefcore.ops._spec.Coef has them.
template <class A>
struct Coefficients {
  using S = typename A::Scalar;
  using V = typename A::V;
  bool wanted;
  S onehot = 0, p = 0, entropy = 0, divergence = 0, h = 0, offset = 0;

  Coefficients(const LogitRows& a, int64_t row) : wanted(a.out) {
    if (!wanted) return;
    const S* coef = static_cast<const S*>(a.coef) + row;
    const int64_t stride = a.coef_stride;
    onehot = coef[0], p = coef[stride], entropy = coef[2 * stride], divergence = coef[3 * stride];
    h = coef[4 * stride], offset = coef[5 * stride];
  }

  // dL/dz without its one-hot term, of probabilities, their logarithms and the divergence's g.
  PREFCORE_MEMBER V gradient(V prob, V log_prob, V g) const {
    const V own = prob * (entropy == 0 ? splat<A>(p) : fma(log_prob + h, splat<A>(entropy), splat<A>(p)));
    return divergence * g - own;
  }
};

// Turn z of the sides that are wanted into dL/dz.
template <class A, Divergence kKind>
void differentiate_both(Blocks<A>& blocks, int64_t n, const Normal<A>& normal, const Coefficients<A>& p,
                        const Coefficients<A>& q) {
  using S = typename A::Scalar;
  using V = typename A::V;
  const S of_p = normal.of_p, of_q = normal.of_q, over_p = 1 / of_p, over_q = 1 / of_q;
  const double log_r = -(static_cast<double>(of_p) * normal.log_p + static_cast<double>(of_q) * normal.log_q);
  const S inverse_r = static_cast<S>(__builtin_exp(log_r));
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const V t_p = relative<A>(blocks.p.z + i, normal.peak_p),
            t_q = relative<A>(blocks.q.z + i, normal.peak_q);
    const Compared<A> x(t_p, t_q, normal);
    V g_p, g_q;
    if (kKind == Divergence::kKl) {
      g_p = x.p() * (x.ratio - p.offset);
      g_q = -x.difference();
    } else if (kKind == Divergence::kAlpha) {
      const V r = exp<A>(t_p * of_p + t_q * of_q) * inverse_r;
      g_p = (p.offset * x.p() - r) * over_q;
      g_q = (q.offset * x.q() - r) * over_p;
    } else if (kKind == Divergence::kJs) {
      V log_p, log_q;
      x.to_mixture(normal, log_p, log_q);
      g_p = of_p * x.p() * (log_p - p.offset);
      g_q = of_q * x.q() * (log_q - q.offset);
    } else {
      const V sign = x.sign();
      g_p = S(0.5) * x.p() * (sign - p.offset);
      g_q = S(0.5) * x.q() * (q.offset - sign);
    }
    if (p.wanted) store_vector(blocks.p.z + i, p.gradient(x.p(), t_p - normal.log_p, g_p));
    if (q.wanted) store_vector(blocks.q.z + i, q.gradient(x.q(), t_q - normal.log_q, g_q));
  }
}

template <class A, Divergence kKind>
void grad_row(const PairRows& a, int64_t row, Blocks<A>& blocks) {
  const Map<A> map_p(a.p, row), map_q(a.q, row);
  const Running<A> p(a.p, row, false), q(a.q, row, false);
  const Normal<A> normal(p, q, a.weight);
  const Coefficients<A> coef_p(a.p, row), coef_q(a.q, row);
  const auto write = [&](const LogitRows& side, const Map<A>& map, const Running<A>& running,
                         const Coefficients<A>& coef, Block<A>& block, int64_t start) {
    if (!coef.wanted) return;
    const int64_t target = side.targets[row] - side.col0 - start;
    if (target >= 0 && target < block_size(side, start)) block.z[target] += coef.onehot;
    const bool wrong = outside(side, row) || running.target != running.target;
    write_any(side, row, start, block, wrong ? kNaN<A> : map.factor, map.capped);
  };
  for (int64_t start = 0; start < a.p.cols; start += kBlock) {
    read_any(a.p, row, map_p, start, blocks.p, map_p.capped && coef_p.wanted);
    read_any(a.q, row, map_q, start, blocks.q, map_q.capped && coef_q.wanted);
    differentiate_both<A, kKind>(blocks, block_size(a.p, start), normal, coef_p, coef_q);
    write(a.p, map_p, p, coef_p, blocks.p, start);
    write(a.q, map_q, q, coef_q, blocks.q, start);
  }
}

template <class A>
using PairRow = void (*)(const PairRows&, int64_t row, Blocks<A>&);

template <class A>
void each_row(PairRow<A> kernel, const PairRows& a, int64_t begin, int64_t end) {
  Blocks<A> blocks;
  for (int64_t row = begin; row < end; ++row) {
    const bool skipped = skip_row(a.p, row);
    if (skip_row(a.q, row) || skipped) continue;
    kernel(a, row, blocks);
  }
}

template <class A>
PairRow<A> pick_stats(Divergence kind) {
  return kind == Divergence::kAlpha ? stats_row<A, Divergence::kAlpha> : stats_row<A, Divergence::kKl>;
}

template <class A>
PairRow<A> pick_sums(Divergence kind) {
  return kind == Divergence::kJs ? sums_row<A, Divergence::kJs> : sums_row<A, Divergence::kTv>;
}

template <class A>
PairRow<A> pick_grad(Divergence kind) {
  switch (kind) {
    case Divergence::kKl:
      return grad_row<A, Divergence::kKl>;
    case Divergence::kAlpha:
      return grad_row<A, Divergence::kAlpha>;
    case Divergence::kJs:
      return grad_row<A, Divergence::kJs>;
    default:
      return grad_row<A, Divergence::kTv>;
  }
}

#define PREFCORE_PAIR_LOOP(pick)                                                            \
  return a.p.type == Type::kFloat64 ? each_row<Double>(pick<Double>(a.kind), a, begin, end) \
                                    : each_row<Single>(pick<Single>(a.kind), a, begin, end)

void stats(const PairRows& a, int64_t begin, int64_t end) { PREFCORE_PAIR_LOOP(pick_stats); }
void sums(const PairRows& a, int64_t begin, int64_t end) { PREFCORE_PAIR_LOOP(pick_sums); }
void grad(const PairRows& a, int64_t begin, int64_t end) { PREFCORE_PAIR_LOOP(pick_grad); }

}  // namespace

const PairKernels pair_kernels = {stats, sums, grad};

}  // namespace prefcore::cpu::PREFCORE_ISA
