"""Misses of the first tokens that a trained model decodes, by what the pool has when they begin.

Every start decodes the same tokens after the same prompt, whose keys and values come from a model with everything in
memory where the prompt is not to touch the pool: the routing is the same, and only who is resident differs.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from cachemoe.benchmarks.first_token_start import (
    SAVED,
    TEXTS,
    decode,
    save_residency_after,
    saved_and_rest,
    start_over,
)
from cachemoe.kernels.route_cpu import place
from cachemoe.kernels.state import Residency
from cachemoe.moe.layers import recorded_routers
from cachemoe.moe.load import load
from cachemoe.moe.progress import Progress
from cachemoe.offload.residency import least_frequently_used, least_recently_used, resized
from cachemoe.offload.simulate import lru_misses

PROMPT, TOKENS = 128, 32  # of a window: tokens of the prompt, and those decoded after it
STRETCH = 1 << 16  # tokens of a text that windows are spread over
POOLS = "50%", "25%"
COLD, WARM, SAVED_SAME, SAVED_OTHER = "cold", "prompt-warm", "saved", "saved-other"  # by the engine
MOST_USED, LEAST = "most-used", "least"  # by simulation of LRU


@dataclass(frozen=True)
class Window:
    """A stretch of text, and what the whole model did with it.

    Args:
        prompt: ``[P]``. tokens: ``[T]``, those that follow.
        past: keys and values after the prompt.
        ids: ``[L, P + T, K]`` experts chosen. weights: ``[L, P + T, K]``, theirs.
    """

    prompt: torch.Tensor
    tokens: torch.Tensor
    past: object
    ids: torch.Tensor
    weights: torch.Tensor


def first_misses(folders: Sequence[Path], windows: int, progress: Progress) -> dict:
    """Misses of the first ``TOKENS`` tokens of each window, for each model, pool, text and start.

    Args:
        folders: byte-level checkpoints.
        windows: of each text, spread over it.

    Raises:
        InputError: for a checkpoint that cannot be, or one that is not byte-level.
    """
    rows = [row for folder in folders for row in _rows_of_model(folder, windows, progress)]
    return {"prompt_tokens": PROMPT, "tokens": TOKENS, "saved_tokens": SAVED, "windows": windows, "rows": rows}


def _rows_of_model(folder: Path, windows: int, progress: Progress) -> list[dict]:
    whole, _ = load(folder, pool="100%", device="cpu", progress=progress)
    with closing(whole.cachemoe), TemporaryDirectory() as directory:
        vocabulary = whole.cachemoe.shape.vocabulary
        parts = {text: saved_and_rest(text, vocabulary, STRETCH) for text in TEXTS}
        with progress(f"{folder.name}: routing of {windows} windows a text", windows * len(TEXTS)) as advance:
            read = {text: read_windows(whole, rest, windows, advance) for text, (_, rest) in parts.items()}
        rows = []
        for pool in POOLS:
            files = {}
            for number, (text, (saved, _)) in enumerate(parts.items()):
                files[text] = Path(directory) / f"{pool}-{number}.safetensors"
                save_residency_after(folder, saved, files[text], progress, pool=pool)
            rows += _rows_of_pool(folder, pool, files, read, progress)
    return rows


def _rows_of_pool(
    folder: Path, pool: str, files: dict[str, Path], read: dict[str, list[Window]], progress: Progress
) -> list[dict]:
    """A row for each text and start."""
    rows = []
    with ExitStack() as stack:

        def loaded(**options):
            model, _ = load(folder, pool=pool, device="cpu", progress=progress, **options)
            stack.callback(model.cachemoe.close)
            return model, model.cachemoe.engine.state.clone()

        cold, saved = loaded(), {text: loaded(residency=file) for text, file in files.items()}
        capacity, shape = cold[1].capacity, cold[0].cachemoe.shape
        count = len(files) * 4 * len(next(iter(read.values())))
        with progress(f"{folder.name}: decoding, pool {pool}", count) as advance:
            for text, windows in read.items():
                (other,) = (name for name in files if name != text)
                runs = {
                    COLD: (*cold, False),
                    WARM: (*cold, True),
                    SAVED_SAME: (*saved[text], False),
                    SAVED_OTHER: (*saved[other], False),
                }
                misses = {
                    name: [misses_from(*run, window, advance) for window in windows] for name, run in runs.items()
                }
                misses[MOST_USED] = [
                    misses_where_kept(each, capacity, shape.experts, least_frequently_used) for each in windows
                ]
                misses[LEAST] = [least_misses(each, capacity, shape.experts) for each in windows]
                rows += [_row(folder, pool, cold[0].cachemoe, text, *each) for each in misses.items()]
    return rows


def _row(folder: Path, pool: str, pooled, text: str, start: str, misses: list[int]) -> dict:
    selections = len(pooled.shape.layers) * pooled.shape.top_k
    each = [count / TOKENS for count in misses]
    spread = {"mean": statistics.mean(each), "min": min(each), "max": max(each)}
    return {
        "model": folder.resolve().name,
        "pool": pool,
        "slots": [count.slots for count in pooled.layers],
        "experts": pooled.shape.experts,
        "selections_per_token": selections,
        "text": text,
        "start": start,
        "simulated": start in (MOST_USED, LEAST),
        "misses_per_token": spread,
        "miss_rate": {name: value / selections for name, value in spread.items()},
        "misses": misses,
    }


@torch.inference_mode()
def read_windows(whole, text: torch.Tensor, count: int, advance: Callable[[], None]) -> list[Window]:
    """Windows spread evenly over a text ``[N]``, each read by a model that has everything in memory."""
    size, windows = PROMPT + TOKENS, []
    for number in range(count):
        start = (number + 1) * (len(text) - size) // count  # none next to the text that residency was saved after
        prompt, tokens = text[start : start + size].split([PROMPT, TOKENS])
        with recorded_routers(whole) as answers:
            past = whole(prompt[None], use_cache=True).past_key_values
            before = deepcopy(past)
            decode(whole, tokens, past)
        ids, weights = (
            torch.stack([torch.cat([getattr(each, name) for each in layer]) for layer in answers])
            for name in ("ids", "weights")
        )
        windows.append(Window(prompt, tokens, before, ids, weights))
        advance()
    return windows


def misses_from(model, state: Residency, through_pool: bool, window: Window, advance: Callable[[], None]) -> int:
    """What the engine misses of the window's tokens.

    Args:
        state: who is resident at first.
        through_pool: whether the prompt is read by this model, in one call, and not by the whole one.
    """
    start_over(model, state)
    past = deepcopy(window.past)
    if through_pool:
        with torch.inference_mode():
            past = model(window.prompt[None], use_cache=True).past_key_values
        model.cachemoe.reset_counters()
    decode(model, window.tokens, past)
    advance()
    return model.cachemoe.counters.misses


def misses_where_kept(window: Window, capacity: torch.Tensor, experts: int, keep: Callable) -> int:
    """Misses of the window's tokens under LRU, where the prompt's experts stay that an eviction policy would keep.

    By ``least_recently_used`` these are the ones that the engine's prompt leaves; by ``least_frequently_used`` the ones
    that the prompt used most.

    Args:
        capacity: ``[L]`` int64, slots of each layer.
        experts: E, of a layer.
        keep: eviction policy; the experts with the largest keys stay.
    """
    state = Residency.empty(torch.full_like(capacity, experts), experts)
    _step(window.ids[:, :PROMPT], window.weights[:, :PROMPT], state)
    state = resized(state, capacity, (), keep)
    return _step(window.ids[:, PROMPT:], window.weights[:, PROMPT:], state)


def _step(ids: torch.Tensor, weights: torch.Tensor, state: Residency) -> int:
    """Misses under LRU of tokens whose experts ``[L, T, K]`` are known; ``state`` ``[L, ...]`` is updated."""
    return sum(
        int(place(ids[layer, None], weights[layer, None], state[layer : layer + 1], least_recently_used).misses.count)
        for layer in range(len(ids))
    )


def least_misses(window: Window, capacity: torch.Tensor, experts: int) -> int:
    """The fewest misses of the window's tokens under LRU, whoever is resident at first.

    A pool that begins with the first experts that the tokens use, as many as it has slots, misses nothing until an
    empty pool would be full, and from then on what that misses: both then hold the same. No other saves more.

    Args:
        capacity: ``[L]`` int64, slots of each layer.
        experts: E, of a layer.
    """
    least = 0
    for ids, slots in zip(window.ids[:, PROMPT:], capacity.tolist(), strict=True):
        least += int(lru_misses(ids, experts)[slots]) - min(slots, len(ids.unique()))
    return least
