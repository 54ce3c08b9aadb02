"""The latency report as a picture: misses against quality above, milliseconds a token below, a column a capacity."""

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cachemoe.benchmarks.latency_decode import FREE_MISSES, ORIGINAL, RESIDENT

COLOURS = {
    str(ORIGINAL): "#444444",
    "pruning": "#b07aa1",
    "max-rank": "#4e79a7",
    "cumsum": "#59a14f",
    "cache-prior": "#e15759",
    "latency-ratio": "#f28e2b",
    "naee-skip": "#76b7b2",
    "naee-prune": "#2f7f79",
    "adap-skip": "#edc948",
    "relu-route": "#9c755f",
    "relu-literal": "#d7b5a6",
    "pregated-hint": "#8cd17d",
    "pregated-exec": "#499894",
    "hobbit": "#d37295",
    "edgemoe": "#a0cbe8",
    "moec-substitute": "#ff9d9a",
    "smola-lowrank": "#86bcb6",
    "readme-lookahead": "#b6992d",
    "random-cheap": "#d4cfc9",
    "random-drop": "#bab0ac",
    "random-swap": "#79706e",
}
# Where a label goes, from its point: settings of different families often coincide.
LABELS = {
    "max-rank": {"xytext": (5, 4), "ha": "left", "va": "bottom"},
    "cumsum": {"xytext": (-5, -4), "ha": "right", "va": "top"},
    "cache-prior": {"xytext": (-5, 4), "ha": "right", "va": "bottom"},
}
BELOW_RIGHT = {"xytext": (5, -4), "ha": "left", "va": "top"}


def plot_report(report: dict, path: Path) -> None:
    """Write the picture of a report as PNG.

    Raises:
        OSError: if the file cannot be written.
    """
    capacities = report["capacities"]
    figure, axes = plt.subplots(
        2,
        len(capacities),
        figsize=(5.2 * len(capacities), 9),
        squeeze=False,
        layout="constrained",
        sharex="row",
        sharey="row",
    )
    for (above, below), capacity in zip(axes.T, capacities, strict=True):
        _pareto(above, capacity, report["settings"]["eviction"].upper())
        _bars(below, capacity)
    axes[0, 0].set_ylabel("perplexity against the unmodified model, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2 * len(capacities), frameon=False)
    figure.suptitle(
        f"{report['model']['name']} routing {report['settings']['payload']} pages:\n"
        "what fewer misses cost in quality, and save in time"
    )
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _family(row: dict) -> str:
    return row["name"].partition(":")[0]


def _colour(family: str) -> str:
    return COLOURS.get(family, "#9c755f")


def _pareto(axis, capacity: dict, eviction: str) -> None:
    families: dict[str, list[dict]] = {}
    for row in capacity["rows"]:
        if "miss_rate" in row and math.isfinite(row["perplexity_change"]):
            families.setdefault(_family(row), []).append(row)
    for family, members in families.items():
        members.sort(key=lambda row: row["miss_rate"])
        points = [(100 * row["miss_rate"], 100 * row["perplexity_change"]) for row in members]
        label = f"{family} + {eviction}" if family == str(ORIGINAL) else family
        axis.plot(*zip(*points, strict=True), marker="o", color=_colour(family), label=label)
        values: dict[tuple, list[str]] = {}  # of each point: settings that come to the same share a label
        for row, point in zip(members, points, strict=True):
            values.setdefault((round(point[0]), round(point[1], 1)), []).append(row["name"].partition(":")[2])
        style = {"textcoords": "offset points", "fontsize": 8, "color": _colour(family)}
        for point, labels in values.items():
            axis.annotate(", ".join(labels), point, **LABELS.get(family, BELOW_RIGHT), **style)
    axis.axvline(100 * capacity["belady_miss_rate"], color="#888888", linestyle=":", label="Belady, original routing")
    axis.axhline(0, color="#cccccc", linewidth=0.8)
    axis.set_xlim(left=0)
    axis.set_xlabel("selections that miss, %")
    axis.set_title(f"{capacity['capacity_fraction']:.0%} of the experts resident")


def _bars(axis, capacity: dict) -> None:
    rows = list(reversed(capacity["rows"]))
    values = [row["ms_per_token"]["p50"] for row in rows]
    references = (RESIDENT, FREE_MISSES)
    colours = ["#bbbbbb" if row["name"] in references else _colour(_family(row)) for row in rows]
    bars = axis.barh([row["name"] for row in rows], values, color=colours)
    axis.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axis.set_xlabel("ms a token (median)")
    axis.margins(x=0.12)
