// Number types of tensors, and the arithmetic of those that a host compiler need not have.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/portable.h"

namespace prefcore {

enum class Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFloat64 = 3 };

struct BFloat16 {
  std::uint16_t bits;
};

struct Float16 {
  std::uint16_t bits;
};

template <typename To, typename From>
PREFCORE_HD To reinterpret_bits(From from) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

// The type in which numbers of type T are summed, and the way there and, rounded to nearest even, back.
template <typename T>
struct Summed {
  using Sum = T;
  PREFCORE_HD static T widen(T value) { return value; }
  PREFCORE_HD static T narrow(T value) { return value; }
};

template <>
struct Summed<BFloat16> {
  using Sum = float;
  PREFCORE_HD static float widen(BFloat16 value) {
    return reinterpret_bits<float>(static_cast<std::uint32_t>(value.bits) << 16);
  }
  PREFCORE_HD static BFloat16 narrow(float value) {
    const std::uint32_t bits = reinterpret_bits<std::uint32_t>(value);
    const std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    return {static_cast<std::uint16_t>(nan ? (bits >> 16) | 0x40 : rounded)};
  }
};

template <>
struct Summed<Float16> {
  using Sum = float;
  PREFCORE_HD static float widen(Float16 value) {
    const std::uint32_t half = value.bits;
    const std::uint32_t rebased = ((half & 0x7fff) << 13) + (112u << 23);
    // A subnormal half is 2^-14 times its fraction: give it that leading 1, then take the 1 away.
    const float subnormal = reinterpret_bits<float>(rebased + (1u << 23)) - 0x1p-14f;
    const std::uint32_t exponent = half & 0x7c00;
    const std::uint32_t magnitude = exponent == 0x7c00 ? rebased + (112u << 23)  // infinities and NaN
                                    : exponent == 0    ? reinterpret_bits<std::uint32_t>(subnormal)
                                                       : rebased;
    return reinterpret_bits<float>(magnitude | (half & 0x8000) << 16);
  }
  PREFCORE_HD static Float16 narrow(float value) {
    const std::uint32_t sign = reinterpret_bits<std::uint32_t>(value) >> 16 & 0x8000;
    const std::uint32_t bits = reinterpret_bits<std::uint32_t>(value) & 0x7fffffff;
    const std::uint32_t normal = (bits - (112u << 23) + 0xfff + ((bits >> 13) & 1)) >> 13;
    // Adding 1/2 leaves a subnormal half, rounded, in the low bits of the sum.
    const std::uint32_t subnormal =
        reinterpret_bits<std::uint32_t>(reinterpret_bits<float>(bits) + 0.5f) - (126u << 23);
    const std::uint32_t finite = bits < (113u << 23) ? subnormal : normal;
    const std::uint32_t special = bits > 0x7f800000u ? 0x7e00 : 0x7c00;
    return {static_cast<std::uint16_t>((bits >= (143u << 23) ? special : finite) | sign)};
  }
};

}  // namespace prefcore
