"""CUDA kernels without barriers, run by the host: their threads one after another, at the sizes of a launch.

It shows which elements each thread reads and writes; how fast, only a GPU can show.
"""

import ctypes
import pathlib
import re
import shutil
import subprocess

import pytest
import torch

import prefcore
from prefcore import _native

SOURCES = pathlib.Path(__file__).parents[2] / "csrc"
RUNTIME = r"""
#pragma once
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline dim3 gridDim, blockDim, blockIdx, threadIdx;
using cudaStream_t = void*;
enum cudaError_t { cudaSuccess };
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline int current = 0, launched = -1;
inline cudaError_t cudaGetDevice(int* device) { return *device = current, cudaSuccess; }
inline cudaError_t cudaSetDevice(int device) { return current = device, cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) { return ""; }
#define __global__
#define __launch_bounds__(...)

template <typename... Arguments>
auto emulate(void (*kernel)(Arguments...), dim3 grid, dim3 block) {
  return [=](Arguments... arguments) {
    launched = current, gridDim = grid, blockDim = block;
    for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x)
        for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y)
          for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(arguments...);
  };
}
"""
ENTRIES = r"""
static int wanted = 0;
extern "C" void want_device(int64_t device) { wanted = static_cast<int>(device); }
extern "C" int launched_on() { return launched; }
extern "C" int current_device() { return current; }
extern "C" void gather_forward(const void* x, int64_t stride, int64_t rows, const int32_t* index, int64_t places,
                               int64_t bytes, void* out) {
  prefcore::cuda::gather_rows_forward({x, stride, rows, index, places, bytes, out}, wanted, nullptr);
}
extern "C" void gather_backward(int64_t type, const void* grad, int64_t stride, const int32_t* offsets,
                                const int32_t* places, int64_t rows, int64_t columns, void* out) {
  prefcore::cuda::gather_rows_backward(
      {static_cast<prefcore::Type>(type), grad, stride, {offsets, places}, rows, columns, out}, wanted, nullptr);
}
"""


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not SOURCES.is_dir():
        pytest.skip("needs a C++ compiler and the sources in csrc")
    folder = tmp_path_factory.mktemp("emulated")
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    source, launches = re.subn(
        r"(\w+_kernel<[^<>]+>)\s*<<<([^,]+), ([^,]+), 0, stream>>>",
        r"emulate(\1, \2, \3)",
        (SOURCES / "cuda" / "gather_rows.cu").read_text(),
    )
    assert launches == 2
    (folder / "gather_rows.cpp").write_text(source + ENTRIES)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{folder}", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, folder / "gather_rows.cpp", "-o", folder / "gather_rows.so"], check=True)
    return ctypes.CDLL(str(folder / "gather_rows.so"))


def call(function, *arguments):
    function.restype = None
    function(*(ctypes.c_int64(a.data_ptr() if isinstance(a, torch.Tensor) else a) for a in arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("columns", [1, 3, 4, 8, 17, 24, 63, 64, 256, 1000, 1024, 5000])
def test_threads_of_gather_rows_write_what_the_cpu_does(kernels, columns, dtype):
    generator = torch.Generator().manual_seed(columns)
    for rows, places, before in ((7, 40, 0), (300, 9, 0), (7, 40, 1)):
        index = torch.randint(-1, rows, (places,), generator=generator, dtype=torch.int32)
        inverse = prefcore.invert_rows(index, rows)
        # Columns of a wider matrix; `before` makes them misaligned.
        x = torch.randn(rows, columns + 8, generator=generator).to(dtype)[:, before : columns + before]
        grad = torch.randn(places, columns + 8, generator=generator).to(dtype)[:, before : columns + before]
        size = x.element_size()
        # A row more than is written.
        out, grad_x = torch.full((places + 1, columns), 7, dtype=dtype), torch.full((rows + 1, columns), 7, dtype=dtype)
        call(kernels.gather_forward, x, x.stride(0) * size, rows, index, places, columns * size, out)
        call(
            kernels.gather_backward,
            _native.TYPE_CODES[dtype],
            grad,
            grad.stride(0),
            *inverse,
            rows,
            columns,
            grad_x,
        )
        leaf = x.clone().requires_grad_()
        expected = prefcore.gather_rows(leaf, index)
        assert torch.equal(out[:-1], expected)
        assert torch.equal(grad_x[:-1], torch.autograd.grad(expected, leaf, grad)[0])
        assert bool((out[-1] == 7).all())
        assert bool((grad_x[-1] == 7).all())


def test_launches_go_to_the_tensors_device_and_the_current_one_comes_back(kernels):
    x, index, out = torch.ones(3, 8), torch.tensor([2, 0], dtype=torch.int32), torch.zeros(2, 8)
    inverse = prefcore.invert_rows(index, 3)
    for device in (1, 0):
        call(kernels.want_device, device)
        for launch in (
            lambda: call(kernels.gather_forward, x, 32, 3, index, 2, 32, out),
            lambda: call(kernels.gather_backward, _native.TYPE_CODES[x.dtype], out, 8, *inverse, 3, 8, x),
        ):
            launch()
            assert kernels.launched_on() == device
            assert kernels.current_device() == 0
