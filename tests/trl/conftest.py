import gc
import importlib.util
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest


def _trl():
    try:
        return version("trl")
    except PackageNotFoundError:
        return None


@pytest.fixture(scope="session")
def harness():
    """The module beside this file; with --import-mode=importlib no test can import it by a name."""
    if _trl() is None:
        pytest.skip("TRL's trainers are tested where it is installed: the extra parity")
    if not _trl().startswith("1.16."):
        pytest.skip("these are the trainers of TRL 1.16")
    spec = importlib.util.spec_from_file_location("trl_harness", Path(__file__).with_name("harness.py"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look up its annotations
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True, scope="module")
def garbage_is_looked_for_again():
    """After the runs of the harness, which freeze what the first of them finds."""
    yield
    gc.unfreeze()
