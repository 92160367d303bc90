"""``prefcore losses``: the methods, rewards among them, and what each must be given."""

from __future__ import annotations

import argparse
import json
import textwrap
from typing import Any, get_args

from prefcore.losses._registry import Family, Method


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to ``prefcore``'s; its ``run`` is :func:`run`."""
    parser = subparsers.add_parser(
        "losses",
        help="the methods, and what each must be given",
        description="List the methods of prefcore.losses and prefcore.rewards: the name and its aliases, what it needs "
        "beside the policy's log-probs, how its tokens are aggregated, whether it separates over groups (so that "
        "linear_loss can run it), and the paper.",
    )
    parser.add_argument("--family", choices=get_args(Family), help="those of one family alone")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the list, as text or as JSON, and return 0."""
    methods = [method for method in _methods() if args.family in (None, method.family)]
    if args.json:
        print(json.dumps({method.name: _plain(method) for method in methods}, indent=2))
        return 0
    for family in dict.fromkeys(method.family for method in methods):
        print(f"{family}\n")
        for method in methods:
            if method.family == family:
                print(_text(method))
    return 0


def _methods() -> list[Method]:
    from prefcore import losses, rewards  # noqa: F401 - their import enters them into the registry

    names = [name for family in get_args(Family) for name in losses.names(family)]
    return sorted((losses.get(name) for name in names), key=lambda method: (method.family, method.name))


def _plain(method: Method) -> dict[str, Any]:
    return {
        "family": method.family,
        "aliases": list(method.aliases),
        "needs": sorted(method.needs),
        "aggregation": method.aggregation,
        "separable": method.separable,
        "paper": method.paper,
    }


def _text(method: Method) -> str:
    facts = [f"needs {', '.join(sorted(method.needs)) or 'nothing else'}"]
    if method.aliases:
        facts.insert(0, f"also {', '.join(method.aliases)}")
    if method.aggregation is not None:
        facts.append(f"aggregated as {method.aggregation}")
    if not method.separable:
        facts.append("not separable")
    lines = [f"  {method.name}", *textwrap.wrap("; ".join(facts), 100), *textwrap.wrap(method.paper, 100)]
    return "\n      ".join(lines)
