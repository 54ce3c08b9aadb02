"""The table of systems as a picture: bytes a token against perplexity, a panel a model and text, the front drawn."""

import math
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cachemoe.benchmarks.systems_run import front_of

LEAST, MOST = -1.0, 20.0  # per cent of perplexity that are drawn: what lies beyond is at the edge
LINEAR = 1.0  # per cent below which the axis is not logarithmic: most systems cost about that


def plot_systems(report: dict, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        OSError: if the file cannot be written.
    """
    runs = report["runs"]
    texts = len(dict.fromkeys(run["settings"]["text"] for run in runs))
    rows = -(-len(runs) // texts)
    figure, axes = plt.subplots(rows, texts, figsize=(6 * texts, 4.2 * rows + 1.2), squeeze=False, layout="constrained")
    # One mark for a system in all panels; its settings may differ from model to model.
    names = dict.fromkeys(row["strategy"].partition(":")[0] for run in runs for row in _rows(run))
    marks = dict(zip(names, zip(cycle(plt.get_cmap("tab10").colors), cycle("osD^vP*"), strict=False), strict=False))
    for axis, run in zip(axes.flat, runs, strict=False):
        _panel(axis, run, marks)
    for axis in list(axes.flat)[len(runs) :]:
        axis.set_axis_off()
    shown = [
        plt.Line2D([], [], color=colour, marker=mark, linestyle="", label=n) for n, (colour, mark) in marks.items()
    ]
    figure.legend(handles=shown, loc="outside lower center", ncols=3 * texts, fontsize=9, frameon=False)
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)


def _rows(run: dict) -> list[dict]:
    """Those whose quality was measured."""
    (capacity,) = run["capacities"]
    return [row for row in capacity["rows"] if "miss_rate" in row]


def _panel(axis, run: dict, marks: dict) -> None:
    rows, seen = _rows(run), set()
    front = front_of(rows)
    changes = {row["name"]: 100 * row["perplexity_change"] for row in rows}
    places = {
        row["name"]: (row["missed_bytes_per_token"] / 1e6, min(max(changes[row["name"]], LEAST), MOST))
        for row in rows
        if math.isfinite(row["perplexity_change"])
    }
    for name, (x, y) in places.items():
        system = name.partition(":")[0]
        colour, mark = marks[system]
        axis.plot(x, y, mark, color=colour, markersize=8, fillstyle="full" if name in front else "none")
        # Another setting of a system can be told by its name alone, and what is beyond the edge by its figure.
        if name in front or system in seen or y != changes[name]:
            told = name if y == changes[name] else f"{name} ({changes[name]:+.0f} %)"  # beyond what is drawn
            axis.annotate(told, (x, y), xytext=(6, 4), textcoords="offset points", fontsize=8, color=colour)
        seen.add(system)
    if front:
        axis.plot(*zip(*(places[name] for name in front), strict=True), "-", color="#999999", zorder=0)
    belady = run["capacities"][0]["belady_bytes_per_token"] / 1e6
    axis.axvline(belady, color="#999999", linestyle=":", linewidth=1)
    axis.annotate("Belady", (belady, MOST), rotation=90, va="top", ha="right", fontsize=8, color="#999999")
    axis.axhline(0, color="#dddddd", linewidth=1, zorder=0)
    axis.set_title(f"{run['model']['name']}, {run['settings']['text']}", fontsize=10)
    axis.set_xlabel("MB of missed pages a token")
    axis.set_ylabel("perplexity, % of the unmodified model's")
    axis.set_yscale("symlog", linthresh=LINEAR)
    axis.set_yticks([-1, 0, 1, 2, 5, 10, 20], ["-1", "0", "1", "2", "5", "10", "20"])
    axis.set_ylim(LEAST - 0.2, MOST * 1.15)
    axis.set_xlim(left=0)
