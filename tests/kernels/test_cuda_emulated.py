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
#define __device__
#define __forceinline__ inline
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


def build(folder: pathlib.Path, op: str, entries: str, launches: int) -> ctypes.CDLL:
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None or not SOURCES.is_dir():
        pytest.skip("needs a C++ compiler and the sources in csrc")
    (folder / "cuda_runtime_api.h").write_text(RUNTIME)
    source, found = re.subn(
        r"(\w+_kernel<[^<>]+>)\s*<<<([^,]+), ([^,]+), 0, [^;]*?stream\)?>>>",
        r"emulate(\1, \2, \3)",
        (SOURCES / "cuda" / f"{op}.cu").read_text(),
    )
    assert found == launches
    (folder / f"{op}.cpp").write_text(source + entries)
    flags = ["-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", f"-I{folder}", f"-I{SOURCES}"]
    subprocess.run([compiler, *flags, folder / f"{op}.cpp", "-o", folder / f"{op}.so"], check=True)
    return ctypes.CDLL(str(folder / f"{op}.so"))


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    return build(tmp_path_factory.mktemp("gather_rows"), "gather_rows", ENTRIES, launches=2)


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


REWARDS = r"""
extern "C" void token_rewards(int64_t bytes, const void* call) {
  if (bytes == 4) {
    prefcore::cuda::run_token_rewards(*static_cast<const prefcore::TokenRewards<float>*>(call), 0, nullptr);
  } else {
    prefcore::cuda::run_token_rewards(*static_cast<const prefcore::TokenRewards<double>*>(call), 0, nullptr);
  }
}
"""


def structure(name: str, **fields: type) -> type[ctypes.Structure]:
    """prefcore's struct of these fields; pointers are numbers."""
    return type(name, (ctypes.Structure,), {"_fields_": list(fields.items())})


LONG, DOUBLE = ctypes.c_int64, ctypes.c_double
Stream = structure("Stream", values=LONG, baseline=LONG, weight=DOUBLE, most=DOUBLE)
Segments = structure("Segments", ends=LONG, scores=LONG, offsets=LONG, weight=DOUBLE)
Penalty = structure(
    "Penalty",
    kind=ctypes.c_int,
    logps=LONG,
    reference=LONG,
    most=DOUBLE,
    coefficients=LONG,
    turns=LONG,
    turn_count=LONG,
    coefficient=DOUBLE,
)
TokenRewards = structure(
    "TokenRewards",
    offsets=LONG,
    sequences=LONG,
    total=LONG,
    mask=LONG,
    terminal=LONG,
    terminal_most=DOUBLE,
    streams=Stream * 32,
    stream_count=ctypes.c_int,
    segments=Segments * 32,
    segment_count=ctypes.c_int,
    moves=ctypes.c_bool,
    penalty=Penalty,
    low=DOUBLE,
    high=DOUBLE,
    out=LONG,
)


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    return build(tmp_path_factory.mktemp("token_rewards"), "token_rewards", REWARDS, launches=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("kl", "past_end", "masked"),
    [("k1", "drop", True), ("k2", "move", False), ("k3", "move", True), (None, "drop", False)],
)
@pytest.mark.parametrize(
    "lengths",
    [(0, 1, 31, 0, 33, 500, 0, 2), (1, 1022, 1, 1025, 0, 3000), (4, 0) * 300, (1024, 1024), (0, 0), ()],
    ids=["a block", "several blocks", "short", "whole blocks", "all empty", "none"],
)
def test_threads_of_token_rewards_write_what_the_cpu_does(rewards, monkeypatch, lengths, masked, kl, past_end, dtype):
    total, sequences = sum(lengths), len(lengths)
    generator = torch.Generator().manual_seed(total)
    spans = torch.tensor(lengths, dtype=torch.int64)
    each = torch.arange(4).repeat(sequences)  # four ends a sequence, the third and the fourth equal, some behind it
    ends = (each.clamp(max=2) * spans.repeat_interleave(4) / 2).to(torch.int32)
    cu_segments = torch.arange(0, 4 * sequences + 1, 4, dtype=torch.int32)
    logps, ref_logps, values, baseline = torch.randn(4, total, dtype=dtype, generator=generator)
    arguments = {
        "terminal": torch.randn(sequences, dtype=dtype, generator=generator),
        "cu_seqlens": torch.cat([torch.zeros(1, dtype=torch.int64), spans.cumsum(0)]).to(torch.int32),
        "streams": [(values, 0.5, None, 0.1), (values, 1.0, baseline)],
        "segments": [(ends, torch.randn(4 * sequences, dtype=dtype, generator=generator), cu_segments, 0.3)] * 2,
        "past_end": past_end,
        "clamp": (-2.0, 3.0),
    }
    if masked:
        arguments["mask"] = torch.rand(total, generator=generator) < 0.5
        arguments["mask"][total // 3 : total // 2] = False
    if kl is not None:
        arguments |= {
            "logps": logps,
            "ref_logps": ref_logps,
            "kl": kl,
            "kl_coef": torch.tensor([0.1, 0.2], dtype=dtype),
        }
        arguments["turns"] = torch.randint(0, 2, (total,), generator=generator, dtype=torch.int32)
    expected = prefcore.token_rewards(**arguments)

    class Emulated:
        @staticmethod
        def token_rewards_cpu(
            itemsize, offsets, count, total, mask, terminal, most, streams, segments, moves, kl, *rest
        ):
            low, high, out, _ = rest
            made = TokenRewards(offsets, count, total, mask, terminal, most, moves=moves, penalty=Penalty(*kl))
            made.streams[: len(streams)] = [Stream(*item) for item in streams]
            made.segments[: len(segments)] = [Segments(*item) for item in segments]
            made.stream_count, made.segment_count = len(streams), len(segments)
            made.low, made.high, made.out = low, high, out
            rewards.token_rewards(ctypes.c_int64(itemsize), ctypes.byref(made))

    monkeypatch.setattr(_native, "require", lambda: Emulated)
    assert torch.equal(prefcore.token_rewards(**arguments), expected)
