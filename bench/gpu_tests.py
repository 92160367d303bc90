"""Tests in several processes under a time limit, with a record that outlives a crash, for ``bench.gpu``."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
LAST = 45.0  # seconds kept for the tests that are running when no other may begin
LOST = 64  # status of a process whose GPU context is lost; pytest's own end before it
# Of pytest, where what became of the tests is in the record: all passed, some failed, stopped, none chosen.
RECORDED = (0, 1, 2, 5)


class Record:
    """A file of lines ``[event, test, what]``, appended to as things happen."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, event: str, test: str, what: Any = None) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([event, test, what]) + "\n")

    def events(self) -> list[list[Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()] if self.path.exists() else []

    def tests(self, event: str) -> dict[str, Any]:
        return {test: what for kind, test, what in self.events() if kind == event}


class Recorder:
    """A plugin of pytest: takes one process's share of the tests, and writes down what becomes of each."""

    def __init__(self, record: Record, worker: int, workers: int, seconds: float) -> None:
        self.record, self.worker, self.workers = record, worker, workers
        self.end = time.monotonic() + seconds
        self.lost = False

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        done = self.record.tests("end")
        items[:] = items[self.worker :: self.workers]
        for item in items:
            self.record.add("chosen", item.nodeid)
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.record.add("call", report.nodeid, report.longreprtext.splitlines()[-40:])

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.record.add("begin", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            # Not the source around it: the place and the words.
            self.record.add(report.when, report.nodeid, report.longreprtext.splitlines()[-40:])
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longreprtext
            self.record.add("skipped", report.nodeid, reason.removeprefix("Skipped: "))
        elif report.when == "call":
            self.record.add("passed", report.nodeid, round(report.duration, 2))

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.record.add("end", nodeid)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item):
        result = yield
        if time.monotonic() > self.end:
            item.session.shouldstop = "no time left for another test"
        elif torch.cuda.is_initialized():
            try:
                torch.cuda.synchronize()
            except RuntimeError:  # every later call would fail as this one does
                self.lost, item.session.shouldstop = True, "the GPU's context is lost"
        return result


def work(options: dict[str, Any]) -> int:
    """One process's share; the exit status says whether another process has to go on."""
    recorder = Recorder(Record(Path(options["record"])), options["worker"], options["workers"], options["seconds"])
    quiet = ["-q", "-p", "no:cacheprovider", "--no-header", "--tb=short", "-rfE", "--continue-on-collection-errors"]
    status = pytest.main([*quiet, "-m", options["expression"], *options["paths"]], plugins=[recorder])
    return LOST if recorder.lost else int(status)


def run_tests(
    paths: Sequence[str], expression: str, limit: float, workers: int, prefix: Sequence[str] = (),
    variables: dict[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Run the tests that ``expression`` selects, and report on them; ``prefix`` is a command that runs a command.

    A process that crashed, or lost its GPU, is followed by another that runs what it had left.
    """
    end = time.monotonic() + limit
    with tempfile.TemporaryDirectory() as folder:

        def start(worker: int) -> subprocess.Popen:
            options = {
                "record": str(records[worker].path),
                "worker": worker,
                "workers": workers,
                "seconds": end - LAST - time.monotonic(),
                "expression": expression,
                "paths": list(paths),
            }
            command = [*prefix, sys.executable, "-m", "bench.gpu_tests", json.dumps(options)]
            # A session of its own, so that it can be ended with all that it started.
            return subprocess.Popen(command, cwd=ROOT, env={**os.environ, **(variables or {})}, start_new_session=True)

        records = [Record(Path(folder, f"{worker}.jsonl")) for worker in range(workers)]
        running = {worker: start(worker) for worker in range(workers)}
        problems = []
        try:
            while running:
                time.sleep(0.1)
                for worker, process in list(running.items()):
                    status = process.poll()
                    if status is None and time.monotonic() < end:
                        continue
                    del running[worker]
                    if status is None:
                        kill(process)
                        problems.append(f"process {worker} was ended at the limit of {limit:.0f} s")
                    elif blame(records[worker], status) or status == LOST:
                        if time.monotonic() < end - LAST:
                            running[worker] = start(worker)
                    elif status not in RECORDED:
                        problems.append(f"process {worker} ended with status {status}, and not within a test")
        finally:
            for process in running.values():
                kill(process)
        return report_on(records, problems)


def blame(record: Record, status: int) -> bool:
    """Whether a process ended within a test: that test has failed then, and is not run again."""
    unfinished = record.tests("begin").keys() - record.tests("end").keys()
    for test in unfinished:
        record.add("call", test, [f"the process ended with status {status}"])
        record.add("end", test)
    return bool(unfinished)


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it started; it must lead a session."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def report_on(records: Sequence[Record], problems: list[str]) -> dict[str, Any]:
    whole: dict[str, dict[str, Any]] = {}
    for kind in ("chosen", "passed", "skipped", "setup", "call", "teardown", "begin", "end"):
        whole[kind] = {test: what for record in records for test, what in record.tests(kind).items()}
    failures = {**whole["setup"], **whole["call"], **whole["teardown"]}
    passed = [test for test in whole["passed"] if test not in failures]
    unfinished = sorted(whole["begin"].keys() - whole["end"].keys())
    left = sorted(whole["chosen"].keys() - whole["begin"].keys())
    failed = problems + [f"{test}: {first_words(text)}" for test, text in sorted(failures.items())]
    failed += [f"{test}: did not end" for test in unfinished]
    failed += [f"{len(left)} tests did not run for lack of time, the first of them {left[0]}"] if left else []
    slowest = sorted(whole["passed"].items(), key=lambda each: -each[1])[:10]
    return {
        "text": f"{len(passed)} passed, {len(failures)} failed, {len(whole['skipped'])} skipped, {len(left)} not run",
        "failed": failed,
        "passed": len(passed),
        "skipped": dict(Counter(whole["skipped"].values())),
        "not_run": left,
        "failures": failures,
        "slowest": dict(slowest),
    }


def first_words(lines: list[str]) -> str:
    """Of a failure's text: pytest marks the lines of the error with an E."""
    return next((line.lstrip("E ") for line in lines if line.startswith("E ")), lines[-1] if lines else "")[:200]


if __name__ == "__main__":
    sys.exit(work(json.loads(sys.argv[1])))
