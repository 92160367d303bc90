"""Times of every case: ``pytest bench``. ``python -m bench`` has ratios that hold on a noisy machine."""

import pytest
import torch

from bench.cases import CASES
from bench.inputs import Shape

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPES = [(4096, 4096, 128256)] if CUDA else [(256, 256, 4096)]
DTYPES = [torch.bfloat16] if CUDA else [torch.float32]
LENGTH = 512 if CUDA else 64
ROUNDS = 7 if CUDA else 3


def clock():
    """Seconds as the device counts them, between events of its stream."""
    if not CUDA:
        from time import perf_counter

        return perf_counter
    first = torch.cuda.Event(enable_timing=True)
    first.record()

    def now() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return first.elapsed_time(event) / 1e3

    return now


def cold() -> None:
    """What the L2 cache held is gone."""
    if CUDA:
        torch.empty(2**28, dtype=torch.uint8, device=DEVICE).zero_()


def parameters():
    for case in CASES.values():
        yield pytest.param(case.op, case.schedule, case.provider, case.head, id=case.key)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("op", "schedule", "provider", "head"), parameters())
@pytest.mark.benchmark(timer=clock())
def test_head(op, schedule, provider, head, shape, dtype, benchmark):
    case = CASES["/".join((op, provider, schedule, head))]
    sizes = Shape(*shape, dtype, DEVICE, length=LENGTH, prompt=LENGTH)
    torch.compiler.reset()  # the shapes before this one would make it dynamic, or end compilation
    try:
        inputs = case.inputs(sizes)
        step = case.build(inputs)
        step()
    except (LookupError, NotImplementedError) as reason:
        if isinstance(reason, KeyError | IndexError):
            raise
        pytest.skip(str(reason))
    except torch.OutOfMemoryError:
        pytest.skip("out of memory")
    benchmark.pedantic(step, setup=cold, rounds=ROUNDS)
    benchmark.extra_info.update(flops=case.flops(sizes), bytes=case.bytes(sizes), note=case.note)
