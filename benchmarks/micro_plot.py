"""The microbenchmarks as a picture: percent of the bound by geometry, a bar an implementation."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cachemoe.benchmarks.geometries import GEOMETRIES


def drawable(report: dict) -> list[dict]:
    """The rows that have a bound; trials of tiles are for tables."""
    return [row for row in report["rows"] if row["bound_seconds"] is not None and row["kernel"] != "tiles"]


def plot_micro(report: dict, path: Path) -> None:
    """Write what is drawable as PNG, a panel for each kernel, number of tokens and variant.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if nothing is drawable.
    """
    panels: dict[tuple, list[dict]] = {}
    for row in drawable(report):
        panels.setdefault((row["kernel"], row["tokens"], row["variant"]), []).append(row)
    if not panels:
        raise ValueError("nothing to draw: no row but trials of tiles has a bound")
    measured = (row["implementation"] for rows in panels.values() for row in rows)
    implementations = list(dict.fromkeys(["cachemoe", *measured]))
    colours = dict(zip(implementations, plt.get_cmap("tab20").colors, strict=False))
    figure, axes = plt.subplots(len(panels), 1, figsize=(11, 3.2 * len(panels)), squeeze=False, layout="constrained")
    for axis, (key, rows) in zip(axes[:, 0], panels.items(), strict=True):
        _panel(axis, key, rows, colours)
    machine = report["machine"]
    figure.suptitle(
        f"Percent of the measured bound: {machine['gpu']['name'] if machine['gpu'] else machine['processor']}"
    )
    figure.savefig(path, dpi=130, format="png")
    plt.close(figure)


def _panel(axis, key: tuple, rows: list[dict], colours: dict) -> None:
    kernel, tokens, variant = key
    geometries = list(dict.fromkeys(row["geometry"] for row in rows))
    implementations = [name for name in colours if any(row["implementation"] == name for row in rows)]
    width = 0.8 / len(implementations)
    for place, name in enumerate(implementations):
        mine = [row for row in rows if row["implementation"] == name]
        left = [geometries.index(row["geometry"]) - 0.4 + (place + 0.5) * width for row in mine]
        heights = [row["percent_of_bound"] for row in mine]
        # Longer times are lower percentages: the greatest time gives the lower end.
        low = [h - 100 * row["bound_seconds"] / row["seconds"]["max"] for h, row in zip(heights, mine, strict=True)]
        high = [100 * row["bound_seconds"] / row["seconds"]["min"] - h for h, row in zip(heights, mine, strict=True)]
        bars = axis.bar(left, heights, width, yerr=(low, high), label=name, color=colours[name], ecolor="#555555")
        axis.bar_label(bars, fmt="%.0f", padding=2, fontsize=7)
    axis.set_xticks(range(len(geometries)), [GEOMETRIES[name].title for name in geometries], fontsize=8)
    axis.axhline(100, color="#888888", linestyle=":")
    axis.set_ylabel("% of the bound")
    axis.set_title(f"{kernel}, {variant}, T = {tokens}", loc="left")
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False, fontsize=8)
