// gather_rows on the GPU: a warp, or for short rows a part of one, per row; long rows are split over blocks.
#include <algorithm>
#include <climits>
#include <stdexcept>

#include "cuda/launch.h"
#include "gather_rows.h"

namespace prefcore {
namespace cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kBlock = 256;

// Loads that a thread has under way at a time: the sums of the backward leave registers for fewer.
constexpr int kCopies = 4;
constexpr int kSums = 2;

// threadIdx.x and blockIdx.y go over a row's units, threadIdx.y and blockIdx.x over rows.
struct Shape {
  dim3 grid;
  dim3 block;
};

Shape shape_of(std::int64_t rows, std::int64_t units, int packs) {
  int lanes = 1;
  while (lanes < kWarp && lanes < units) lanes *= 2;
  const int teams = kBlock / lanes;
  const std::int64_t across = std::min<std::int64_t>((rows + teams - 1) / teams, INT_MAX);
  const std::int64_t along = std::min<std::int64_t>((units + lanes * packs - 1) / (lanes * packs), 65535);
  return {dim3(static_cast<unsigned>(across), static_cast<unsigned>(along)), dim3(lanes, teams)};
}

// The largest power of two, up to 16, that divides all of these.
template <typename... Values>
int alignment(Values... values) {
  const std::uint64_t bits = (std::uint64_t{16} | ... | static_cast<std::uint64_t>(values));
  return static_cast<int>(bits & (~bits + 1));
}

std::uint64_t address(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer); }

// Sizes and strides count packs.
template <typename T, int Width>
__global__ void __launch_bounds__(kBlock)
    gather_kernel(const Pack<T, Width>* __restrict__ x, std::int64_t stride, std::int64_t rows,
                  const std::int32_t* __restrict__ index, std::int64_t places, std::int64_t width,
                  Pack<T, Width>* __restrict__ out) {
  using Chunk = Pack<T, Width>;
  const std::int64_t teams = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  const int step = blockDim.x;
  const std::int64_t stretch = static_cast<std::int64_t>(gridDim.y) * kCopies * step;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kCopies * step + threadIdx.x;
  for (std::int64_t m = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; m < places;
       m += teams) {
    const std::int32_t n = index[m];
    const bool found = is_row(n, rows);
    const Chunk* from = x + (found ? n * stride : 0);
    Chunk* to = out + m * width;
    for (std::int64_t at = first; at < width; at += stretch) {
      Chunk held[kCopies];
#pragma unroll
      for (int p = 0; p < kCopies; ++p) {
#pragma unroll
        for (int j = 0; j < Width; ++j) held[p].values[j] = static_cast<T>(filler(n));
        if (found && at + p * step < width) held[p] = from[at + p * step];
      }
#pragma unroll
      for (int p = 0; p < kCopies; ++p) {
        if (at + p * step < width) to[at + p * step] = held[p];
      }
    }
  }
}

template <typename T, int Width>
__global__ void __launch_bounds__(kBlock, 4)  // left to itself, ptxas spills on sm_80 to fit in five blocks
    sum_kernel(const T* __restrict__ grad, std::int64_t stride, RowInverse inverse, std::int64_t rows,
               std::int64_t columns, T* __restrict__ out) {
  const std::int64_t teams = static_cast<std::int64_t>(gridDim.x) * blockDim.y;
  const int step = blockDim.x * Width;
  const std::int64_t stretch = static_cast<std::int64_t>(gridDim.y) * kSums * step;
  const std::int64_t first = static_cast<std::int64_t>(blockIdx.y) * kSums * step + threadIdx.x * Width;
  for (std::int64_t n = static_cast<std::int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; n < rows;
       n += teams) {
    const std::int32_t begin = inverse.offsets[n];
    const std::int32_t count = inverse.offsets[n + 1] - begin;
    for (std::int64_t c = first; c < columns; c += stretch) {
      sum_places<Width, kSums>(grad + c, stride, inverse.places + begin, count, columns - c, step,
                               out + n * columns + c);
    }
  }
}

template <typename T, int Width>
void forward(const Gather& g, cudaStream_t stream) {
  using Chunk = Pack<T, Width>;
  constexpr std::int64_t size = sizeof(Chunk);
  const Shape shape = shape_of(g.places, g.bytes / size, kCopies);
  gather_kernel<T, Width><<<shape.grid, shape.block, 0, stream>>>(static_cast<const Chunk*>(g.x),
                                                                  g.stride / size, g.rows, g.index, g.places,
                                                                  g.bytes / size, static_cast<Chunk*>(g.out));
}

template <typename T, int Width>
void launch_sum(const GatherGrad& g, cudaStream_t stream) {
  const Shape shape = shape_of(g.rows, g.columns / Width, kSums);
  sum_kernel<T, Width><<<shape.grid, shape.block, 0, stream>>>(
      static_cast<const T*>(g.grad), g.stride, g.inverse, g.rows, g.columns, static_cast<T*>(g.out));
}

template <typename T>
void backward(const GatherGrad& g, cudaStream_t stream) {
  constexpr std::int64_t size = sizeof(T);
  if (alignment(address(g.grad), g.stride * size, g.columns * size, address(g.out)) == 16) {
    launch_sum<T, 16 / size>(g, stream);
  } else {
    launch_sum<T, 1>(g, stream);
  }
}

}  // namespace

void gather_rows_forward(const Gather& g, int device, void* stream) {
  if (g.places == 0 || g.bytes == 0) return;
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (alignment(address(g.x), g.stride, g.bytes, address(g.out))) {
    case 16:
      forward<std::uint32_t, 4>(g, on);
      break;
    case 8:
      forward<std::uint32_t, 2>(g, on);
      break;
    case 4:
      forward<std::uint32_t, 1>(g, on);
      break;
    case 2:
      forward<std::uint16_t, 1>(g, on);
      break;
    default:
      throw std::invalid_argument("rows must be of numbers of 2 bytes or more");
  }
  check(cudaGetLastError(), "gather_rows forward");
}

void gather_rows_backward(const GatherGrad& g, int device, void* stream) {
  if (g.rows == 0 || g.columns == 0) return;
  const DeviceGuard guard(device);
  const auto on = static_cast<cudaStream_t>(stream);
  switch (g.type) {
    case Type::kFloat32:
      backward<float>(g, on);
      break;
    case Type::kBFloat16:
      backward<BFloat16>(g, on);
      break;
    case Type::kFloat16:
      backward<Float16>(g, on);
      break;
    case Type::kFloat64:
      backward<double>(g, on);
      break;
    default:
      throw std::invalid_argument("no such type");
  }
  check(cudaGetLastError(), "gather_rows backward");
}

}  // namespace cuda
}  // namespace prefcore
