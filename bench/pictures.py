"""The README's pictures: ``python -m bench.pictures`` draws them, with ``--measure`` after two training runs.

``layout.png`` is drawn from a batch of :func:`prefcore.data.pack`; ``sharing.png`` from the numbers of two runs of
``prefcore train`` that differ in ``--sharing`` alone, kept in ``bench/results``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, Rectangle

from bench.measure import environment
from prefcore.data import PackedBatch, pack

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sharing-demo.json"
SHOWN = {"loss": "loss", "rewards/margins": "reward margin", "rewards/accuracies": "accuracy"}

# Prompts and their responses, as words.
GROUPS = (
    ("what is red ?", ("a rose .", "wine .", "the late sun .")),
    ("two and two ?", ("four .", "it is five .")),
)
# Of each group the colour of its prompt and of each of its responses.
COLOURS = (
    ("#8c96a3", "#2f6fb0", "#4aa3c7", "#1f9c8f"),
    ("#a59c8d", "#c9622b", "#dd9a26"),
)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.pictures", description=__doc__)
    parser.add_argument("--output", type=Path, default=HERE / "pictures", help="folder of the pictures")
    parser.add_argument("--measure", action="store_true", help=f"train first, and write {RESULTS.name}")
    options = parser.parse_args()
    if options.measure:
        RESULTS.write_text(json.dumps(measure(), indent=1) + "\n")
    options.output.mkdir(exist_ok=True)
    draw_layout(options.output / "layout.png")
    draw_sharing(json.loads(RESULTS.read_text()), options.output / "sharing.png")


def draw_layout(path: Path) -> None:
    """One batch: its tokens, their positions, which predicts which, and who attends to whom."""
    words = [word for prompt, responses in GROUPS for text in (prompt, *responses) for word in text.split()]
    batches = {sharing: batch_of(sharing) for sharing in ("share", "pack", "off")}
    batch = batches["share"]
    n = batch.layout.tokens
    segment, _ = batch.layout.of_tokens()
    colours = [colour for group in COLOURS for colour in group]

    figure = plt.figure(figsize=(9.6, 11.2))
    # Both are as wide as N cells; a cell is square in both.
    left, width = 0.115, 0.865
    cell = width * figure.get_figwidth() / n / figure.get_figheight()
    grid = figure.add_axes((left, 0.05, width, n * cell))
    strip = figure.add_axes((left, 0.06 + n * cell, width, 4.2 * cell))
    strip.set(xlim=(-0.5, n - 0.5), ylim=(-1, 3.2))
    _draw_tokens(strip, batch, words, [colours[s] for s in segment])
    _draw_attention(grid, batch, words, colours)
    figure.suptitle(
        f'Two prompts with three and two responses: {n} tokens with sharing="share"\n'
        f'({batches["pack"].layout.tokens} with "pack", {batches["off"].layout.tokens} with "off")',
        fontsize=13,
    )
    figure.savefig(path, dpi=100)
    plt.close(figure)


def batch_of(sharing: str) -> PackedBatch:
    """The batch of ``GROUPS``, every word a token."""
    prompts = [list(range(len(prompt.split()))) for prompt, _ in GROUPS]
    responses = [[list(range(len(text.split()))) for text in texts] for _, texts in GROUPS]
    return pack(prompts, responses, sharing=sharing)


def _draw_tokens(axis: Axes, batch: PackedBatch, words: list[str], colours: list[str]) -> None:
    """Tokens as cells, positions below, and an arc from each row to the token that it predicts."""
    layout = batch.layout
    for place, (word, colour) in enumerate(zip(words, colours, strict=True)):
        axis.add_patch(Rectangle((place - 0.5, 0), 1, 1, facecolor=colour, edgecolor="white", linewidth=1.5))
        axis.text(place, 0.5, word, ha="center", va="center", color="white", fontsize=8.5, fontweight="bold")
        axis.text(place, -0.45, int(batch.position_ids[place]), ha="center", va="center", fontsize=9.5)
    answers = layout.context_lengths > 0
    targets = np.concatenate(
        [np.arange(s, s + m) for s, m in zip(layout.starts[answers], layout.lengths[answers], strict=True)]
    )
    for row, target in zip(batch.rows.tolist(), targets.tolist(), strict=True):
        # An arc is half as high as its bend times its width.
        width = target - row
        bend = -0.9 * (1 + 0.5 * (width - 1)) / width
        arc = FancyArrowPatch(
            (row, 1.04),
            (target, 1.04),
            connectionstyle=f"arc3,rad={bend}",
            arrowstyle="-|>",
            mutation_scale=9,
            color=colours[target],
            linewidth=1.4,
            shrinkA=0,
            shrinkB=0,
        )
        axis.add_patch(arc)
    axis.set_xticks([])
    axis.set_yticks([1.6, 0.5, -0.45], ["rows → targets", "tokens", "positions"], fontsize=10)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def _draw_attention(axis: Axes, batch: PackedBatch, words: list[str], colours: list[str]) -> None:
    """The N x N matrix: what a token attends to of its own segment in full colour, its context lighter."""
    layout = batch.layout
    segment, _ = layout.of_tokens()
    attends = layout.attends()
    n = layout.tokens
    own = segment[:, None] == segment[None]
    picture = np.ones((n, n, 3))
    for number, colour in enumerate(colours):
        rgb = np.array(matplotlib.colors.to_rgb(colour))
        rows = (segment == number)[:, None] & attends
        picture[rows & own] = rgb
        picture[rows & ~own] = 0.45 * rgb + 0.55
    axis.imshow(picture, extent=(-0.5, n - 0.5, n - 0.5, -0.5), interpolation="nearest", aspect="equal")
    for edge in np.arange(n - 1) + 0.5:
        axis.axhline(edge, color="#eceff1", linewidth=0.6)
        axis.axvline(edge, color="#eceff1", linewidth=0.6)
    for edge in layout.starts[1:] - 0.5:
        axis.axhline(edge, color="#90a0ab", linewidth=1)
        axis.axvline(edge, color="#90a0ab", linewidth=1)
    axis.set_xticks([])
    axis.set_yticks(range(n), words, fontsize=9.5, fontweight="bold")
    for label, number in zip(axis.get_yticklabels(), segment, strict=True):
        label.set_color(colours[number])
    axis.tick_params(length=0)
    axis.spines[:].set_color("#90a0ab")
    axis.set_xlabel(
        "Each token attends to its own segment up to itself (dark) and to its prompt (light), and to nothing else.",
        fontsize=10.5,
        labelpad=9,
    )


def measure(**sizes: int) -> dict:
    """The history of the demonstration's training, with prompts shared and without; ``sizes`` as it has."""
    from prefcore.cli import _demo, main

    runs = {}
    with tempfile.TemporaryDirectory() as folder:
        shared, padded = Path(folder, "share"), Path(folder, "off")
        given = _demo.run(shared, **sizes)["settings"]
        options = [
            *("--data", shared / "pairs.jsonl", "--eval-data", shared / "held-out.jsonl", "--model", shared / "start"),
            *("--lr", given["lr"], "--beta", given["beta"], "--batch-size", given["batch_size"]),
            *("--epochs", given["epochs"], "--seed", given["seed"], "--sharing", "off", "--output", padded),
        ]
        if main(["train", *map(str, options)]):
            raise RuntimeError("the run with --sharing off failed")
        for name, output in (("share", shared), ("off", padded)):
            results = json.loads((output / "metrics.json").read_text())
            keep = {"step", *SHOWN, *(f"eval_{metric}" for metric in SHOWN)}
            runs[name] = [{k: v for k, v in entry.items() if k in keep} for entry in results["history"]]
    return {**environment("python -m bench.pictures --measure", "cpu"), "runs": runs}


def draw_sharing(report: dict, path: Path) -> None:
    """Loss, margin and accuracy of the same training with prompts shared and without."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    styles: dict[str, dict] = {
        "share": {"color": "#4aa3c7", "linewidth": 5, "alpha": 0.55, "solid_capstyle": "round"},
        "off": {"color": "#16324a", "linewidth": 1.3},
    }
    for axis, (metric, title) in zip(axes, SHOWN.items(), strict=True):
        apart = 0.0
        for prefix, line, kind in (("", "-", "training"), ("eval_", "--", "held out")):
            curves = {name: points(history, prefix, metric) for name, history in report["runs"].items()}
            for name, curve in curves.items():
                axis.plot(*curve, line, label=f'sharing="{name}", {kind}', **styles[name])
            apart = max(apart, float(np.abs(curves["share"][1] - curves["off"][1]).max()))
        axis.set_title(f"{title}\n{f'largest difference {apart:.1e}' if apart else 'the same throughout'}", fontsize=11)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    axes[2].set_ylim(0, 1.03)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def points(history: list[dict], prefix: str, metric: str) -> np.ndarray:
    """Steps and values ``[2, n]``; not the accuracy of a model that equals its reference, which ties on every pair."""
    margin = prefix + "rewards/margins"
    entries = [e for e in history if margin in e and (e[margin] or not metric.endswith("accuracies"))]
    return np.array([(entry["step"], entry[prefix + metric]) for entry in entries]).T


if __name__ == "__main__":
    main()
