// gae on the GPU: a warp per sequence, or a block where sequences are long. The result does not depend on the
// choice: both compose in the order of core/gae.h.
#include <algorithm>
#include <climits>

#include "cuda/launch.h"
#include "gae.h"

namespace prefcore {
namespace cuda {
namespace {

constexpr int kBlock = 256;
constexpr int kWarps = kBlock / gae::kRow;

// Mean length from which a block serves a sequence: with fewer tiles most of its warps would have none.
constexpr std::int64_t kLong = 4 * gae::kTile;

// The lanes of a row as the threads of a warp: see gae::Alone.
struct Warp {
  static constexpr int kHeld = 1;
  static constexpr unsigned kAll = 0xffffffffu;
  __device__ __forceinline__ static int lane(int) { return threadIdx.x % gae::kRow; }
  __device__ __forceinline__ static int reach(int) { return 1; }
  __device__ __forceinline__ static double above(const double (&x)[1], int, int distance) {
    return __shfl_down_sync(kAll, x[0], distance);
  }
  __device__ __forceinline__ static double first(const double (&x)[1]) { return __shfl_sync(kAll, x[0], 0); }
};

// `Threads` threads, one warp or all of the block's, work through a sequence; each warp takes a tile at a
// time, all of whose loads are under way together.
template <bool Masked, int Threads, typename T>
__global__ void __launch_bounds__(kBlock, 1) gae_kernel(GaeCall<T> call) {
  constexpr std::int64_t teams = kBlock / Threads;
  constexpr int warps = Threads / gae::kRow;
  const int warp = threadIdx.x % Threads / gae::kRow;
  const gae::Decay<Warp> decay(call.gamma, call.lam);
  // The loops' bounds are equal across a team, so that all of it reaches the barriers.
  for (std::int64_t s = blockIdx.x * teams + threadIdx.x / Threads; s < call.ragged.sequences;
       s += gridDim.x * teams) {
    const std::int64_t start = call.ragged.offsets[s];
    const std::int32_t length = call.ragged.offsets[s + 1] - call.ragged.offsets[s];
    const gae::Tokens<T> tokens{call.rewards + start, call.values == nullptr ? nullptr : call.values + start,
                                Masked ? call.mask + start : nullptr};
    double behind = call.bootstrap == nullptr ? 0.0 : static_cast<double>(call.bootstrap[s]);
    for (std::int32_t round = 0; round < gae::count_tiles(length); round += warps) {
      // Of rows before the sequence's first token the loads are zeros, and nothing is written.
      const auto end = static_cast<std::int32_t>(length - std::int64_t{round + warp} * gae::kTile);
      gae::Row<Masked, Warp, T> rows[gae::kRows];
      gae::Affine tile = gae::identity();
#pragma unroll
      for (int r = 0; r < gae::kRows; ++r) {
        if (end > r * gae::kRow) rows[r].template load<false>(tokens, end - (r + 1) * gae::kRow);
      }
#pragma unroll
      for (int r = 0; r < gae::kRows; ++r) {
        if (end > r * gae::kRow) rows[r].scan(decay);
      }
#pragma unroll
      for (int r = 0; r < gae::kRows; ++r) {
        if (end > r * gae::kRow) tile = gae::compose(rows[r].whole(decay), tile);
      }
      double own = behind;
      if constexpr (warps == 1) {
        behind = tile(behind);
      } else {
        __shared__ gae::Affine tiles[warps];
        __syncthreads();  // the previous round's reads are over
        if (Warp::lane(0) == 0) tiles[warp] = tile;
        __syncthreads();
#pragma unroll
        for (int w = 0; w < warps; ++w) {
          if (w == warp) own = behind;
          behind = tiles[w](behind);
        }
      }
      // Composed once more: kept, the compositions would take a third of the registers.
      gae::Affine before = gae::identity();
#pragma unroll
      for (int r = 0; r < gae::kRows; ++r) {
        if (end > r * gae::kRow) {
          const gae::Affine whole = rows[r].whole(decay);
          rows[r].template finish<false>(decay, before(own), end - (r + 1) * gae::kRow,
                                         call.advantages + start, call.returns + start);
          before = gae::compose(whole, before);
        }
      }
    }
  }
}

template <bool Masked, typename T>
void launch(const GaeCall<T>& call, std::int64_t total, void* stream) {
  const bool lengthy = total / call.ragged.sequences >= kLong;
  const std::int64_t teams = lengthy ? 1 : kWarps;
  const std::int64_t blocks = std::min<std::int64_t>((call.ragged.sequences + teams - 1) / teams, INT_MAX);
  const auto kernel = lengthy ? gae_kernel<Masked, kBlock, T> : gae_kernel<Masked, gae::kRow, T>;
  kernel<<<static_cast<unsigned>(blocks), kBlock, 0, static_cast<cudaStream_t>(stream)>>>(call);
  check(cudaGetLastError(), "gae");
}

}  // namespace

template <typename T>
void run_gae(const GaeCall<T>& call, std::int64_t total, int device, void* stream) {
  if (call.ragged.sequences == 0) return;
  const DeviceGuard guard(device);
  call.mask == nullptr ? launch<false>(call, total, stream) : launch<true>(call, total, stream);
}

template void run_gae<float>(const GaeCall<float>&, std::int64_t, int, void*);
template void run_gae<double>(const GaeCall<double>&, std::int64_t, int, void*);

}  // namespace cuda
}  // namespace prefcore
