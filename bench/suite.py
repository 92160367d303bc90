"""Every case at the shapes that count, the most important first: ``python -m bench.suite --part 1/3 --device cuda``.

The parts can run in sessions of their own: each appends its rows to one JSON file, after every case, so a part that is
cut off loses nothing but the rest. A file of another commit, machine or set of versions is left alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.cases import CASES, OPS, TITLES, Case
from bench.inputs import MODELS, Shape
from bench.measure import Session, dated, environment, failures, write

Job = tuple[Case, Shape]
LIMIT = 180.0  # seconds that one answer may take, compilation included
TARGET = Shape(4096, MODELS["llama-3-8b"].D, MODELS["llama-3-8b"].V)
# One way of each provider for the sweeps; the head is trained.
SWEPT = {
    ("linear_logprobs", "prefcore", "auto"),
    ("linear_loss", "prefcore", "loop"),
    ("linear_logprobs", "pytorch", "autograd"),
    ("linear_logprobs", "trl", "chunked"),
    ("linear_logprobs", "liger", "fused"),
    ("linear_logprobs", "cce", "filtered"),
    ("linear_logprobs", "cce", "exact"),
}


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of about the same duration")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further case is started")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--op", nargs="+", default=list(OPS), choices=OPS)
    parser.add_argument("--provider", nargs="+", default=list(TITLES), choices=TITLES)
    parser.add_argument(
        "--tiny", action="store_true", help="at shapes of no use and without torch.compile, to see that all of it runs"
    )
    parser.add_argument("--list", action="store_true", help="print the cases of this part and measure nothing")
    parser.add_argument("--output", type=Path, help="JSON file; <device>-<date>.json in bench/results by default")
    return parser


def main() -> None:
    begin = time.monotonic()
    options = arguments().parse_args()
    some = part(list(jobs(options)), options.part)
    if options.list:
        for case, shape in some:
            print(f"{case.key:50} T={shape.T} D={shape.D} V={shape.V} {shape.dtype}")
        print(f"{len(some)} cases, about {sum(map(duration, some)):.0f} s on an H200")
        return
    path, report = opened(options)
    # On a CPU a process for each case costs more than a tiny case.
    with Session(options.device, options.threads, shared=True if options.tiny else None) as session:
        for case, shape in some:
            left = LIMIT if options.time_limit is None else options.time_limit - (time.monotonic() - begin)
            session.limit = min(LIMIT, left)
            row = session.measure(case, shape, rounds(options.rounds, shape)) if left > 0 else None
            if row is None or (left < LIMIT and time.monotonic() - begin >= options.time_limit):
                print(f"stopped by --time-limit at {case.key}, T={shape.T}", file=sys.stderr)
                break
            report["rows"] = [old for old in report["rows"] if identity(old) != identity(row)] + [row]
            write(report, path)
            told = row.get("failed") or row.get("skipped") or f"{row['milliseconds']:.3g} ms, {row['over_floor']:.2f}"
            print(f"{time.monotonic() - begin:5.0f} s  {case.key} T={shape.T} V={shape.V}: {told}", file=sys.stderr)
    print(f"{len(report['rows'])} rows in {path}")
    if failures(report):
        raise SystemExit(1)


def jobs(options: argparse.Namespace) -> Iterator[Job]:
    """Each once, the most important first."""
    dtype = torch.float32 if options.device == "cpu" else torch.bfloat16
    seen = set()
    for case, shape in grid():
        shape = dataclasses.replace(shape, device=options.device, dtype=dtype)
        if options.tiny:
            shape = dataclasses.replace(
                shape, T=16 if shape.T <= TARGET.T else 32, D=16, V=96, length=8, prompt=8, softcap=None
            )
            if case.provider == "compile":  # it takes longer than all the rest
                continue
        wanted = case.op in options.op and case.provider in options.provider
        if wanted and (case.key, shape) not in seen:
            seen.add((case.key, shape))
            yield case, shape


def grid() -> Iterator[Job]:
    target, pairs = TARGET, dataclasses.replace(TARGET, T=8192)  # 16384 packed tokens, half of them prompts
    of = {op: [case for case in CASES.values() if case.op == op] for op in OPS}
    trained = {op: [case for case in cases if case.head == "trained"] for op, cases in of.items()}

    yield from ((case, target) for case in of["linear_logprobs"] + of["linear_loss"])
    yield from ((case, dataclasses.replace(target, T=8192, V=151936)) for case in of["logprobs"])
    yield from ((case, pairs) for case in trained["dpo"])
    yield from ((case, target) for case in trained["cross_entropy"] + trained["grpo"] + trained["linear_divergence"])
    yield from ((case, dataclasses.replace(target, T=8192, V=151936)) for case in of["divergence"])
    yield from ((case, pairs) for case in trained["orpo"])

    swept = [case for case in CASES.values() if case.head == "trained" and key(case) in SWEPT]
    alone = [CASES["linear_logprobs/prefcore/forward/none"], CASES["linear_logprobs/prefcore/auto/frozen"]]
    for T in (1024, 2048, 8192, 16384, 32768, 65536):
        yield from ((case, dataclasses.replace(target, T=T)) for case in swept + alone)
    for model in ("qwen2.5-0.5b", "qwen2.5-7b", "gemma-2-2b"):
        head = MODELS[model]
        yield from ((case, Shape(8192, head.D, head.V, softcap=head.softcap)) for case in swept + alone)
    for V in (32000, 64000, 256000):
        yield from ((case, dataclasses.replace(target, T=8192, V=V)) for case in swept)
    yield from ((case, pairs) for case in of["dpo"] if case.head == "frozen")
    yield from ((case, target) for case in of["cross_entropy"] + of["grpo"] if case.head == "frozen")


def key(case: Case) -> tuple[str, str, str]:
    return case.op, case.provider, case.schedule


def duration(job: Job) -> float:
    """Seconds that a case may take on an H200, roughly: only the division into parts goes by it."""
    case, shape = job
    unit = 2 * shape.T * shape.D * shape.V / 6e14
    compiling = 20.0 if case.provider == "compile" or (case.provider == "liger" and case.op in ("dpo", "orpo")) else 0.0
    slow = 3 if case.provider == "liger" else 1
    return 1.0 + compiling + (2 + rounds(7, shape)) * unit * (2 + 4 * slow) + 10 * unit


def rounds(most: int, shape: Shape) -> int:
    """Fewer where one takes long."""
    unit = 2 * shape.T * shape.D * shape.V / 6e14
    return max(3, min(most, int(0.2 / unit))) if most > 3 else most


def part(every: list[Job], which: str) -> list[Job]:
    """The K-th of N runs of jobs that take about as long."""
    try:
        k, n = map(int, which.split("/"))
    except ValueError:
        k, n = 0, 0
    if not 1 <= k <= n:
        raise SystemExit(f"--part is K/N with 1 <= K <= N, got {which!r}")
    total = sum(map(duration, every))
    ends = itertools.accumulate(map(duration, every))
    return [job for job, end in zip(every, ends, strict=True) if k == min(n, int((end - 1e-9) * n / total) + 1)]


def identity(row: dict) -> tuple:
    names = ("op", "provider", "schedule", "head", "T", "D", "V", "dtype", "softcap", "length", "prompt")
    return tuple(row.get(name) for name in names)


def opened(options: argparse.Namespace) -> tuple[Path, dict]:
    """The file of this machine and day, with the rows of other parts, if they came from the same code."""
    command = f"python -m bench.suite --device {options.device}" + " --tiny" * options.tiny
    report: dict = {**environment(command, options.device), "rows": []}
    path = options.output or dated(options.device)
    if path.exists():
        old = json.loads(path.read_text())
        if {**old, "date": report["date"], "rows": []} == report:
            return path, old
        if options.output:
            raise SystemExit(f"{path} is of another commit, machine or set of versions; give another --output")
        path = dated(options.device, suffix=f"-{report['commit']}")
        if path.exists():
            return path, json.loads(path.read_text())
    return path, report


if __name__ == "__main__":
    main()
