"""What a user waits for at the beginning: misses of the first tokens, and the time from a prompt to the first.

cachemoe first-token
cachemoe first-token CHECKPOINT --pool 50%
"""

from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from cachemoe.benchmarks.first_token_misses import first_misses
from cachemoe.benchmarks.first_token_times import first_token_times
from cachemoe.moe.checkpoint import STEEPMOE, TINYMOE
from cachemoe.moe.machine import describe
from cachemoe.moe.progress import Progress

TRAINED = STEEPMOE, TINYMOE


def run_first_token(
    checkpoint: Path | None,
    pool: str,
    format: str,
    dense: str | None,
    prompts: Sequence[int],
    rounds: int,
    windows: int,
    progress: Progress,
) -> dict:
    """Times of a checkpoint, if one is given, and misses of the trained models that are shipped.

    Args:
        checkpoint, pool, format, dense, prompts, rounds: see ``first_token_times``.
        windows: see ``first_misses``.

    Returns:
        ``times``, None without a checkpoint, and ``misses``, beside the machine.

    Raises:
        InputError: for a checkpoint or options that cannot be.
    """
    times = None
    if checkpoint is not None:  # first: it is what may be refused
        times = first_token_times(checkpoint, pool, format, dense, prompts, rounds, progress)
    return {
        "command": "first-token",
        "versions": {name: version(name) for name in ("xllamacpp", "gguf") if find_spec(name)},
        "machine": describe(),
        "times": times,
        "misses": first_misses(TRAINED, windows, progress),
    }
