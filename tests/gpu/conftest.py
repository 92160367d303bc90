"""What the GPU tests share: a guard against waits, a count of compiled kernels, graphs, room in memory."""

from __future__ import annotations

import contextlib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch


@pytest.fixture
def no_waits() -> Callable[[], AbstractContextManager]:
    """A context in which waiting for the device is an error."""

    @contextlib.contextmanager
    def guard() -> Iterator[None]:
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return guard


@pytest.fixture
def compiled() -> Callable[[], int]:
    """How many variants of prefcore's Triton kernels this process has compiled or loaded."""
    from triton.runtime.jit import JITFunction

    import prefcore.kernels

    names = [f"prefcore.kernels.{module.name}" for module in pkgutil.iter_modules(prefcore.kernels.__path__)]
    modules = [importlib.import_module(name) for name in names]
    kernels = {id(f): f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)}

    def count() -> int:
        # The first entry of a device's caches holds what is ready to launch.
        return sum(len(caches[0]) for kernel in kernels.values() for caches in kernel.device_caches.values())

    return count


@pytest.fixture
def capture() -> Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]:
    """Capture a function in a CUDA graph: the function that replays it, and the results that are then written anew."""

    def capture(step: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step()  # kernels are compiled and libraries set up outside of a capture
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do, such as freeing pinned memory, is no part of it.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            results = step()
        return graph.replay, results

    return capture


@pytest.fixture
def room() -> Callable[[float], None]:
    """Skip a test for which the device has too little free memory, in GiB."""

    def needs(gib: float) -> None:
        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            pytest.skip(f"needs {gib:.0f} GiB of free GPU memory, has {free:.0f}")

    return needs


@pytest.fixture
def other_device() -> str:
    """A device that is not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    return "cuda:1"
