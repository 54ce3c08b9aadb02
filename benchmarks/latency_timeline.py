"""A few tokens of a timeline as a picture: a lane for each track, what ran in it by colour, milliseconds across."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cachemoe.offload.timeline import Span, Timeline

COLOURS = {
    "route": "#b07aa1",
    "compute": "#4e79a7",
    "stall": "#e15759",
    "page of a miss": "#f28e2b",
    "prefetch hit": "#59a14f",
    "prefetch": "#8cd17d",
    "wasted prefetch": "#bab0ac",
}
OTHER = "#9c755f"
FIRST = ("route", "compute", "stall")  # lanes on top
DPI = 130
INCHES = 9.0
LANE_PIXELS = 1000  # about what lanes have of the 1170 across
HEADER = -0.95  # where layers are numbered, above the first lane at 0


def plot_timeline(
    timeline: Timeline, path: Path, window: tuple[float, float] | None = None, title: str | None = None
) -> None:
    """Write the picture as PNG, 1170 pixels across.

    The lanes "route", "compute" and "stall" come first, then the others as they appear, numbered ones ("read 0",
    "read 1") together. A colour is the ``kind`` of a span that has one, else its track. A layer begins where a span of
    "route" that has a ``layer`` starts.

    Args:
        timeline: what ran; its marks are lines across all lanes.
        path: the PNG.
        window: (from, to) in seconds of ``time.perf_counter``; None for everything.
        title: above the picture.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if no span is in the window, or all take no time.
    """
    spans, marks = timeline.spans(), timeline.marks()
    if window is not None:
        spans = [span for span in spans if span.end > window[0] and span.start < window[1]]
    if not spans:
        raise ValueError("nothing to draw: no span is in the window")
    begun = [span.start for span in spans] + [mark.at for mark in marks]
    start, end = window or (min(begun), max(span.end for span in spans))
    if start == end:
        raise ValueError("nothing to draw: no time passes")
    lanes = _lanes(spans)
    height = 1.3 + 0.3 * len(lanes) + (0.3 if title else 0)
    figure, axis = plt.subplots(figsize=(INCHES, height), layout="constrained")
    axis.set_xlim(0, 1e3 * (end - start))
    _bars(axis, spans, lanes, start, LANE_PIXELS / (end - start))
    numbered = _layers(axis, spans, start)
    axis.set_ylim(len(lanes) - 0.4, HEADER - 0.35 if numbered else -0.6)  # the first lane on top
    for mark in marks:
        if start <= mark.at < end:
            at = 1e3 * (mark.at - start)
            axis.axvline(at, color="#444444", linewidth=0.9, zorder=3)
            place = {"xytext": (2, 2), "textcoords": "offset points", "annotation_clip": False}
            axis.annotate(mark.name, (at, 1), xycoords=("data", "axes fraction"), fontsize=8, color="#444444", **place)
    axis.set_yticks(range(len(lanes)), lanes)
    axis.tick_params(axis="y", length=0)
    axis.spines[["top", "right", "left"]].set_visible(False)
    dropped = f" (recording stopped at its limit: {timeline.dropped} later spans and marks are missing)"
    axis.set_xlabel("ms" + (dropped if timeline.dropped else ""))
    figure.legend(loc="outside lower center", ncols=len(COLOURS), frameon=False, fontsize=9, handlelength=1.2)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=DPI, format="png")
    plt.close(figure)


def _lanes(spans: list[Span]) -> list[str]:
    """Tracks from top to bottom: which reader thread is first to record one is chance, and must not show."""
    families: dict[str, set[str]] = {track: set() for track in FIRST}
    for span in spans:
        families.setdefault(span.track.rstrip("0123456789"), set()).add(span.track)
    return [track for family in families.values() for track in sorted(family, key=lambda t: (len(t), t))]


def _kind(span: Span) -> str:
    """What the span's colour and its entry in the legend say."""
    kind = span.details.get("kind")
    if kind == "demand":
        return "page of a miss"
    if kind == "prefetch":
        return {True: "prefetch hit", False: "wasted prefetch"}.get(span.details.get("used"), "prefetch")
    return kind or span.track


def _bars(axis, spans: list[Span], lanes: list[str], start: float, pixels_per_second: float) -> None:
    by_kind: dict[str, list[Span]] = {}
    for span in spans:
        by_kind.setdefault(_kind(span), []).append(span)
    kinds = [kind for kind in COLOURS if kind in by_kind] + [kind for kind in by_kind if kind not in COLOURS]
    for kind in kinds:
        colour, label = COLOURS.get(kind, OTHER), kind
        for lane, track in enumerate(lanes):
            mine = [span for span in by_kind[kind] if span.track == track]
            if not mine:
                continue
            ranges = [(1e3 * (span.start - start), 1e3 * (span.end - span.start)) for span in mine]
            # A white edge tells neighbours apart; a span too narrow for one has its own colour, or would not be seen.
            edges = ["white" if (s.end - s.start) * pixels_per_second > 4 else colour for s in mine]
            axis.broken_barh(
                ranges, (lane - 0.4, 0.8), facecolor=colour, edgecolor=edges, linewidth=0.5, label=label, zorder=2
            )
            label = None  # one entry in the legend
            if kind == "stall":
                across = axis.get_xaxis_transform()
                axis.broken_barh(ranges, (0, 1), transform=across, color=colour, alpha=0.09, linewidth=0, zorder=0)


def _layers(axis, spans: list[Span], start: float) -> bool:
    """Draw a thin line where each layer is routed, and its number, where there is room; whether numbers were drawn."""
    routed = sorted((s.start, s.details["layer"]) for s in spans if s.track == "route" and "layer" in s.details)
    if not 0 < len(routed) <= LANE_PIXELS / 6:
        return False
    numbered = len(routed) <= LANE_PIXELS / 14
    for at, layer in routed:
        axis.axvline(1e3 * (at - start), color="#cccccc", linewidth=0.6, zorder=1)
        if numbered:
            place = {"xytext": (2, 0), "textcoords": "offset points", "clip_on": True}
            axis.annotate(str(layer), (1e3 * (at - start), HEADER), fontsize=7, color="#888888", va="center", **place)
    if numbered:
        across = axis.get_yaxis_transform()
        axis.text(-0.006, HEADER, "layer", transform=across, ha="right", va="center", fontsize=7, color="#888888")
    return numbered
