"""All that a machine with a GPU has to show, in parts of at most nine minutes: ``python -m bench.gpu``.

A part that fails, hangs or runs out of time does not keep the next one from running, and what it left out is said. Each
part's report goes into a JSON file beside the benchmarks' results as soon as the part ends, so that parts can run in
sessions of their own; the exit status says whether all of them succeeded.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from bench.gpu_tests import ROOT, kill, run_tests
from bench.measure import RESULTS, environment
from prefcore.cli import doctor

LIMIT = 540.0  # seconds
FOUND = 99  # compute-sanitizer's status where it found something, instead of that of the tests
SUITE = 3  # parts of the head's benchmark
MODELS = {"qwen2.5-0.5b": 16, "llama-3.2-1b": 8}  # pairs of a whole step
TOKENS = ["bench/test_gae.py", "bench/test_rewards.py", "bench/test_policy.py", "bench/test_listwise.py"]


def _files(folder: str) -> list[Path]:
    return sorted((ROOT / "tests" / folder).glob("test_*.py"))


TESTS = {
    "kernels": ["gpu/test_kernels_gpu.py", "ops/test_rows.py", "ops/test_logprobs.py"],
    "head": ["gpu/test_head_gpu.py", "ops/test_linear_logprobs.py"],
    "divergence": [f"ops/test_{name}.py" for name in ("divergence", "linear_divergence", "pair_rows")],
    "loss": ["gpu/test_linear_loss_gpu.py", "ops/test_linear_loss.py"],
    "ragged": [f"ops/test_{op}.py" for op in ("sequence_reduce", "aggregate", "gather_rows")]
    + ["gpu/test_ragged_gpu.py", "gpu/test_gather_rows_gpu.py"],
    "policy": [f"ops/test_{op}.py" for op in ("gae", "token_rewards", "policy_terms")]
    + ["gpu/test_gae_gpu.py", "gpu/test_token_rewards_gpu.py"],
    "groups": [f"ops/test_{op}.py" for op in ("listwise_loss", "rank_statistics", "preference_means")]
    + ["gpu/test_listwise_gpu.py"],
    # Many tiny launches: a part for the losses alone, whose tests are most of all.
    "losses": [f"losses/{path.name}" for path in _files("losses")] + ["gpu/test_list_losses_gpu.py"],
    "plugs": ["gpu/test_drop_in_gpu.py", "ops/test_low_rank.py"]
    + [f"{path.parent.name}/{path.name}" for folder in ("hf", "nn", "trl") for path in _files(folder)],
    "rest": [],  # all other files
}


class Settings(NamedTuple):
    dry: bool
    results: Path
    limit: float
    workers: int
    machine: str  # as results are named

    @property
    def device(self) -> str:
        return "cpu" if self.dry else "cuda"


Report = dict[str, Any]  # "failed" lists what went wrong, "text" says in a line what was done


def machine(settings: Settings) -> Report:
    """What is there, and that auto has an implementation of every op for it."""
    report: Report = {"doctor": doctor.examine()}
    for name, *arguments in (
        ("nvidia-smi", "--query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit", "--format=csv"),
        ("nvcc", "--version"),
        ("compute-sanitizer", "--version"),
    ):
        report[name] = None
        if shutil.which(name):
            done = subprocess.run([name, *arguments], capture_output=True, text=True, timeout=60)
            report[name] = done.stdout.strip().splitlines()
    print(json.dumps(report, indent=1))
    ops = report["doctor"]["ops"]
    report["failed"] = [
        f"{op}: {entry['implementations']}" for op, entry in ops.items() if entry["auto"].get(settings.device) is None
    ]
    return report | {"text": f"{len(ops)} ops, {report['doctor']['attention']['auto']} attention"}


def tests(settings: Settings, name: str) -> Report:
    return run_tests(paths(name), "gpu", settings.limit, settings.workers)


def paths(name: str) -> list[str]:
    if TESTS[name]:
        return [f"tests/{path}" for path in TESTS[name]]
    elsewhere = {ROOT / "tests" / path for part in TESTS.values() for path in part}
    files = set((ROOT / "tests").rglob("test_*.py")) - elsewhere
    return sorted(str(path.relative_to(ROOT)) for path in files)


def sanitize(settings: Settings, tool: str) -> Report:
    """The tests marked ``sanitize``, with each tensor in an allocation of its own: past a tensor is past memory."""
    if shutil.which("compute-sanitizer") is None:
        return {"text": "skipped: compute-sanitizer is not on PATH; it comes with the CUDA toolkit"}
    log = settings.results / f"{settings.machine}-{datetime.date.today()}-{tool}.log"
    prefix = ("compute-sanitizer", "--tool", tool, "--log-file", str(log), "--error-exitcode", str(FOUND))
    report = run_tests(
        ["tests"], "gpu and sanitize", settings.limit, 1, prefix, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    )
    found = f"{tool} found errors: {log.name}"
    failed = [found if f"status {FOUND}" in line else line for line in report["failed"]]
    return report | {"failed": failed, "log": log.read_text().splitlines()[-60:] if log.exists() else None}


def command(settings: Settings, module: str, *arguments: str) -> Report:
    """A benchmark, whose results it writes itself."""
    call = [sys.executable, "-m", module, *arguments]
    process = subprocess.Popen(call, cwd=ROOT, start_new_session=True)
    try:
        status = process.wait(settings.limit)
    except subprocess.TimeoutExpired:
        kill(process)
        return {"command": call[1:], "failed": [f"{module} was ended at the limit of {settings.limit:.0f} s"]}
    failed = [f"{module} ended with status {status}"] if status else []
    return {"command": call[1:], "text": " ".join(call[1:]), "failed": failed}


def suite(settings: Settings, number: int) -> Report:
    return command(settings, "bench.suite", *suite_arguments(settings, number))


def suite_arguments(settings: Settings, number: int) -> list[str]:
    output = settings.results / f"{settings.machine}-{datetime.date.today()}.json"
    # A case that has begun is let finish.
    limited = ["--time-limit", str(int(settings.limit - 90)), "--output", str(output)]
    return ["--part", f"{number}/{SUITE}", "--device", settings.device, *limited, *(["--tiny"] if settings.dry else [])]


def step(settings: Settings, model: str) -> Report:
    output = settings.results / f"step-{model}-{settings.machine}-bfloat16-{datetime.date.today()}.json"
    sizes = ["--dtype", "bfloat16", "--model", model, "--pairs", str(MODELS[model]), "--k", "2", "4", "8"]
    if settings.dry:
        sizes = ["--model", "tiny", "--pairs", "2", "--k", "4", "--max-length", "200", "--rounds", "1", "--provider"]
        sizes += ["share", "trl"]
    return command(settings, "bench.step", "--device", settings.device, *sizes, "--output", str(output))


def tokens(settings: Settings) -> Report:
    """What works on numbers of tokens and of groups: rewards, scans and policy losses, losses of ranked lists."""
    output = settings.results / f"tokens-{settings.machine}-{datetime.date.today()}.json"
    how = ["--benchmark-disable"] if settings.dry else [f"--benchmark-json={output}"]
    return command(settings, "pytest", "-q", "-p", "no:cacheprovider", *how, *TOKENS)


PARTS: dict[str, Callable[[Settings], Report]] = {
    "machine": machine,
    **{f"tests-{name}": functools.partial(tests, name=name) for name in TESTS},
    # racecheck looks at shared memory, memcheck at all of it.
    **{tool: functools.partial(sanitize, tool=tool) for tool in ("memcheck", "racecheck")},
    **{f"suite-{number}": functools.partial(suite, number=number) for number in range(1, SUITE + 1)},
    "tokens": tokens,
    **{f"step-{model}": functools.partial(step, model=model) for model in MODELS},
}


def run(names: Sequence[str], settings: Settings) -> int:
    """Run parts one after another; 0 if all succeeded."""
    settings.results.mkdir(parents=True, exist_ok=True)
    reports = {}
    for name in names:
        print(f"\n== {name}", flush=True)
        begin = time.monotonic()
        try:
            report = PARTS[name](settings)
        except Exception as error:  # a fault of one part must not cost the others
            report = {"failed": [f"{type(error).__name__}: {error}"]}
        reports[name] = report | {"seconds": round(time.monotonic() - begin, 1)}
        path = write(name, reports[name], settings)
        print(describe(name, reports[name]), flush=True)
    print("\n== in all", *(describe(name, report) for name, report in reports.items()), f"written to {path}", sep="\n")
    return int(any(report.get("failed") for report in reports.values()))


def describe(name: str, report: Report) -> str:
    failed = report.get("failed", [])
    lines = [f"{'FAILED' if failed else 'ok':6} {name:18} {report['seconds']:5.0f} s  {report.get('text', '')}"]
    lines += [f"       {line}" for line in failed[:12]]
    lines += [f"       and {len(failed) - 12} more"] if len(failed) > 12 else []
    return "\n".join(lines)


def write(name: str, report: Report, settings: Settings) -> Path:
    """Add a part's report to those of the parts that ran before, in this run or in an earlier one."""
    path = settings.results / f"{settings.machine}-{datetime.date.today()}-checks.json"
    known = json.loads(path.read_text())["parts"] if path.exists() else {}
    found = environment("python -m bench.gpu", settings.device)
    path.write_text(json.dumps({**found, "parts": {**known, name: report}}, indent=1) + "\n")
    return path


def chosen(wanted: Sequence[str] | None) -> list[str]:
    """Names of parts, from names, numbers and ranges of numbers such as 2-6."""
    every, names = list(PARTS), []
    for each in wanted or every:
        span = re.fullmatch(r"(\d+)(?:-(\d+))?", each)
        found = every[int(span[1]) - 1 : int(span[2] or span[1])] if span and int(span[1]) else []
        found = [each] if each in PARTS else found
        if not found:
            sys.exit(f"no part {each!r}; there are 1 to {len(every)}: {', '.join(every)}")
        names += found
    return names


def default_workers() -> int:
    """Compiling the kernels takes most of the tests' time. The largest tests take 16 GiB of the GPU's memory."""
    memory = torch.cuda.get_device_properties(0).total_memory
    return max(1, min(8, (os.cpu_count() or 1) // 2, memory // 2**34))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--part", nargs="+", help="names, numbers or ranges of numbers of parts; all by default")
    parser.add_argument("--list", action="store_true", help="name the parts and run none")
    parser.add_argument("--dry", action="store_true", help="on the CPU with small shapes, to see that all of it runs")
    parser.add_argument("--results", type=Path, help="folder; bench/results by default, build/gpu-dry for a dry run")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds that a part may take")
    parser.add_argument("--workers", type=int, help="processes that run tests side by side")
    options = parser.parse_args()
    names = chosen(options.part)
    if options.list:
        print(*(f"{number:2} {name}" for number, name in enumerate(PARTS, start=1)), sep="\n")
        return
    if not options.dry and not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no GPU; --dry runs on the CPU")
    results = options.results or (ROOT / "build" / "gpu-dry" if options.dry else RESULTS)
    workers = options.workers or (1 if options.dry else default_workers())
    name = "dry" if options.dry else torch.cuda.get_device_name().replace(" ", "-")
    sys.exit(run(names, Settings(options.dry, results.resolve(), options.limit, workers, name)))


if __name__ == "__main__":
    main()
