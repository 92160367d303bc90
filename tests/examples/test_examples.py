"""Every example runs from its own file, as a user starts it."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted(path for path in (Path(__file__).parents[2] / "examples").glob("*.py") if path.name[0] != "_")


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_draws_its_plot(example, tmp_path):
    command = [sys.executable, str(example), "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "mean of the first" in done.stdout
    assert (tmp_path / f"{example.stem}.png").stat().st_size > 0
