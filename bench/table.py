"""The README's table, the head op and its peers against the GEMM they are made of: ``python -m bench.table``.

The cases of ``python -m bench --op linear_logprobs`` and prefcore's of ``linear_loss``, in GEMMs ``[T, D] x [D, V]``.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from bench.cases import CASES
from bench.inputs import Shape
from bench.measure import Session, dated, environment, write


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
    options = parser.parse_args()
    shape = Shape(options.T, options.D, options.V, getattr(torch, options.dtype), options.device)
    command = (
        f"python -m bench.table --T {options.T} --D {options.D} --V {options.V} --dtype {options.dtype} "
        f"--device {options.device} --threads {options.threads} --rounds {options.rounds}"
    )
    report: dict = {**environment(command, options.device), "rows": []}
    with Session(options.device, options.threads) as session:
        for case in CASES.values():
            loop = case.op == "linear_loss" and case.provider == "prefcore"
            wanted = loop or (case.op == "linear_logprobs" and case.schedule != "auto")
            if wanted and (not options.only or options.only in case.name):
                report["rows"].append(session.measure(case, shape, options.rounds))
                print(json.dumps(report["rows"][-1]), file=sys.stderr)
    print(markdown(report))
    path = options.output or dated(options.device, suffix=f"-{options.dtype}")
    write(report, path)
    print(f"\nwritten to {path}", file=sys.stderr)


def markdown(report: dict) -> str:
    lines = [
        "| | time in GEMMs | over the floor | peak memory | max error of logps |",
        "| --- | --- | --- | --- | --- |",
    ]
    for row in report["rows"]:
        if "skipped" in row:
            continue
        if "failed" in row:
            lines.append(f"| {row['case']} | failed: {row['failed']} | | | |")
            continue
        lines.append(
            f"| {row['case']} | {row['gemms']:.2f} | {row['gemms'] / row['floor']:.2f} x {row['floor']} "
            f"| {row['peak_mib']:.0f} MiB | {row['max_error']:.1e} |"
        )
    left_out = dict.fromkeys(row["skipped"] for row in report["rows"] if "skipped" in row)
    return "\n".join(lines + [f"\nLeft out: {'; '.join(left_out)}."] * bool(left_out))


if __name__ == "__main__":
    main()
