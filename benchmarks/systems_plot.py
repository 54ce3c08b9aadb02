"""The table of systems as a picture: bytes a token against perplexity, a panel a model and text, the front drawn."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cachemoe.benchmarks.latency_plot import COLOURS
from cachemoe.benchmarks.systems_run import front_of

LEAST, MOST = -2.0, 12.0  # per cent of perplexity that are drawn: what lies beyond is at the edge, with its figure


def plot_systems(report: dict, path: Path) -> None:
    """Write the picture as PNG.

    Raises:
        OSError: if the file cannot be written.
    """
    runs = report["runs"]
    texts = len(dict.fromkeys(run["settings"]["text"] for run in runs))
    rows = -(-len(runs) // texts)
    figure, axes = plt.subplots(rows, texts, figsize=(6 * texts, 4.6 * rows), squeeze=False, layout="constrained")
    for axis, run in zip(axes.flat, runs, strict=False):
        _panel(axis, run)
    for axis in list(axes.flat)[len(runs) :]:
        axis.set_axis_off()
    figure.savefig(path, format="png", dpi=110)
    plt.close(figure)


def _panel(axis, run: dict) -> None:
    (capacity,) = run["capacities"]
    rows = [row for row in capacity["rows"] if "miss_rate" in row]
    places = {row["name"]: (row["missed_bytes_per_token"] / 1e6, 100 * row["perplexity_change"]) for row in rows}
    for name, (x, y) in places.items():
        colour = COLOURS.get(name.partition(":")[0], "#444444")
        shown = min(max(y, LEAST), MOST)
        axis.plot(x, shown, "o", color=colour, markersize=7, fillstyle="full" if shown == y else "none")
        label = name if shown == y else f"{name} ({y:+.0f} %)"
        axis.annotate(label, (x, shown), xytext=(4, 4), textcoords="offset points", fontsize=7, color=colour)
    front = [places[name] for name in front_of(rows)]
    axis.plot([x for x, _ in front], [min(max(y, LEAST), MOST) for _, y in front], "-", color="#999999", zorder=0)
    belady = capacity["belady_bytes_per_token"] / 1e6
    axis.axvline(belady, color="#999999", linestyle=":", linewidth=1)
    axis.annotate("Belady", (belady, MOST), rotation=90, va="top", ha="right", fontsize=7, color="#999999")
    axis.set_title(f"{run['model']['name']}, {run['settings']['text']}", fontsize=10)
    axis.set_xlabel("MB of missed pages a token")
    axis.set_ylabel("perplexity, % of the unmodified model's")
    axis.set_ylim(LEAST - 0.5, MOST + 1)
    axis.set_xlim(left=0)
