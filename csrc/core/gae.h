// Generalised advantage estimation of a ragged sequence as a scan: the arithmetic that the CPU and the GPU
// share.
//
// With X = lam A + V at each token, and A = 0, V = bootstrap behind the last one, the recurrence
//   delta_t = r_t + gamma V_next - V_t,  A_t = delta_t + gamma lam A_next
// needs a single number of the next token:
//   G_t = r_t + gamma X_next,  A_t = G_t - V_t,  X_t = lam r_t + (1 - lam) V_t + gamma lam X_next.
// So X is a scan of affine maps x -> a x + b, from the last token to the first, in which a masked token is
// the identity.
//
// Rows of kRow tokens are counted from the sequence's end; only the last one may reach beyond the first
// token, and what it would find there nobody uses. A row is scanned in log2(kRow) steps of doubling distance;
// kRows rows, a tile, are composed one after another, and so are the tiles. This order, and with it every bit
// of the result, is the same whoever computes it and whatever else is in the batch. It needs multiplications
// and additions to stay apart: compile without contraction to fused multiply-adds.
#pragma once

#include <cstdint>

#include "core/portable.h"

namespace prefcore {
namespace gae {

constexpr int kRow = 32;
constexpr int kRows = 8;
constexpr int kTile = kRow * kRows;

struct Affine {
  double a;
  double b;

  PREFCORE_HD double operator()(double x) const { return b + a * x; }
};

PREFCORE_HD Affine identity() { return {1.0, 0.0}; }

// First `inner`, then `outer`.
PREFCORE_HD Affine compose(Affine outer, Affine inner) { return {outer.a * inner.a, outer(inner.b)}; }

// The tokens of one sequence. Without values all are 0, without a mask every token counts.
template <typename T>
struct Tokens {
  const T* rewards;
  const T* values;
  const bool* mask;
};

PREFCORE_HD std::int32_t count_tiles(std::int32_t length) { return length / kTile + (length % kTile > 0); }

// One worker that holds all lanes of a row. A warp has the same members, with a lane in each thread.
struct Alone {
  static constexpr int kHeld = kRow;
  PREFCORE_HD static int lane(int held) { return held; }
  // How many of the worker's lanes may have one `distance` above.
  PREFCORE_HD static int reach(int distance) { return kRow - distance; }
  // The number of the lane `distance` above a held one; undefined where there is none.
  PREFCORE_HD static double above(const double (&x)[kHeld], int held, int distance) {
    return x[held + distance];
  }
  PREFCORE_HD static double first(const double (&x)[kHeld]) { return x[0]; }
};

// The lanes' maps become their compositions with all those above: in each step lane l, the composition of
// `Distance` maps from l on, takes in that of lane l + Distance. Held lanes rise, so that those above are
// still the old ones. Where `Factors` is false, the a that a step multiplies by is the same for all lanes and
// is given as `factor`.
template <bool Factors, class Lanes, int Distance = 1>
PREFCORE_HD void scan_lanes(double factor, double (&a)[Lanes::kHeld], double (&b)[Lanes::kHeld]) {
  for (int j = 0; j < Lanes::reach(Distance); ++j) {
    const double b_above = Lanes::above(b, j, Distance);
    const double a_above = Factors ? Lanes::above(a, j, Distance) : 1.0;
    if (Lanes::lane(j) + Distance < kRow) {
      b[j] += (Factors ? a[j] : factor) * b_above;
      if (Factors) a[j] *= a_above;
    }
  }
  if constexpr (2 * Distance < kRow) scan_lanes<Factors, Lanes, 2 * Distance>(factor * factor, a, b);
}

// What all rows share: a, b of a token from gamma and lam, and without a mask every a of the scan.
template <class Lanes>
struct Decay {
  double gamma;
  double lam;
  double rest;                   // 1 - lam
  double factor;                 // gamma lam
  double scanned[Lanes::kHeld];  // factor^(kRow - lane), multiplied as the scan does

  PREFCORE_HD Decay(double gamma, double lam) : gamma(gamma), lam(lam), rest(1.0 - lam), factor(gamma * lam) {
    double none[Lanes::kHeld];
    for (int j = 0; j < Lanes::kHeld; ++j) scanned[j] = factor, none[j] = 0.0;
    scan_lanes<true, Lanes>(0.0, scanned, none);
  }
};

template <bool Masked, class Lanes, typename T>
struct Row {
  static constexpr int kHeld = Lanes::kHeld;
  T reward[kHeld];
  T value[kHeld];
  bool kept[kHeld];
  double a[kHeld];
  double b[kHeld];

  // The row's lanes are the tokens from `first` on, which is negative where the sequence begins within the
  // row.
  template <bool Whole>
  PREFCORE_HD void load(const Tokens<T>& tokens, std::int32_t first) {
    for (int j = 0; j < kHeld; ++j) {
      const std::int32_t t = first + Lanes::lane(j);
      const bool there = Whole || t >= 0;
      reward[j] = there ? tokens.rewards[t] : T(0);
      value[j] = there && tokens.values != nullptr ? tokens.values[t] : T(0);
      if (Masked) kept[j] = there && tokens.mask[t];
    }
  }

  PREFCORE_HD void scan(const Decay<Lanes>& decay) {
    for (int j = 0; j < kHeld; ++j) {
      const bool counts = !Masked || kept[j];
      const double b_here =
          decay.lam * static_cast<double>(reward[j]) + decay.rest * static_cast<double>(value[j]);
      b[j] = counts ? b_here : 0.0;
      if (Masked) a[j] = counts ? decay.factor : 1.0;
    }
    scan_lanes<Masked, Lanes>(decay.factor, a, b);
  }

  // From the X behind the row to the X at its first token.
  PREFCORE_HD Affine whole(const Decay<Lanes>& decay) const {
    return {Lanes::first(Masked ? a : decay.scanned), Lanes::first(b)};
  }

  // Writes the row's results, where `behind` is the X behind it.
  template <bool Whole>
  PREFCORE_HD void finish(const Decay<Lanes>& decay, double behind, std::int32_t first, T* advantages,
                          T* returns) {
    for (int j = 0; j < kHeld; ++j) b[j] += (Masked ? a[j] : decay.scanned[j]) * behind;
    for (int j = 0; j < kHeld; ++j) {
      const bool last = Lanes::lane(j) == kRow - 1;
      double next = behind;
      if (kHeld == 1 || !last) {
        const double above = Lanes::above(b, j, 1);
        next = last ? behind : above;
      }
      const std::int32_t t = first + Lanes::lane(j);
      if (!Whole && t < 0) continue;
      const double g = static_cast<double>(reward[j]) + decay.gamma * next;
      const bool counts = !Masked || kept[j];
      advantages[t] = counts ? static_cast<T>(g - static_cast<double>(value[j])) : T(0);
      returns[t] = counts ? static_cast<T>(g) : T(0);
    }
  }
};

}  // namespace gae
}  // namespace prefcore
