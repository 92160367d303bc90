"""What the host does of a call on a GPU, seen without one: it never waits, and asks for no product that torch lacks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


def test_calls_on_a_device_without_values_neither_wait_nor_fail():
    pytest.importorskip("triton")
    script = Path(__file__).with_name("host_calls.py")
    run = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    report = json.loads(run.stdout)
    assert report["wrong"] == {}
    assert len(report["ran"]) == 93
