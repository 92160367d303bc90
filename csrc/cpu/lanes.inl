// Vectors of PREFCORE_LANE_BYTES and the arithmetic of the row kernels on them, for one instruction set.
//
// Everything is static and no C++ standard header comes in: an inline function that two instruction sets both
// emit would be merged by the linker, and the copy that is kept may not run on this machine. Compile with
// -ffp-contract=off: z must round alike wherever it is computed, or exp(z - peak) would miss 1 at the peak.
#pragma once

#include <stdint.h>
#if PREFCORE_LANE_BYTES > 16
#include <immintrin.h>
#endif

#include "core/number.h"

#define PREFCORE_INLINE static inline __attribute__((always_inline))
#define PREFCORE_MEMBER inline __attribute__((always_inline))

namespace prefcore::cpu::PREFCORE_ISA {

#define PREFCORE_VECTOR(T, name, bytes) typedef T name __attribute__((vector_size(bytes)))
PREFCORE_VECTOR(float, Floats, PREFCORE_LANE_BYTES);
PREFCORE_VECTOR(uint32_t, Words, PREFCORE_LANE_BYTES);
PREFCORE_VECTOR(double, Doubles, PREFCORE_LANE_BYTES);
PREFCORE_VECTOR(uint64_t, Longs, PREFCORE_LANE_BYTES);
PREFCORE_VECTOR(uint16_t, Halves, PREFCORE_LANE_BYTES / 2);
#undef PREFCORE_VECTOR

struct Single {
  using Scalar = float;
  using V = Floats;
  using Bits = Words;
  using Word = uint32_t;
  static constexpr int kFraction = 23, kBias = 127;
  static constexpr float kRounder = 0x1.8p23f;  // x + kRounder holds round(x) in its low bits
  static constexpr float kLog2e = 0x1.715476p0f;
  static constexpr float kLn2High = 0x1.63p-1f, kLn2Low = -0x1.bd0106p-13f;  // n * kLn2High is exact
  static constexpr float kUnderflow = -0x1.5d58ap6f;                         // log(2^-126)
  static constexpr float kRootHalf = 0x1.6a09e6p-1f;
  static constexpr int kDegree = 7;
  static constexpr int kLogTerms = 4;
};

struct Double {
  using Scalar = double;
  using V = Doubles;
  using Bits = Longs;
  using Word = uint64_t;
  static constexpr int kFraction = 52, kBias = 1023;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr double kLog2e = 0x1.71547652b82fep0;
  static constexpr double kLn2High = 0x1.62e42feep-1, kLn2Low = 0x1.a39ef35793c76p-33;
  static constexpr double kUnderflow = -0x1.6232bdd7abcd2p9;  // log(2^-1022)
  static constexpr double kRootHalf = 0x1.6a09e667f3bcdp-1;
  static constexpr int kDegree = 13;
  static constexpr int kLogTerms = 10;
};

template <class A>
constexpr int kLanes = PREFCORE_LANE_BYTES / sizeof(typename A::Scalar);

template <class A>
PREFCORE_INLINE typename A::V splat(typename A::Scalar x) {
  return x - typename A::V{};
}

PREFCORE_INLINE Floats fma(Floats a, Floats b, Floats c) {
#if PREFCORE_LANE_BYTES == 64
  return _mm512_fmadd_ps(a, b, c);
#elif PREFCORE_LANE_BYTES == 32
  return _mm256_fmadd_ps(a, b, c);
#else
  return a * b + c;
#endif
}

PREFCORE_INLINE Doubles fma(Doubles a, Doubles b, Doubles c) {
#if PREFCORE_LANE_BYTES == 64
  return _mm512_fmadd_pd(a, b, c);
#elif PREFCORE_LANE_BYTES == 32
  return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// The larger of each pair; a NaN in x is passed over.
template <class V>
PREFCORE_INLINE V larger(V x, V top) {
  return x > top ? x : top;
}

template <class V>
PREFCORE_INLINE V load_vector(const void* from) {
  V v;
  __builtin_memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
PREFCORE_INLINE void store_vector(void* to, V v) {
  __builtin_memcpy(to, &v, sizeof v);
}

// Sums and maxima over lanes go in one fixed order: halves folded together.
template <class A>
PREFCORE_INLINE typename A::Scalar sum_lanes(typename A::V v) {
  typename A::Scalar x[kLanes<A>];
  store_vector(x, v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

template <class A>
PREFCORE_INLINE typename A::Scalar max_lanes(typename A::V v) {
  typename A::Scalar x[kLanes<A>];
  store_vector(x, v);
  for (int half = kLanes<A> / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) x[i] = x[i] > x[i + half] ? x[i] : x[i + half];
  }
  return x[0];
}

// e^x = scale * (1 + rest) with scale = 2^n and |x - n log 2| <= log(2) / 2; meaningless below kUnderflow.
template <class A>
struct Power {
  typename A::V scale, rest;
};

template <class A>
PREFCORE_INLINE Power<A> power(typename A::V x) {
  using V = typename A::V;
  using Bits = typename A::Bits;
  using S = typename A::Scalar;
  const V shifted = fma(x, splat<A>(A::kLog2e), splat<A>(A::kRounder));
  const V n = shifted - A::kRounder;
  const V r = fma(n, splat<A>(-A::kLn2Low), fma(n, splat<A>(-A::kLn2High), x));
  // Taylor's series, to the degree at which its remainder is below a tenth of a rounding.
  constexpr double kInverseFactorials[] = {1. / 2,       1. / 6,        1. / 24,        1. / 120,
                                           1. / 720,     1. / 5040,     1. / 40320,     1. / 362880,
                                           1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
  V series = splat<A>(static_cast<S>(kInverseFactorials[A::kDegree - 2]));
#pragma GCC unroll 16
  for (int k = A::kDegree - 3; k >= 0; --k) {
    series = fma(series, r, splat<A>(static_cast<S>(kInverseFactorials[k])));
  }
  const Bits exponent = ((Bits)shifted + A::kBias) << A::kFraction;
  return {(V)exponent, fma(r * r, series, r)};
}

// Exactly 1 at 0; exactly 0 at -inf and wherever the result would be subnormal; NaN at NaN. Not for x >
// log(max).
template <class A>
PREFCORE_INLINE typename A::V exp(typename A::V x) {
  const Power<A> p = power<A>(x);
  return x < A::kUnderflow ? typename A::V{} : fma(p.scale, p.rest, p.scale);
}

// e^x - 1, and e^x beside it, each to its own relative accuracy. Not for x > log(max).
template <class A>
PREFCORE_INLINE typename A::V expm1(typename A::V x, typename A::V& exp) {
  using V = typename A::V;
  const Power<A> p = power<A>(x);
  exp = x < A::kUnderflow ? V{} : fma(p.scale, p.rest, p.scale);
  return x < A::kUnderflow ? splat<A>(-1) : fma(p.scale, p.rest, p.scale - 1);
}

// log(1 + x) to its own relative accuracy, near 0 too. `sum` is 1 + x, normal and above 0: beside an x near
// -1 only the caller can know it.
template <class A>
PREFCORE_INLINE typename A::V log1p(typename A::V x, typename A::V sum) {
  using V = typename A::V;
  using Bits = typename A::Bits;
  using S = typename A::Scalar;
  // sum = 2^n (1 + f) with sqrt(1/2) <= 1 + f < sqrt(2), n counted from -kBias so that its bits stay a
  // number. The rounding of the sum matters only where n is 0, and is avoided there.
  const Bits one = (Bits)splat<A>(1);
  const Bits exponent = (((Bits)sum + (one - (Bits)splat<A>(A::kRootHalf))) >> A::kFraction) - A::kBias;
  const V n = (V)(exponent + (Bits)splat<A>(A::kRounder)) - A::kRounder;
  const V f = n == 0 ? x : (V)((Bits)sum - (exponent << A::kFraction)) - 1;
  // With s = f / (2 + f), log(1 + f) = 2 atanh(s) = f - (f^2 / 2 - s (f^2 / 2 + 2 s^2 (1/3 + s^2/5 + ...))):
  // roundings are of terms that are small beside f.
  const V s = f / (2 + f), square = s * s, half = f * f * S(0.5);
  V series = splat<A>(S(2. / (2 * A::kLogTerms + 1)));
#pragma GCC unroll 16
  for (int k = A::kLogTerms - 1; k > 0; --k) series = fma(series, square, splat<A>(S(2. / (2 * k + 1))));
  const V less = half - s * fma(series, square, half);
  return fma(n, splat<A>(A::kLn2High), f - (less - n * A::kLn2Low));
}

// tanh, and 1 - tanh^2 if asked for, by way of expm1(-2|x|): both keep their relative accuracy, near 0 and
// far.
template <class A>
PREFCORE_INLINE typename A::V tanh(typename A::V x, bool with_slope, typename A::V& slope) {
  using V = typename A::V;
  using Bits = typename A::Bits;
  const Bits sign_bit = (Bits)splat<A>(-typename A::Scalar(0));
  const Bits sign = (Bits)x & sign_bit;
  const V w = (V)((Bits)x | sign_bit) * 2;
  V e;
  const V less = expm1<A>(w, e);
  const V sum = 2 + less;
  if (with_slope) slope = 4 * e / (sum * sum);
  return (V)((Bits)(less / sum) ^ sign_bit ^ sign);
}

// Element types of tiles: how a vector of them is read into the accumulation type and written from it,
// rounding to nearest even.

struct Float32 {
  using A = Single;
  using Stored = float;
  PREFCORE_INLINE Floats load(const float* from) { return load_vector<Floats>(from); }
  PREFCORE_INLINE void store(float* to, Floats v) { store_vector(to, v); }
};

struct Float64 {
  using A = Double;
  using Stored = double;
  PREFCORE_INLINE Doubles load(const double* from) { return load_vector<Doubles>(from); }
  PREFCORE_INLINE void store(double* to, Doubles v) { store_vector(to, v); }
};

struct BFloat16 {
  using A = Single;
  using Stored = uint16_t;
  PREFCORE_INLINE Floats widen(Words bits) { return (Floats)(bits << 16); }
  PREFCORE_INLINE Words narrow(Floats v) {
    const Words bits = (Words)v;
    return v != v ? (bits >> 16) | 0x40 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  }
  PREFCORE_INLINE Floats load(const uint16_t* from) {
    return widen(__builtin_convertvector(load_vector<Halves>(from), Words));
  }
  PREFCORE_INLINE void store(uint16_t* to, Floats v) {
    store_vector(to, __builtin_convertvector(narrow(v), Halves));
  }
  PREFCORE_INLINE Floats round(Floats v) { return widen(narrow(v)); }
};

struct Float16 {
  using A = Single;
  using Stored = uint16_t;
#if PREFCORE_LANE_BYTES == 64
  PREFCORE_INLINE Floats load(const uint16_t* from) { return _mm512_cvtph_ps(load_vector<__m256i>(from)); }
  PREFCORE_INLINE void store(uint16_t* to, Floats v) { store_vector(to, _mm512_cvtps_ph(v, 0)); }
  PREFCORE_INLINE Floats round(Floats v) { return _mm512_cvtph_ps(_mm512_cvtps_ph(v, 0)); }
#elif PREFCORE_LANE_BYTES == 32
  PREFCORE_INLINE Floats load(const uint16_t* from) { return _mm256_cvtph_ps(load_vector<__m128i>(from)); }
  PREFCORE_INLINE void store(uint16_t* to, Floats v) { store_vector(to, _mm256_cvtps_ph(v, 0)); }
  PREFCORE_INLINE Floats round(Floats v) { return _mm256_cvtph_ps(_mm256_cvtps_ph(v, 0)); }
#else
  PREFCORE_INLINE Floats widen(Words half) {
    const Words rebased = ((half & 0x7fff) << 13) + (112u << 23);
    const Words special = rebased + (112u << 23);  // infinities and NaN
    // A subnormal half is 2^-14 times its fraction: give it that leading 1, then take the 1 away.
    const Words subnormal = (Words)((Floats)(rebased + (1u << 23)) - 0x1p-14f);
    const Words exponent = half & 0x7c00;
    const Words magnitude = exponent == 0x7c00 ? special : exponent == 0 ? subnormal : rebased;
    return (Floats)(magnitude | (half & 0x8000) << 16);
  }
  PREFCORE_INLINE Words narrow(Floats v) {
    const Words zero{}, bits = (Words)v & 0x7fffffff;
    const Words normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    // Adding 1/2 leaves a subnormal half, rounded, in the low bits of the sum.
    const Words subnormal = (Words)((Floats)bits + 0.5f) - (126u << 23);
    const Words finite = bits < (113u << 23) ? subnormal : normal;
    const Words special = bits > 0x7f800000u ? zero + 0x7e00 : zero + 0x7c00;
    return (bits >= (143u << 23) ? special : finite) | ((Words)v >> 16 & 0x8000);
  }
  PREFCORE_INLINE Floats load(const uint16_t* from) {
    return widen(__builtin_convertvector(load_vector<Halves>(from), Words));
  }
  PREFCORE_INLINE void store(uint16_t* to, Floats v) {
    store_vector(to, __builtin_convertvector(narrow(v), Halves));
  }
  PREFCORE_INLINE Floats round(Floats v) { return widen(narrow(v)); }
#endif
};

PREFCORE_INLINE Floats round_to(Type type, Floats v) {
  return type == Type::kBFloat16 ? BFloat16::round(v) : type == Type::kFloat16 ? Float16::round(v) : v;
}

// Through float32, as torch converts.
PREFCORE_INLINE Doubles round_to(Type type, Doubles v) {
  if (type == Type::kFloat64) return v;
  float narrow[kLanes<Single>] = {};
  double wide[kLanes<Double>];
  store_vector(wide, v);
  for (int i = 0; i < kLanes<Double>; ++i) narrow[i] = static_cast<float>(wide[i]);
  store_vector(narrow, round_to(type, load_vector<Floats>(narrow)));
  for (int i = 0; i < kLanes<Double>; ++i) wide[i] = narrow[i];
  return load_vector<Doubles>(wide);
}

}  // namespace prefcore::cpu::PREFCORE_ISA
