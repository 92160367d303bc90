import os
import socket
import subprocess
import sys

# Without it cuBLAS warns in deterministic mode, which the fixture below turns on; read when its library loads.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

# Where there is no GPU, the kernels' tests interpret them on host tensors. Triton decides that when it is
# imported, which torch may do at any time: hence before any test module.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter():
    """Triton's interpreter replaces the language's functions at every call of a helper; once a launch will do.

    Three quarters of the time of small launches go there.
    """
    if os.environ.get("TRITON_INTERPRET") != "1":
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    replace = interpreter._patch_lang

    def replace_once(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages):
            return replace(function)
        return interpreter._LangPatchScope()

    interpreter._patch_lang = replace_once
    yield
    interpreter._patch_lang = replace


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def poison_uninitialised_memory():
    """torch.empty returns NaN (or the largest integer), so that an element left unwritten fails its test."""
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


# What two ranks run: a fresh interpreter, since a test's module may have been imported under a name that no other
# process can find, and a fork of it, since imports are most of the time. Nothing has started a device before that.
_RANKS = """
import importlib.util, os, pathlib, sys
import torch

path, function, folder = sys.argv[1:]
torch.set_num_threads(1)
spec = importlib.util.spec_from_file_location("ranks", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
second = os.fork()
rank = 0 if second else 1
os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
torch.distributed.init_process_group("gloo")
getattr(module, function)(rank, pathlib.Path(folder))
torch.distributed.barrier()
# Not by returning: torch's destructor of a gloo group holds the interpreter's lock while it waits for a thread that
# may be waiting for that lock.
os._exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]) if second else 0)
"""


@pytest.fixture
def two_ranks(request, tmp_path):
    """Calls a function of the test's module, function(rank, folder), on both ranks of a group; returns the folder."""
    if not torch.distributed.is_gloo_available():
        pytest.skip("torch is built without gloo")

    def run(function, timeout=120):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        # A device that an import has counted cannot be used in a fork.
        common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "CUDA_VISIBLE_DEVICES": ""}
        ranks = subprocess.run(
            [sys.executable, "-c", _RANKS, str(request.path), function.__name__, str(tmp_path)],
            env={**os.environ, **common},
            stderr=subprocess.PIPE,
            text=True,
            timeout=timeout,
        )
        assert ranks.returncode == 0, ranks.stderr
        return tmp_path

    return run
