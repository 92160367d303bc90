// A packed batch of sequences.
#pragma once

#include <cstdint>

namespace prefcore {

// Sequence s is the elements offsets[s] .. offsets[s + 1); there are sequences + 1 offsets, from 0 upwards.
struct Ragged {
  const std::int32_t* offsets;
  std::int64_t sequences;
};

}  // namespace prefcore
