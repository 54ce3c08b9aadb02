"""The growth of decode as a picture: milliseconds a step, a panel an axis, the bound a line; and batches' experts."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cachemoe.benchmarks.growth_points import ALL
from cachemoe.benchmarks.growth_tables import NAMES

MEASURED, BOUND = "#e15759", "#4e79a7"
COLUMNS = 3


def plot_growth(report: dict, path: Path) -> None:
    """Write the picture of a report as PNG.

    Raises:
        OSError: if the file cannot be written.
    """
    panels = [*report["axes"], *(["batches"] if report["batches"] else [])]
    rows, columns = -(-len(panels) // COLUMNS), min(COLUMNS, len(panels))
    size = (4.2 * columns, 3.4 * rows + 0.6)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, panels, strict=False):
        if name == "batches":
            _experts(axis, report["batches"])
        else:
            _growth(axis, name, report["axes"][name])
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    base, dense = report["base"], report["dense"] or "unrounded"
    figure.suptitle(
        f"Decode of {base['layers']} layers of {base['experts']} experts, {base['top_k']} used, {report['format']}, "
        f"dense {dense}: one thing changed in each panel",
        fontsize=11,
    )
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _growth(axis, name: str, rows: list[dict]) -> None:
    """Median, least and most of the rounds, and the bound."""
    rows = sorted(rows, key=lambda row: row["slots"] if name == "pool" else row["value"])
    if name == "pool":
        places = [100 * row["slots"] / row["experts"] for row in rows]
        labels = [f"{place:g} %" for place in places]
    else:
        places, labels = [row["value"] for row in rows], [str(row["value"]) for row in rows]
        axis.set_xscale("log", base=2)
    times = [row["ms_per_step"] for row in rows]
    spread = [[each["median"] - each["min"] for each in times], [each["max"] - each["median"] for each in times]]
    medians = [each["median"] for each in times]
    axis.errorbar(places, medians, spread, marker="o", markersize=4, capsize=3, color=MEASURED, label="measured")
    axis.plot(places, [row["bound_ms"] for row in rows], "--", color=BOUND, label="bound")
    axis.minorticks_off()
    axis.set_xticks(places, labels)
    axis.set_ylim(bottom=0)
    axis.set_xlabel(f"{NAMES[name]}{' in a step' if name == 'batch' else ''}")
    axis.set_ylabel("ms a step" if name == "batch" else "ms a token")
    axis.legend(frameon=False, fontsize=8)


def _experts(axis, batches: list[dict]) -> None:
    """Unique experts of each model, over the K that one token uses."""
    for counts in batches:
        rows = next(each["rows"] for each in counts["pools"] if each["pool"] == ALL)
        label = f"{counts['model']} ({counts['top_k']} of {counts['experts']})"
        sequences = [row["sequences"] for row in rows]
        axis.plot(
            sequences, [row["unique_experts"] / counts["top_k"] for row in rows], marker="o", markersize=4, label=label
        )
    axis.plot(sequences, sequences, ":", color="#888888", label="nothing shared")
    axis.set_xticks(sequences)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("sequences in a step")
    axis.set_ylabel("unique experts a layer, over K")
    axis.legend(frameon=False, fontsize=8)
