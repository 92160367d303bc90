"""How a case is measured: in a process of its own on a CPU, in one of its provider's on a GPU.

On a shared machine seconds do not hold, but ratios to work that is timed right before and after do. So every round
times a product ``[T, D] x [D, V]`` (of given logits: a large copy), the case, and the product again, and what is quoted
as ratio is the median over the rounds.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from bench.cases import Case
from bench.inputs import Shape

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("prefcore", "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


def seconds(step: Callable[[], object], like: torch.Tensor) -> float:
    if like.is_cuda:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.empty(2**28, dtype=torch.uint8, device=like.device).zero_()  # the caches start cold
        start.record()
        step()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    step()
    return time.perf_counter() - begin


def resident(field: str) -> int:
    """KiB: VmRSS, what the process holds, or VmHWM, the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


class Session:
    """Processes that measure, started when a case needs one.

    Args:
        device: ``cpu`` or ``cuda``.
        threads: of torch, on a CPU.
        shared: one process for all cases of a provider, which on a CPU leaves out the memory.
        prefcore: a folder to import prefcore from, instead of the one that is installed.
        limit: seconds that one answer may take.
    """

    def __init__(
        self, device: str, threads: int, shared: bool | None = None, prefcore: Path | None = None, limit: float = 600
    ) -> None:
        self.device, self.threads, self.prefcore, self.limit = device, threads, prefcore, limit
        self.shared = device == "cuda" if shared is None else shared
        self.workers: dict[str, Worker] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers.values():
            worker.close()
        self.workers.clear()

    def measure(self, case: Case, shape: Shape, rounds: int, other: Session | None = None) -> dict:
        """One row: the case's times, its memory, its error; with ``other``, in turn with the same case there."""
        row = describe(case, shape)
        sessions = [self] if other is None else [self, other]
        workers = [session.worker(case) for session in sessions]
        try:
            for session, worker in zip(sessions, workers, strict=True):
                answer = worker.ask(what="time", case=case.key, shape=shape.as_json())
                if session is self:
                    row |= answer
                if answer.keys() & {"skipped", "failed"}:
                    where = "" if session is self else "there: "
                    reason = answer.keys() & {"skipped", "failed"}
                    return row | {key: where + answer[key] for key in reason}
            measured = [[worker.ask(what="round") for worker in workers] for _ in range(rounds)]
            failed = next((answer for each in measured for answer in each if "seconds" not in answer), None)
            if failed:
                return row | failed
            row |= summary(measured)
        finally:
            for session, worker in zip(sessions, workers, strict=True):
                session.release(case, worker)
        if not self.shared:
            worker = self.worker(case)
            row |= worker.ask(what="memory", case=case.key, shape=shape.as_json())
            self.release(case, worker)
        return row

    def worker(self, case: Case) -> Worker:
        if case.provider not in self.workers:
            self.workers[case.provider] = Worker(self)
        return self.workers[case.provider]

    def release(self, case: Case, worker: Worker) -> None:
        if self.shared and worker.sound:
            worker.ask(what="forget")
        else:
            worker.close()
            self.workers.pop(case.provider, None)


class Worker:
    """A process that runs :mod:`bench.worker`: a line of JSON in, a line out."""

    def __init__(self, session: Session) -> None:
        command = [sys.executable, "-m", "bench.worker", "--device", session.device, "--threads", str(session.threads)]
        if session.prefcore is not None:
            command += ["--prefcore", str(session.prefcore)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.session, self.sound, self.rest = session, True, b""

    def ask(self, **request: object) -> dict:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(request).encode() + b"\n")
            self.process.stdin.flush()
            answer = self.answer()
        except (BrokenPipeError, EOFError):
            answer = {"failed": f"its process ended with {self.process.wait()}"}
        except TimeoutError:
            answer = {"failed": f"no answer in {self.session.limit:.0f} s"}
        # After an unforeseen error a CUDA context may be lost, and memory held.
        self.sound &= "failed" not in answer
        return answer

    def answer(self) -> dict:
        assert self.process.stdout is not None
        end = time.monotonic() + self.session.limit
        while b"\n" not in self.rest:
            ready, _, _ = select.select([self.process.stdout], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                raise TimeoutError
            read = os.read(self.process.stdout.fileno(), 1 << 16)
            if not read:
                raise EOFError
            self.rest += read
        line, self.rest = self.rest.split(b"\n", 1)
        return json.loads(line)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # of a request that it never read
                    pipe.close()


def failures(report: dict) -> list[str]:
    """What prefcore should have done and did not; a peer that fails is a row of the table like another."""
    return [row["failed"] for row in report["rows"] if "failed" in row and row["provider"] == "prefcore"]


def describe(case: Case, shape: Shape) -> dict:
    sizes = {"T": shape.T, "D": shape.D, "V": shape.V, "dtype": str(shape.dtype).removeprefix("torch.")}
    if shape.softcap is not None:
        sizes["softcap"] = shape.softcap
    if case.op in ("dpo", "orpo", "grpo"):
        sizes["length"] = shape.length
    if case.op in ("dpo", "orpo"):
        sizes["prompt"] = shape.prompt
    return {
        "op": case.op,
        "provider": case.provider,
        "schedule": case.schedule,
        "head": case.head,
        "case": case.name,
        **sizes,
        "floor": case.gemms,
        "flops": case.flops(shape),
        "bytes": case.bytes(shape),
        "note": case.note,
    }


def summary(measured: list[list[dict]]) -> dict:
    """Medians of the rounds; each has an answer of this prefcore and, where there is one, of the other."""
    own = [answers[0] for answers in measured]
    times = [1e3 * answer["seconds"] for answer in own]
    ratios = [answer["seconds"] / answer["floor_seconds"] for answer in own]
    row = {
        "rounds": len(measured),
        "milliseconds": statistics.median(times),
        "milliseconds_min": min(times),
        "milliseconds_max": max(times),
        "floor_milliseconds": 1e3 * statistics.median(answer["floor_seconds"] for answer in own),
        "over_floor": statistics.median(ratios),
        "over_floor_min": min(ratios),
        "over_floor_max": max(ratios),
        "teraflops": statistics.median(answer["teraflops"] for answer in own),
        "gigabytes_per_second": statistics.median(answer["gigabytes_per_second"] for answer in own),
    }
    if "gemm_seconds" in own[0]:
        gemms = [answer["seconds"] / answer["gemm_seconds"] for answer in own]
        row |= {
            "gemm_milliseconds": 1e3 * statistics.median(answer["gemm_seconds"] for answer in own),
            "gemms": statistics.median(gemms),
            "gemms_min": min(gemms),
            "gemms_max": max(gemms),
        }
    if len(measured[0]) == 2:
        both = [there["seconds"] / here["seconds"] for here, there in measured]
        row |= {
            "against_milliseconds": 1e3 * statistics.median(there["seconds"] for _, there in measured),
            "speedup": statistics.median(both),
            "speedup_min": min(both),
            "speedup_max": max(both),
        }
    return row


def environment(command: str, device: str) -> dict:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    commit = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    report = {
        "command": command,
        "date": str(datetime.date.today()),
        "commit": commit,
        "device": device_name(device),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
    }
    if device == "cuda":
        report["versions"]["cuda"] = torch.version.cuda
        report["versions"]["driver"] = driver()
    return report


def driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def write(report: dict, path: Path) -> None:
    """The file is whole at any time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=1) + "\n")
    partial.replace(path)


def dated(device: str, prefix: str = "", suffix: str = "") -> Path:
    name = torch.cuda.get_device_name().replace(" ", "-") if device == "cuda" else "cpu"
    return RESULTS / f"{prefix}{name}{suffix}-{datetime.date.today()}.json"
