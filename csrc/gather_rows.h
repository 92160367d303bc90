// Entry points of gather_rows on each device. Buffers are on that device; `out` is dense, the rows of what is
// read are dense and lie any distance apart.
#pragma once

#include <cstdint>

#include "core/gather_rows.h"

namespace prefcore {

// out[m] = x[index[m]]: bytes, whatever their type. An index of -1 gives zeros, one out of range NaN.
struct Gather {
  const void* x;
  std::int64_t stride;  // bytes between rows of x
  std::int64_t rows;    // of x
  const std::int32_t* index;
  std::int64_t places;  // rows of out
  std::int64_t bytes;   // of a row
  void* out;
};

// out[n] = the sum of grad's rows at the places of source row n.
struct GatherGrad {
  Type type;
  const void* grad;
  std::int64_t stride;  // elements between rows of grad
  RowInverse inverse;
  std::int64_t rows;     // of out
  std::int64_t columns;  // elements of a row
  void* out;
};

namespace cpu {

// Run on at most `threads` threads, whose number does not change any bit of the result.
void gather_rows_forward(const Gather& gather, int threads);
void gather_rows_backward(const GatherGrad& gather, int threads);

}  // namespace cpu

namespace cuda {

// `stream` is a cudaStream_t of `device`. Throw std::runtime_error on a failed launch.
void gather_rows_forward(const Gather& gather, int device, void* stream);
void gather_rows_backward(const GatherGrad& gather, int device, void* stream);

}  // namespace cuda

}  // namespace prefcore
