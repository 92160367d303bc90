"""Tables and plots of what was measured: ``python -m bench.report FILE… --out DIR``."""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
Rows = list[dict[str, Any]]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__)
    parser.add_argument("results", nargs="*", type=Path, help="JSON files; by default those of bench/results that fit")
    parser.add_argument("--out", type=Path, help="folder of report.md and the plots; without it the tables are printed")
    options = parser.parse_args()
    reports = [json.loads(path.read_text()) for path in options.results or sorted(RESULTS.glob("*.json"))]
    reports = [report for report in reports if any("op" in row for row in report.get("rows", []))]
    if not reports:
        raise SystemExit("none of these files has rows of `python -m bench` or `python -m bench.suite`")
    text = "\n\n".join(f"{heading(report)}\n\n{markdown(report)}" for report in reports)
    if options.out is None:
        print(text)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    names = [name for report in reports for name in draw(report, options.out)]
    pictures = "".join(f"\n\n![{Path(name).stem}]({name})" for name in names)
    (options.out / "report.md").write_text(text + pictures + "\n")
    print(f"{options.out / 'report.md'} and {len(names)} plots")


def heading(report: dict) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items() if version)
    return f"## {report['device']}, {report['date']}\n\n{report['commit']}; {versions}; by `{report['command']}`"


def markdown(report: dict) -> str:
    return "\n\n".join(tables(report))


def tables(report: dict) -> list[str]:
    """One for each op at each shape, and one for all T where there are several."""
    out = [table(rows) for rows in grouped(report["rows"], lambda row: (*shape_of(row), row["T"]))]
    for rows in grouped(swept(report["rows"]), shape_of):
        if len({row["T"] for row in rows}) > 2:
            out.append(sweep(rows))
    return out


def shape_of(row: dict) -> tuple:
    """All sizes but T."""
    return tuple(row.get(name) for name in ("op", "D", "V", "dtype", "softcap", "length", "prompt"))


def swept(rows: Rows) -> Rows:
    """Those with a time; prefcore's linear_loss does the job of linear_logprobs and its backward."""
    return [
        row | {"op": "linear_logprobs"} if row["op"] == "linear_loss" and row["provider"] == "prefcore" else row
        for row in rows
        if "milliseconds" in row
    ]


def grouped(rows: Rows, key: Callable[[dict], Any]) -> Iterable[Rows]:
    """In the order in which the groups come first."""
    groups: dict[Any, Rows] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups.values()


def table(rows: Rows) -> str:
    against = any("speedup" in row for row in rows)
    lines = [
        f"**{title(rows[0])}, T = {rows[0]['T']}**",
        "",
        "| | time | over the floor | peak memory | max error of rows | of the loss | of gradients |"
        + " this / other |" * against,
        "| --- | --- | --- | --- | --- | --- | --- |" + " --- |" * against,
    ]
    for row in rows:
        refused = row.get("failed") or row.get("skipped")
        if refused:
            how = "failed" if "failed" in row else "skipped"
            lines.append(f"| {row['case']} | {how}: {refused} | | | | | |" + " |" * against)
            continue
        lines.append(
            f"| {row['case']} | {row['milliseconds']:.3g} ms | {row['over_floor']:.2f} | {memory(row)} "
            f"| {error(row, 'max_error')} | {error(row, 'loss_error')} | {error(row, 'gradient_error')} |"
            + (f" {1 / row['speedup']:.3f} |" if against else "")
        )
    noted = [row for row in rows if row.get("note") and "skipped" not in row]
    notes = dict.fromkeys(f"- {row['case']}: {row['note']}" for row in noted)
    return "\n".join([*lines, *([""] if notes else []), *notes])


def sweep(rows: Rows) -> str:
    """Time and memory, a column for each T."""
    sizes = sorted({row["T"] for row in rows})
    lines = [
        f"**{title(rows[0])}**",
        "",
        "| T |" + "".join(f" {T} |" for T in sizes),
        "| --- |" + " --- |" * len(sizes),
    ]
    for some in grouped(rows, lambda row: row["case"]):
        cells = {row["T"]: f"{row['milliseconds']:.3g} ms, {memory(row)}".rstrip(", ") for row in some}
        if len(cells) > 1:
            lines.append(f"| {some[0]['case']} |" + "".join(f" {cells.get(T, '')} |" for T in sizes))
    return "\n".join(lines)


def title(row: dict) -> str:
    sizes = f"D = {row['D']}, V = {row['V']}, {row['dtype']}"
    if row["op"] in ("logprobs", "divergence"):
        sizes = f"V = {row['V']}, {row['dtype']}"
    for name, text in (("softcap", "softcap {}"), ("length", "responses of {}"), ("prompt", "prompts of {}")):
        if row.get(name) is not None:
            sizes += ", " + text.format(row[name])
    return f"{row['op']}: {sizes}"


def memory(row: dict) -> str:
    return f"{row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""


def error(row: dict, name: str) -> str:
    return f"{row[name]:.1e}" if name in row else ""


MEASURES = {"milliseconds": "milliseconds", "peak_mib": "MiB beside the inputs", "over_floor": "time over the floor"}


def draw(report: dict, folder: Path) -> list[str]:
    """The names of the plots: sweeps of T and of V, and the ratios to the floor of every table."""
    stem = report["device"].split(" @")[0].replace(" ", "-").replace("(R)", "")
    names = []
    for size, fixed in (("T", shape_of), ("V", lambda row: (row["op"], row["T"], row["D"], row["dtype"]))):
        for some in grouped(swept(report["rows"]), fixed):
            if len({row[size] for row in some}) > 1:
                other, dtype = "V" if size == "T" else "T", some[0]["dtype"]
                names.append(f"{stem}-{some[0]['op']}-{size}-{some[0]['D']}-{some[0][other]}-{dtype}.png")
                draw_sweep(some, size, folder / names[-1])
    rows = [row for row in report["rows"] if "milliseconds" in row]
    for some in grouped(rows, lambda row: (*shape_of(row), row["T"])):
        first = some[0]
        names.append(f"{stem}-{first['op']}-floor-{first['T']}-{first['D']}-{first['V']}-{first['dtype']}.png")
        draw_floor(some, folder / names[-1])
    return names


def figure(*size: float, panels: int = 1):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    return plt.subplots(1, panels, figsize=size, layout="constrained", squeeze=False)


def draw_sweep(rows: Rows, size: str, path: Path) -> None:
    from matplotlib import pyplot as plt

    plot, axes = figure(15, 4.6, panels=3)
    styles = itertools.cycle(["o-", "s--", "^-.", "D:", "v-", "P--", "X-."])
    for curve, style in zip(grouped(rows, lambda row: row["case"]), styles, strict=False):
        if len({row[size] for row in curve}) == 1:
            continue
        curve = sorted(curve, key=lambda row: row[size])
        for axis, measure in zip(axes[0], MEASURES, strict=True):
            points = [(row[size], row[measure]) for row in curve if measure in row]
            if points:
                axis.plot(*zip(*points, strict=True), style, label=curve[0]["case"], linewidth=1.2, markersize=4)
    for axis, text in zip(axes[0], MEASURES.values(), strict=True):
        axis.set(xscale="log", yscale="log", xlabel=size, ylabel=text)
        sizes = sorted({row[size] for row in rows})
        axis.set_xticks(sizes, [str(value) for value in sizes], fontsize=8)
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][-1].set_yscale("linear")
    axes[0][-1].set_ylim(bottom=0)
    others = title(rows[0]) if size == "T" else f"{rows[0]['op']}: T = {rows[0]['T']}, D = {rows[0]['D']}"
    plot.suptitle(others)
    plot.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    plot.savefig(path, dpi=90)
    plt.close(plot)


def draw_floor(rows: Rows, path: Path) -> None:
    from matplotlib import pyplot as plt

    plot, axes = figure(8, 1.4 + 0.3 * len(rows))
    axis = axes[0][0]
    names = [row["case"] for row in rows]
    bars = axis.barh(names, [row["over_floor"] for row in rows], color=[colour(row) for row in rows])
    axis.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axis.axvline(1, color="black", linewidth=1)
    axis.invert_yaxis()
    axis.set_xlabel(MEASURES["over_floor"])
    axis.margins(x=0.12)
    plot.suptitle(f"{title(rows[0])}, T = {rows[0]['T']}", fontsize=10)
    plot.savefig(path, dpi=90)
    plt.close(plot)


def colour(row: dict) -> str:
    return "#2f6fb0" if row["provider"] == "prefcore" else "#b0b7bf"


if __name__ == "__main__":
    main()
