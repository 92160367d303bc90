"""The head op and its peers against the GEMM they are made of: ``python -m bench.table``.

Every case runs in a process of its own. Its time is taken between two GEMMs ``[T, D] x [D, V]`` of the same size,
again and again, and what is quoted is the median of the ratios: on a shared machine that holds where seconds do not.
Its memory is the growth of the peak resident size (on a GPU, of the peak allocation) in another fresh process that
runs one step.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from bench.cases import CASES, Case, Inputs, Shape

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.table", description=__doc__)
    parser.add_argument("--T", type=int, default=2048)
    parser.add_argument("--D", type=int, default=768)
    parser.add_argument("--V", type=int, default=32768)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--only", help="a part of the names of the cases to run")
    parser.add_argument("--output", type=Path, help="JSON file; a dated one in bench/results by default")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(work(options)))
        return
    rows = [
        row for i, case in enumerate(CASES) if not options.only or options.only in case.name for row in [measure(i)]
    ]
    command = (
        f"python -m bench.table --T {options.T} --D {options.D} --V {options.V} --dtype {options.dtype} "
        f"--device {options.device} --threads {options.threads} --rounds {options.rounds}"
    )
    report = {**environment(command, options.device), "rows": rows}
    print(markdown(report))
    write(report, options)


def write(report: dict, options: argparse.Namespace, prefix: str = "") -> None:
    device = torch.cuda.get_device_name().replace(" ", "-") if options.device == "cuda" else "cpu"
    path = options.output or RESULTS / f"{prefix}{device}-{options.dtype}-{datetime.date.today()}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"\nwritten to {path}", file=sys.stderr)


def measure(index: int) -> dict:
    """One case in two fresh processes: its time, then its memory."""
    row: dict = {"case": CASES[index].name, "floor": CASES[index].floor, "note": CASES[index].note}
    for what in ("time", "memory"):
        command = [sys.executable, "-m", "bench.table", *sys.argv[1:], "--worker", f"{what}:{index}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row |= json.loads(done.stdout.splitlines()[-1])
        if "skipped" in row:
            break
    print(json.dumps(row), file=sys.stderr)
    return row


def work(options: argparse.Namespace) -> dict:
    what, index = options.worker.split(":")
    case = CASES[int(index)]
    torch.set_num_threads(options.threads)
    shape = Shape(options.T, options.D, options.V, getattr(torch, options.dtype), options.device)
    try:
        logps = case.load()
    except LookupError as reason:
        return {"skipped": str(reason)}
    inputs = Inputs.make(shape, case.train_head)
    return memory(case, logps, inputs) if what == "memory" else timing(case, logps, inputs, options.rounds)


def timing(case: Case, logps, inputs: Inputs, rounds: int) -> dict:
    weight, hidden = inputs.weight.detach(), inputs.hidden.detach()
    out = torch.empty(hidden.shape[0], weight.shape[0], dtype=hidden.dtype, device=hidden.device)

    def gemm() -> float:
        return seconds(lambda: torch.mm(hidden, weight.t(), out=out), hidden)

    result = case.step(logps, inputs)
    error = max_error(result, inputs)
    gemm()
    before, ratios, times, unit = gemm(), [], [], []
    for _ in range(rounds):
        own = seconds(lambda: case.step(logps, inputs), hidden)
        after = gemm()
        ratios.append(own / ((before + after) / 2))
        times.append(own)
        unit.append(after)
        before = after
    return {
        "gemms": statistics.median(ratios),
        "gemms_min": min(ratios),
        "gemms_max": max(ratios),
        "milliseconds": 1e3 * statistics.median(times),
        "gemm_milliseconds": 1e3 * statistics.median(unit),
        "max_error": error,
    }


def seconds(step, like: torch.Tensor) -> float:
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


def max_error(logps: torch.Tensor, inputs: Inputs) -> float:
    """Of the first 64 rows, against float64."""
    rows = slice(0, 64)
    logits = inputs.hidden[rows].detach().double() @ inputs.weight.detach().double().t()
    truth = logits.log_softmax(-1).gather(1, inputs.targets[rows, None])[:, 0]
    return (logps[rows].double() - truth).abs().max().item()


def memory(case: Case, logps, inputs: Inputs) -> dict:
    """Growth of the peak over what the process held before; the gradients returned are part of it."""
    if inputs.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        case.step(logps, inputs)
        return {"peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20}
    # Libraries and compilers load what they need on a few rows first.
    rows = 32
    small = Inputs(
        inputs.hidden[:rows].detach().requires_grad_(), inputs.weight[:1024].detach().clone(),
        inputs.targets[:rows] % 1024, inputs.upstream[:rows],
    )  # fmt: skip
    small.weight.requires_grad_(case.train_head)
    case.step(logps, small)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    case.step(logps, inputs)
    return {"peak_mib": (resident("VmHWM") - before) / 2**10}


def resident(field: str) -> int:
    """KiB: VmRSS, what the process holds, or VmHWM, the most it held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def environment(command: str, device: str) -> dict:
    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    return {
        "command": command,
        "date": str(datetime.date.today()),
        "commit": commit,
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu_name(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("prefcore", "torch", "triton", "transformers", "trl")},
    }


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), platform.machine())


def markdown(report: dict) -> str:
    lines = [
        "| | time in GEMMs | over the floor | peak memory | max error of logps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        if "skipped" in row:
            lines.append(f"| {row['case']} | skipped: {row['skipped']} | | | |")
            continue
        lines.append(
            f"| {row['case']} | {row['gemms']:.2f} | {row['gemms'] / row['floor']:.2f} x {row['floor']} "
            f"| {row['peak_mib']:.0f} MiB | {row['max_error']:.1e} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
