// Rows gathered by an index, and the gradient of that: for each source row, the sum over the places it went
// to.
//
// A sum starts from the row of the first place and adds the others in their order, in float32 for the half
// types, and is rounded once. Nothing is shared between columns, so however they are split over workers the
// bits are the same; a row with one place is copied.
#pragma once

#include <cstdint>

#include "core/number.h"

namespace prefcore {

// Where each source row went: row n to places[offsets[n] .. offsets[n + 1]), in rising order.
struct RowInverse {
  const std::int32_t* offsets;
  const std::int32_t* places;
};

PREFCORE_HD bool is_row(std::int32_t index, std::int64_t rows) { return index >= 0 && index < rows; }

// What fills a place whose index is no row: zero bits for -1, all ones, a NaN in every type, for the rest.
PREFCORE_HD std::uint32_t filler(std::int32_t index) { return index == -1 ? 0 : ~std::uint32_t{0}; }

// Neighbouring numbers. Packs of up to 16 bytes are aligned to their size, for the GPU to move each by one
// instruction.
template <typename T, int Width>
struct alignas(sizeof(T) * Width <= 16 ? sizeof(T) * Width : alignof(T)) Pack {
  T values[Width];
};

template <typename T, int Width>
PREFCORE_HD void store(const Pack<T, Width>& pack, T* to) {
#ifdef __CUDA_ARCH__
  if constexpr (sizeof(pack) == 16) {
    // By name, since of an assignment the compiler may store the members one by one.
    uint4 word;
    std::memcpy(&word, &pack, sizeof word);
    __stcg(reinterpret_cast<uint4*>(to), word);
    return;
  }
#endif
  *reinterpret_cast<Pack<T, Width>*>(to) = pack;
}

template <int Width, typename T>
PREFCORE_HD void add(const T* values, typename Summed<T>::Sum* sum) {
  for (int j = 0; j < Width; ++j) sum[j] += Summed<T>::widen(values[j]);
}

// One worker's columns of one source row's gradient: `Packs` packs, `step` elements apart, as far as they
// begin before `columns`. `grad`, of rows `stride` elements apart, and `out` point to the first of them.
template <int Width, int Packs, typename T>
PREFCORE_HD void sum_places(const T* grad, std::int64_t stride, const std::int32_t* places,
                            std::int32_t count, std::int64_t columns, std::int64_t step, T* out) {
  using Number = Summed<T>;
  using Chunk = Pack<T, Width>;
  Chunk held[Packs] = {};
  const auto load = [&](std::int32_t place) {
    const T* row = grad + place * stride;
    for (int p = 0; p < Packs; ++p) {
      if (p * step < columns) held[p] = *reinterpret_cast<const Chunk*>(row + p * step);
    }
  };
  if (count > 0) load(places[0]);
  if (count > 1) {
    typename Number::Sum sum[Packs][Width];
    for (int p = 0; p < Packs; ++p) {
      for (int j = 0; j < Width; ++j) sum[p][j] = Number::widen(held[p].values[j]);
    }
    for (std::int32_t i = 1; i < count; ++i) {
      if constexpr (Packs == 1) {
        add<Width>(grad + places[i] * stride,
                   sum[0]);  // where it lies: a long pack is held in memory, not in registers
      } else {
        load(places[i]);
        for (int p = 0; p < Packs; ++p) add<Width>(held[p].values, sum[p]);
      }
    }
    for (int p = 0; p < Packs; ++p) {
      for (int j = 0; j < Width; ++j) held[p].values[j] = Number::narrow(sum[p][j]);
    }
  }
  for (int p = 0; p < Packs; ++p) {
    if (p * step < columns) store(held[p], out + p * step);
  }
}

}  // namespace prefcore
