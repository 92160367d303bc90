"""CUDA kernels with barriers and shuffles, run by the host: each thread of a block is a fiber that waits where it must.

Each warp runs as far as a barrier of the block lets it before another one does, so that a barrier too few shows. How
fast a launch is, only a GPU can show.
"""

import ctypes
import itertools
import pathlib
import re
import shutil
import subprocess

import pytest
import torch

import prefcore

SOURCES = pathlib.Path(__file__).parents[2] / "csrc"
RUNTIME = r"""
#pragma once
#include <ucontext.h>

#include <functional>
#include <vector>

struct dim3 {
  unsigned x;
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __shared__ static

struct Barrier {
  unsigned arrived = 0, generation = 0;
};
struct Block {
  std::function<void()> body;
  ucontext_t scheduler;
  std::vector<ucontext_t> threads;
  std::vector<std::vector<char>> stacks;
  std::vector<bool> done;
  std::vector<unsigned> parked;  // the generation of the block's barrier at which a thread waits, or -1
  std::vector<double> lanes;
  Barrier all, warps[32];
};
inline Block block;

inline void yield() { swapcontext(&block.threads[threadIdx.x], &block.scheduler); }
inline void wait(Barrier& barrier, unsigned expected) {
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
  } else {
    while (barrier.generation == generation) yield();
  }
}
inline void __syncthreads() {
  block.parked[threadIdx.x] = block.all.generation;
  wait(block.all, blockDim.x);
  block.parked[threadIdx.x] = -1;
}
inline double exchange(double value, unsigned from) {
  Barrier& warp = block.warps[threadIdx.x / 32];
  block.lanes[threadIdx.x] = value;
  wait(warp, 32);
  const double got = block.lanes[threadIdx.x / 32 * 32 + from];
  wait(warp, 32);
  return got;
}
inline double __shfl_sync(unsigned, double value, int lane) { return exchange(value, lane); }
inline double __shfl_down_sync(unsigned, double value, int distance) {
  const unsigned lane = threadIdx.x % 32;
  return exchange(value, lane + distance < 32 ? lane + distance : lane);
}

inline void run_thread() {
  block.body();
  block.done[threadIdx.x] = true;
  yield();
}

template <typename... Arguments>
auto emulate(void (*kernel)(Arguments...), unsigned grid, unsigned threads) {
  return [=](Arguments... arguments) {
    gridDim.x = grid, blockDim.x = threads;
    block.body = [=] { kernel(arguments...); };
    block.threads.resize(threads), block.lanes.resize(threads);
    block.stacks.assign(threads, std::vector<char>(1 << 16));
    for (blockIdx.x = 0; blockIdx.x < grid; ++blockIdx.x) {
      block.done.assign(threads, false), block.parked.assign(threads, -1);
      for (unsigned t = 0; t < threads; ++t) {
        getcontext(&block.threads[t]);
        block.threads[t].uc_stack.ss_sp = block.stacks[t].data();
        block.threads[t].uc_stack.ss_size = block.stacks[t].size();
        makecontext(&block.threads[t], run_thread, 0);
      }
      for (unsigned left = threads; left > 0;) {
        for (unsigned first = 0; first < threads; first += 32) {
          for (bool moved = true; moved;) {
            moved = false;
            for (unsigned t = first; t < first + 32; ++t) {
              if (block.done[t] || block.parked[t] == block.all.generation) continue;
              moved = true;
              threadIdx.x = t;
              swapcontext(&block.scheduler, &block.threads[t]);
              left -= block.done[t];
            }
          }
        }
      }
    }
  };
}
"""
ENTRIES = r"""
template <typename T>
void run(const void* rewards, const void* values, const bool* mask, const void* bootstrap, const int32_t* offsets,
         int64_t sequences, double gamma, double lam, void* advantages, void* returns, int64_t total) {
  const auto in = [](const void* x) { return static_cast<const T*>(x); };
  prefcore::cuda::run_gae<T>({in(rewards), in(values), mask, in(bootstrap), {offsets, sequences}, gamma, lam,
                              static_cast<T*>(advantages), static_cast<T*>(returns)}, total, 0, nullptr);
}
extern "C" void gae_float(const void* r, const void* v, const bool* m, const void* b, const int32_t* o, int64_t s,
                          double gamma, double lam, void* a, void* g, int64_t total) {
  run<float>(r, v, m, b, o, s, gamma, lam, a, g, total);
}
extern "C" void gae_double(const void* r, const void* v, const bool* m, const void* b, const int32_t* o, int64_t s,
                           double gamma, double lam, void* a, void* g, int64_t total) {
  run<double>(r, v, m, b, o, s, gamma, lam, a, g, total);
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not SOURCES.is_dir():
        pytest.skip("needs a C++ compiler and the sources in csrc")
    folder = tmp_path_factory.mktemp("lockstep")
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    source, launches = re.subn(
        r"(\w+)<<<([^,]+), (\w+), 0, [^>]+>\(stream\)>>>",
        r"emulate(\1, \2, \3)",
        (SOURCES / "cuda" / "gae.cu").read_text(),
    )
    assert launches == 1
    (folder / "gae.cpp").write_text(source + ENTRIES)
    flags = ["-std=c++17", "-O0", "-ffp-contract=off", "-shared", "-fPIC", f"-I{folder}", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, folder / "gae.cpp", "-o", folder / "gae.so"], check=True)
    return ctypes.CDLL(str(folder / "gae.so"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "lengths",
    [(0, 1, 31, 32, 33, 0, 255, 256, 257, 300, 5), (5000, 0, 2049), (1, 0), (0, 0)],
    ids=["a warp a sequence", "a block a sequence", "one token", "all empty"],
)
def test_a_launch_of_gae_writes_the_cpus_bits(kernels, lengths, masked, dtype):
    total = sum(lengths)
    generator = torch.Generator().manual_seed(total)
    cu_seqlens = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    rewards, values = torch.randn(2, total, dtype=dtype, generator=generator)
    bootstrap = torch.randn(len(lengths), dtype=dtype, generator=generator) if masked else None
    mask = torch.rand(total, generator=generator) < 0.7 if masked else None
    out = torch.full((2, total + 1), 7, dtype=dtype)  # an element more than is written
    function = kernels.gae_float if dtype == torch.float32 else kernels.gae_double
    function.restype = None
    tensors = (rewards, values, mask, bootstrap, cu_seqlens)
    function(
        *(ctypes.c_void_p(None if x is None else x.data_ptr()) for x in tensors),
        ctypes.c_int64(len(lengths)),
        ctypes.c_double(0.99),
        ctypes.c_double(0.95),
        *(ctypes.c_void_p(row.data_ptr()) for row in out),
        ctypes.c_int64(total),
    )
    expected = prefcore.gae(rewards, values, cu_seqlens, gamma=0.99, lam=0.95, mask=mask, bootstrap=bootstrap)
    assert torch.equal(out[:, :-1], torch.stack(expected))
    assert bool((out[:, -1] == 7).all())
