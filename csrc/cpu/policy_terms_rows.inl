// The loop of policy_terms for one instruction set.
#include "cpu/lanes.inl"
#include "cpu/policy_terms.h"

namespace prefcore::cpu::PREFCORE_ISA {
namespace {

template <class V>
PREFCORE_INLINE V at_least(V x, V bound) {
  return x < bound ? bound : x;  // a NaN in x stays
}

template <class V>
PREFCORE_INLINE V at_most(V x, V bound) {
  return x > bound ? bound : x;
}

template <class V, class M>
PREFCORE_INLINE V one_where(M mask, V one) {
  return mask ? one : V{};
}

template <class A>
struct Sums {
  typename A::V surrogate{}, ratio{}, drift{}, low{}, high{}, dual{}, kl{}, entropy{};
};

template <class E>
struct Loop {
  using A = typename E::A;
  using V = typename A::V;
  using S = typename A::Scalar;
  static constexpr int kWidth = kLanes<A>;

  // Reads whole vectors; the last one may hold fewer tokens, and zeros beside them.
  template <bool Whole>
  PREFCORE_INLINE V read(const void* from, int64_t at, int64_t left) {
    const S* start = static_cast<const S*>(from) + at;
    if (Whole) return load_vector<V>(start);
    V v{};
    __builtin_memcpy(&v, start, left * sizeof(S));
    return v;
  }

  template <bool Whole>
  PREFCORE_INLINE void write(void* to, int64_t at, int64_t left, V v) {
    S* start = static_cast<S*>(to) + at;
    if (Whole) {
      store_vector(start, v);
    } else {
      __builtin_memcpy(start, &v, left * sizeof(S));
    }
  }

  template <bool Whole>
  PREFCORE_INLINE void step(const PolicyTokens& t, int64_t at, int64_t left, Sums<A>& sums) {
    const V one = splat<A>(1), zero{};
    const V low = splat<A>(S(t.low)), high = splat<A>(S(t.high)), clamp = splat<A>(S(t.clamp));
    const V x = read<Whole>(t.logps, at, left);
    const V a = t.advantages ? read<Whole>(t.advantages, at, left) : zero;
    const V w = t.weights ? read<Whole>(t.weights, at, left) : one;

    V q = zero;
    if (t.form != Form::kValue) {
      if (t.log_ratio) {
        q = read<Whole>(t.log_ratio, at, left);
      } else if (t.old_logps) {
        q = x - read<Whole>(t.old_logps, at, left);
      }
    }
    V bounded = q, ratio = one, slope = one, change = zero;  // slope: of the ratio by x
    if (t.log_ratio || t.old_logps) {
      bounded = at_most(at_least(q, -clamp), clamp);
      change = expm1<A>(bounded, ratio);
      slope = q == bounded ? ratio : zero;
    }

    V value = zero, d = zero, below = zero, above = zero, dual = zero;
    switch (t.form) {
      case Form::kNone:
        break;
      case Form::kReinforce:
        value = -a * x * w;
        d = -a * w;
        break;
      case Form::kClip: {
        const V free = -ratio * a, held = -at_most(at_least(ratio, low), high) * a;
        const auto under = (ratio < low) & (a < zero), over = (ratio > high) & (a > zero);
        const V worst = free > held ? free : held, most = splat<A>(S(t.dual)) * -a;
        const auto capped = (a < zero) & (worst > most);
        value = (capped ? most : worst) * w;
        d = under | over | capped ? zero : -slope * a * w;
        below = one_where(under & ~capped, one), above = one_where(over, one), dual = one_where(capped, one);
        break;
      }
      case Form::kCispo: {
        d = -at_most(at_least(ratio, low), high) * a * w;
        value = d * x;
        below = one_where(ratio < low, one), above = one_where(ratio > high, one);
        break;
      }
      case Form::kSapo: {
        const V tau = a > zero ? high : low;
        const V z = tau * (ratio - 1);
        V fall;
        expm1<A>(at_least((z > zero ? -z : z), splat<A>(-80)), fall);
        const V small = fall / (one + fall), large = one / (one + fall);  // of e^-|z|
        value = -(z > zero ? large : small) * (splat<A>(4) / tau) * a * w;
        d = splat<A>(-4) * small * large * slope * a * w;
        break;
      }
      case Form::kLogClip: {
        const auto under = (q < low) & ~(a > zero), over = (q > high) & (a > zero);
        value = over ? high : under ? low : q;
        d = under | over ? zero : one;
        below = one_where(under, one), above = one_where(over, one);
        break;
      }
      case Form::kValue: {
        const V half = splat<A>(S(0.5)), error = x - a;
        V near = x;
        if (t.old_logps) {
          const V before = read<Whole>(t.old_logps, at, left), moved = x - before;
          const V held = at_most(at_least(moved, -high), high);
          near = moved == held ? x : before + held;
        }
        const V other = near - a, plain = error * error, clipped = other * other;
        const auto worse = clipped > plain;
        value = half * (worse ? clipped : plain) * w;
        d = worse ? zero : error * w;
        below = one_where(worse & (near > x), one), above = one_where(worse & (near < x), one);
        break;
      }
    }

    V loss = value, penalty = zero;
    if (t.kl != Kl::kNone) {
      const V coef = t.kl_coefs ? read<Whole>(t.kl_coefs, at, left) : splat<A>(S(t.kl_coef));
      V pull = zero;
      if (t.kl == Kl::kExact) {
        penalty = read<Whole>(t.kl_values, at, left);
      } else {
        const V u = read<Whole>(t.ref_logps, at, left) - x;
        V k3 = zero, push = zero;
        if (t.kl == Kl::kK3 || t.kl == Kl::kK3Straight || t.kl == Kl::kK3Corrected) {
          const V held = at_most(at_least(u, -clamp), clamp);
          V exp;
          const V grown = expm1<A>(held, exp);
          k3 = grown - held;
          push = u == held ? -grown : zero;
        }
        switch (t.kl) {
          case Kl::kK1:
          case Kl::kK1Straight:
            penalty = -u;
            break;
          case Kl::kK2:
            penalty = splat<A>(S(0.5)) * u * u;
            break;
          case Kl::kK3Corrected:
            penalty = ratio * k3;
            break;
          default:
            penalty = k3;
        }
        pull = t.kl == Kl::kK1            ? one
               : t.kl == Kl::kK3          ? push
               : t.kl == Kl::kK3Corrected ? slope * k3 + ratio * push
                                          : -u;
      }
      loss += coef * penalty;
      d += coef * pull;
    }
    V entropy = zero;
    if (t.entropy) {
      entropy = read<Whole>(t.entropy, at, left);
      loss -= splat<A>(S(t.entropy_coef)) * entropy;
    }
    write<Whole>(t.losses, at, left, loss);
    if (t.slopes) write<Whole>(t.slopes, at, left, d);

    if (!Whole) {
      S lanes[kWidth] = {};
      for (int i = 0; i < left; ++i) lanes[i] = 1;
      const auto real = load_vector<V>(lanes) > zero;
      value = real ? value : zero, ratio = real ? ratio : zero, change = real ? change : bounded;
      below = real ? below : zero, above = real ? above : zero, dual = real ? dual : zero;
      penalty = real ? penalty : zero, entropy = real ? entropy : zero;
    }
    sums.surrogate += value, sums.ratio += ratio, sums.drift += change - bounded;
    sums.low += below, sums.high += above, sums.dual += dual;
    sums.kl += penalty, sums.entropy += entropy;
  }

  static void block(const PolicyTokens& t, int64_t begin, int64_t end) {
    double total[kPolicySums] = {};
    // Lanes hold no more than 64 numbers before they go to float64.
    constexpr int64_t kChunk = 64 * kWidth;
    for (int64_t start = begin; start < end; start += kChunk) {
      const int64_t stop = start + kChunk < end ? start + kChunk : end;
      Sums<A> sums;
      int64_t at = start;
      for (; at + kWidth <= stop; at += kWidth) step<true>(t, at, kWidth, sums);
      if (at < stop) step<false>(t, at, stop - at, sums);
      const V parts[kPolicySums] = {sums.surrogate, sums.ratio, sums.drift, sums.low,
                                    sums.high,      sums.dual,  sums.kl,    sums.entropy};
      for (int i = 0; i < kPolicySums; ++i) total[i] += sum_lanes<A>(parts[i]);
    }
    __builtin_memcpy(t.sums + begin / kPolicyBlock * kPolicySums, total, sizeof total);
  }
};

template <class E>
void blocks(const PolicyTokens& t, int64_t begin, int64_t end) {
  for (int64_t start = begin; start < end; start += kPolicyBlock) {
    Loop<E>::block(t, start, start + kPolicyBlock < end ? start + kPolicyBlock : end);
  }
}

}  // namespace

void policy_terms(const PolicyTokens& t, int64_t begin, int64_t end) {
  return t.type == Type::kFloat64 ? blocks<Float64>(t, begin, end) : blocks<Float32>(t, begin, end);
}

}  // namespace prefcore::cpu::PREFCORE_ISA
