"""Every case at the shapes that count, the most important first: ``python -m bench.suite --part 1/3 --device cuda``.

The parts can run in sessions of their own: each appends its rows to one JSON file, after every case, so a part that is
cut off loses nothing but the rest.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.suite", description=__doc__)
    parser.add_argument("--part", default="1/1", help="K/N: the K-th of N parts of about the same duration")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=2, help="of torch, on a CPU")
    parser.add_argument("--time-limit", type=float, help="seconds after which no further case is started")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--tiny", action="store_true", help="at shapes of no use, to see that all of it runs")
    parser.add_argument("--list", action="store_true", help="print the cases of this part and measure nothing")
    parser.add_argument("--output", type=Path, help="JSON file; <device>-<date>.json in bench/results by default")
    return parser


if __name__ == "__main__":
    raise SystemExit("not measured yet: " + str(parser().parse_args()))
