// gather_rows on the CPU: pieces of rows over threads.
#include "gather_rows.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

namespace prefcore {
namespace cpu {
namespace {

// Bytes moved, about 0.1 ms of one core's time, from which on waking a second one pays.
constexpr std::int64_t kParallel = 1 << 20;

// A task moves about this many bytes: some microseconds, far more than it costs to hand one out.
constexpr std::int64_t kTask = 1 << 16;

// Calls body(row, first, last) for pieces [first, last) of `width` units of `size` bytes in each row.
template <typename Body>
void for_each_piece(std::int64_t rows, std::int64_t width, std::int64_t size, std::int64_t work, int threads,
                    const Body& body) {
  if (rows == 0 || width == 0) return;
  const std::int64_t piece = std::min(width, kTask / size);
  const std::int64_t pieces = (width + piece - 1) / piece;
  const std::int64_t run = std::max<std::int64_t>(1, kTask / (piece * size));
#pragma omp parallel for schedule(dynamic, run) num_threads(threads) if (threads > 1 && work >= kParallel)
  for (std::int64_t task = 0; task < rows * pieces; ++task) {
    const std::int64_t first = task % pieces * piece;
    body(task / pieces, first, std::min(width, first + piece));
  }
}

// Sums columns [*c, last) as far as blocks of Width go.
template <int Width, typename T>
void sum_blocks(const GatherGrad& g, std::int64_t n, std::int64_t* c, std::int64_t last) {
  const T* grad = static_cast<const T*>(g.grad);
  T* out = static_cast<T*>(g.out) + n * g.columns;
  const std::int32_t begin = g.inverse.offsets[n], end = g.inverse.offsets[n + 1];
  for (; *c + Width <= last; *c += Width) {
    sum_places<Width, 1>(grad + *c, g.stride, g.inverse.places + begin, end - begin, 1, 0, out + *c);
  }
}

template <typename T>
void backward(const GatherGrad& g, int threads) {
  if (g.rows == 0) return;
  const std::int64_t moved = g.rows + g.inverse.offsets[g.rows];  // rows written and read
  for_each_piece(g.rows, g.columns, sizeof(T), moved * g.columns * static_cast<std::int64_t>(sizeof(T)),
                 threads, [&](std::int64_t n, std::int64_t first, std::int64_t last) {
                   sum_blocks<1024, T>(g, n, &first, last);  // sums that stay in the first cache
                   sum_blocks<16, T>(g, n, &first, last);
                   sum_blocks<1, T>(g, n, &first, last);
                 });
}

}  // namespace

void gather_rows_forward(const Gather& g, int threads) {
  const char* x = static_cast<const char*>(g.x);
  char* out = static_cast<char*>(g.out);
  for_each_piece(g.places, g.bytes, 1, 2 * g.places * g.bytes, threads,
                 [&](std::int64_t m, std::int64_t first, std::int64_t last) {
                   const std::int32_t n = g.index[m];
                   char* to = out + m * g.bytes + first;
                   if (is_row(n, g.rows)) {
                     std::memcpy(to, x + n * g.stride + first, last - first);
                   } else {
                     std::memset(to, static_cast<int>(filler(n) & 0xff), last - first);
                   }
                 });
}

void gather_rows_backward(const GatherGrad& g, int threads) {
  switch (g.type) {
    case Type::kFloat32:
      return backward<float>(g, threads);
    case Type::kBFloat16:
      return backward<BFloat16>(g, threads);
    case Type::kFloat16:
      return backward<Float16>(g, threads);
    case Type::kFloat64:
      return backward<double>(g, threads);
  }
  throw std::invalid_argument("no such type");
}

}  // namespace cpu
}  // namespace prefcore
