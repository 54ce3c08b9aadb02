"""The timeline's picture: every kind in its colour, the size of a README, and only what is in the window."""

import heapq
import random

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from cachemoe.benchmarks.latency_timeline import COLOURS, _lanes, plot_timeline
from cachemoe.offload.timeline import Span, Timeline


def decode(tokens=3, layers=8, readers=4, seed=0, limit=10_000):
    """A timeline such as decoding gives: misses read by several readers, prefetches in what time they leave."""
    draw, timeline = random.Random(seed), Timeline(limit=limit)
    now = 100.0
    free_at = [(now, reader) for reader in range(readers)]

    def read(layer, **details):
        free, reader = heapq.heappop(free_at)
        begin = max(free, now) + 30e-6
        end = begin + draw.uniform(1.2e-3, 2.2e-3)
        heapq.heappush(free_at, (end, reader))
        timeline.span(f"read {reader}", "page", begin, end, layer=layer, bytes=4_460_544, **details)
        return end

    def run(track, seconds, layer):
        nonlocal now
        if seconds > 0:
            timeline.span(track, track, now, now + seconds, layer=layer)
            now += seconds

    for token in range(tokens):
        timeline.mark(f"token {token}", now)
        for layer in range(layers):
            now += draw.uniform(0.5e-3, 0.9e-3)
            run("route", 70e-6, layer)
            hits = draw.choice([1, 2, 2, 3, 4])
            landings = sorted(read(layer, kind="demand") for _ in range(4 - hits))
            if draw.random() < 0.6:
                read(layer + 1, kind="prefetch", used=draw.random() < 0.7)
            run("compute", hits * 450e-6, layer)
            for landed in landings:
                run("stall", landed - now, layer)
                run("compute", 450e-6, layer)
    return timeline


def colours_of(path):
    """The picture's colours, and its (height, width) in pixels."""
    image = plt.imread(path)[..., :3]
    return np.unique((255 * image).round().astype(int).reshape(-1, 3), axis=0).tolist(), image.shape[:2]


def shown(path):
    colours, _ = colours_of(path)
    return {kind for kind, colour in COLOURS.items() if [round(255 * c) for c in to_rgb(colour)] in colours}


def test_every_kind_is_shown_at_the_width_of_a_readme(tmp_path):
    timeline = decode()
    timeline.span("read 0", "page", 100.0, 100.001, kind="prefetch")
    plot_timeline(timeline, tmp_path / "timeline.png", title="Three tokens")
    assert shown(tmp_path / "timeline.png") == set(COLOURS)
    _, (_, width) = colours_of(tmp_path / "timeline.png")
    assert 1000 <= width <= 1200


def test_marks_layers_and_the_limit_are_in_the_picture(tmp_path, monkeypatch):
    texts = []
    monkeypatch.setattr(plt, "close", lambda figure: texts.extend(t.get_text() for t in figure.findobj(Text)))
    plot_timeline(decode(tokens=2, layers=3), tmp_path / "timeline.png", title="Two tokens")
    assert {"token 0", "token 1", "Two tokens", "layer", "0", "1", "2", "ms"} <= set(texts)
    texts.clear()
    plot_timeline(decode(layers=200), tmp_path / "timeline.png")
    assert "layer" not in texts
    texts.clear()
    plot_timeline(decode(limit=20), tmp_path / "timeline.png")
    assert any("are missing" in text for text in texts)


def test_lanes_do_not_depend_on_which_thread_recorded_first():
    tracks = ["read 10", "copy", "read 2", "compute", "read 0", "route"]
    spans = [Span(track, "x", 0.0, 1.0, {}) for track in tracks]
    assert _lanes(spans) == ["route", "compute", "read 0", "read 2", "read 10", "copy"]


def test_only_the_window_is_drawn(tmp_path):
    timeline = Timeline()
    timeline.span("route", "route", 1.0, 2.0, layer=0)
    timeline.span("compute", "experts", 2.0, 3.0)
    timeline.span("attention", "attention", 2.0, 3.0)
    plot_timeline(timeline, tmp_path / "timeline.png", window=(2.0, 2.5))
    assert shown(tmp_path / "timeline.png") == {"compute"}


@pytest.mark.parametrize("window", [None, (5.0, 6.0)])
def test_nothing_to_draw_is_an_error(tmp_path, window):
    timeline = Timeline()
    timeline.span("compute", "experts", 1.0, 1.0)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_timeline(timeline, tmp_path / "timeline.png", window)
