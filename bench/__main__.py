"""The ops of the head at a shape of your own, by prefcore and its peers: ``python -m bench --op dpo --T 8192 …``.

Each row is a provider's way: its time, the ratio to the floor max(flops / peak, bytes / bandwidth) with both rates
measured beside it, its peak memory beyond the inputs (gradients included), and its largest error against float64.
``--against GITREF`` measures another revision of prefcore in turn with this one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path

import torch

from bench.against import revision
from bench.cases import CASES, HEADS, OPS, TITLES, Case
from bench.inputs import DTYPES, MODELS, Shape
from bench.measure import ROOT, Session, environment, failures, write
from bench.report import markdown


def size(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--op", nargs="+", default=["linear_logprobs"], choices=OPS)
    parser.add_argument("--T", type=size, nargs="+", default=[2048], help="rows that are scored; one after another")
    parser.add_argument("--D", type=size, help="hidden size; 768 by default")
    parser.add_argument("--V", type=size, help="vocabulary; 32768 by default")
    parser.add_argument("--model", choices=MODELS, help="take D, V and the softcap of its head")
    parser.add_argument("--softcap", type=float)
    parser.add_argument(
        "--length", type=size, help="tokens of a response, of dpo, orpo and grpo; 512, or T / 2 if less"
    )
    parser.add_argument("--prompt", type=int, help="rows of the prompt before each response of dpo and orpo; as length")
    parser.add_argument("--dtype", default="fp32", choices=DTYPES)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=size, default=2, help="of torch, on a CPU")
    parser.add_argument("--provider", nargs="+", default=list(TITLES), choices=TITLES)
    parser.add_argument("--schedule", nargs="+", help="those of these names alone")
    parser.add_argument("--head", nargs="+", default=list(HEADS), choices=HEADS, help="which gradients are computed")
    parser.add_argument("--against", metavar="GITREF", help="a revision of prefcore to measure in turn with this one")
    parser.add_argument("--rounds", type=size, default=9)
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write device, versions, commit, command and rows there"
    )
    return parser


def main() -> None:
    options = arguments().parse_args()
    cases = chosen(options)
    if not cases:
        raise SystemExit("no case has this op, provider, schedule and head")
    report = {**environment("python -m bench " + shlex.join(sys.argv[1:]), options.device), "rows": []}
    if options.against:
        report["against"] = options.against
    with contextlib.ExitStack() as stack:
        session = stack.enter_context(Session(options.device, options.threads))
        other = None
        if options.against:
            folder = stack.enter_context(revision(options.against, ROOT))
            other = stack.enter_context(Session(options.device, options.threads, prefcore=folder))
        for T in options.T:
            for case in cases:
                row = session.measure(case, shape(options, T), options.rounds, other)
                print(json.dumps(row), file=sys.stderr)
                report["rows"].append(row)
                if options.json:
                    write(report, options.json)
    print(markdown(report))
    if failures(report):
        raise SystemExit(1)


def chosen(options: argparse.Namespace) -> list[Case]:
    return [
        case
        for case in CASES.values()
        if case.op in options.op
        and case.provider in options.provider
        and case.head in options.head
        and (not options.schedule or case.schedule in options.schedule)
        and (not options.against or case.provider == "prefcore")
    ]


def shape(options: argparse.Namespace, T: int) -> Shape:
    head = MODELS.get(options.model)
    length = options.length or max(1, min(512, T // 2))
    return Shape(
        T,
        options.D or (head.D if head else 768),
        options.V or (head.V if head else 32768),
        DTYPES[options.dtype],
        options.device,
        options.softcap or (head.softcap if head else None),
        length,
        length if options.prompt is None else options.prompt,
    )


if __name__ == "__main__":
    main()
