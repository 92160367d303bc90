"""What runs everything on a GPU machine: its parts, and that it survives tests that crash, hang or take too long."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    from bench import gpu

    return gpu


@pytest.fixture
def run_tests(gpu, tmp_path):
    def run(source, limit=60.0, workers=1):
        path = tmp_path / "test_some.py"
        path.write_text(f"import os, time\n{source}")
        return gpu.run_tests([str(path)], "not gpu", limit, workers)

    return run


@pytest.mark.parametrize("workers", [1, 2])
def test_a_crash_costs_only_the_test_that_crashed(run_tests, workers):
    report = run_tests(
        """
def test_first(): pass
def test_crash(): os.abort()
def test_wrong(): assert 1 == 2
def test_last(): pass
""",
        workers=workers,
    )
    assert report["text"] == "2 passed, 2 failed, 0 skipped, 0 not run"
    crash, wrong = report["failed"]
    assert crash.endswith("test_crash: the process ended with status -6")
    assert wrong.endswith("test_wrong: assert 1 == 2")


def test_what_there_was_no_time_for_is_said(run_tests):
    report = run_tests("def test_first(): pass\ndef test_hang(): time.sleep(600)\ndef test_last(): pass", limit=40.0)
    assert [test.rpartition("::")[2] for test in report["not_run"]] == ["test_hang", "test_last"]
    assert report["failed"][0].startswith("2 tests did not run for lack of time")
    report = run_tests("def test_hang(): time.sleep(600)\ndef test_last(): pass", limit=15.0)
    limit, hang, _ = report["failed"]
    assert limit == "process 0 was ended at the limit of 15 s"
    assert hang.endswith("test_hang: did not end")
    assert len(report["not_run"]) == 1


def test_a_file_that_cannot_be_imported_fails(run_tests):
    report = run_tests("import no_such_module\ndef test(): pass")
    assert any("no_such_module" in line for line in report["failed"])


def test_the_parts_hold_every_test_once(gpu):
    named = [path for name in gpu.TESTS for path in gpu.paths(name)]
    every = [str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py")]
    assert sorted(named) == sorted(every)


def test_parts_are_chosen_by_number_range_and_name(gpu):
    names = list(gpu.PARTS)
    assert gpu.chosen(None) == names
    assert gpu.chosen(["2-4", "machine", "6"]) == [*names[1:4], "machine", names[5]]
    for wrong in ("0", "99", "sometimes"):
        with pytest.raises(SystemExit, match=f"no part '{wrong}'"):
            gpu.chosen([wrong])


def test_the_suite_understands_what_it_is_asked(gpu, tmp_path):
    from bench import suite

    for dry in (False, True):
        for number in range(1, gpu.SUITE + 1):
            arguments = gpu.suite_arguments(gpu.Settings(dry, tmp_path, gpu.LIMIT, 1, "a-device"), number)
            options = suite.arguments().parse_args(arguments)
            assert options.tiny == dry
            assert options.device == ("cpu" if dry else "cuda")


def test_a_dry_run_goes_from_end_to_end(tmp_path):
    command = [sys.executable, "-m", "bench.gpu", "--dry", "--results", str(tmp_path), "--part"]
    for parts in (["machine"], ["tests-ragged", "memcheck"]):  # of two sessions
        done = subprocess.run([*command, *parts], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"ok     {parts[-1]}" in done.stdout
    (path,) = tmp_path.glob("*-checks.json")
    report = json.loads(path.read_text())
    assert report["parts"].keys() == {"machine", "tests-ragged", "memcheck"}
    assert report["parts"]["tests-ragged"]["skipped"].keys() == {"needs a CUDA device"}
    assert report["commit"]
