"""One run of ``cachemoe info --predict``, from options to the report."""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from cachemoe.kernels.formats import PageFormat
from cachemoe.kernels.rounded_cpu import KINDS
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.dense import dense_reads
from cachemoe.moe.layer_cost import layer_cost
from cachemoe.moe.lent_misses import lent_misses
from cachemoe.moe.machine import describe
from cachemoe.moe.models import outline
from cachemoe.moe.pack import store_directory
from cachemoe.moe.predict import Speeds, TokenSizes, token_seconds
from cachemoe.moe.progress import Progress
from cachemoe.moe.shape import MoeShape
from cachemoe.moe.sizes import layer_slots, slots_of
from cachemoe.moe.speeds import dense_reading, experts_reading, page_landing
from cachemoe.offload.errors import InputError

POOLS = ("25%", "50%", "100%")


@dataclass(frozen=True)
class Question:
    """What is to be told.

    Args:
        page_format: of the pages.
        dense: kind of rounding of all other matrices; None: as they are.
        pools: by how each was given, slots of each MoE layer.
        miss_rate: share of the selections that miss, 0 to 1; None: to be lent.
    """

    page_format: PageFormat
    dense: str | None
    pools: dict[str, list[int]]
    miss_rate: float | None


def question_of(
    checkpoint: Checkpoint, pools: Sequence[str] | None, format: str | None, dense: str | None, miss_rate: str | None
) -> Question:
    """The question that options ask.

    Args:
        pools, format, dense: as ``load`` takes them; of no pools those of ``POOLS`` that hold the experts of a token.
        miss_rate: such as ``14%``, of one pool.

    Raises:
        InputError: for what cannot be.
    """
    shape, page_format = checkpoint.shape, checkpoint.page_format(format)
    if dense is not None and dense not in KINDS:
        raise InputError(f"--dense is {' or '.join(KINDS)}, or left out, not {dense!r}")
    rate = None
    if miss_rate is not None:
        match = re.fullmatch(r"(\d{1,3}(?:\.\d{1,18})?)\s*%", miss_rate.strip())
        if match is None or float(match[1]) > 100:
            raise InputError(f"--miss-rate is the share of the selections that miss, such as 14%, not {miss_rate!r}")
        rate = float(match[1]) / 100
        if len(pools or POOLS) != 1:
            raise InputError("--miss-rate is of one pool: give one --pool with it")
    pools = pools or [pool for pool in POOLS if layer_slots(pool, shape.experts) >= shape.top_k]
    slots = {pool: slots_of(pool, shape, page_format.page_bytes) for pool in pools}
    return Question(page_format, dense, slots, rate)


def run_predict(checkpoint: Checkpoint, question: Question, progress: Progress) -> dict:
    """What a token of the checkpoint's model would take here on the CPU in each pool.

    Raises:
        InputError: if something cannot be measured, see ``layer_cost`` and ``page_landing``.
    """
    shape, page_format, dense = checkpoint.shape, question.page_format, question.dense
    model = outline(checkpoint)
    layers, k, page = len(shape.layers), shape.top_k, page_format.page_bytes
    sizes = TokenSizes(layers, k, page, page_format.weight_bytes, dense_reads(model, dense))
    curve = lent_misses(progress) if question.miss_rate is None else None
    most = max(map(sum, question.pools.values())) * page
    experts = experts_reading(page_format, k, most, model.dtype)
    others = {kind: dense_reading(kind, shape.hidden, size, layers) for kind, size in sizes.dense.items()}
    cost = layer_cost(checkpoint, page_format.kind, dense, model.dtype, [experts, *others.values()], progress)
    landing = page_landing(page_format, k, layers * shape.experts, store_directory(), progress)
    products = {kind: reading.speed(layers) for kind, reading in others.items()}
    speeds = Speeds(products, experts.speed(layers), landing, cost.token_s, cost.missing_s)
    return {
        "command": "info --predict",
        "machine": describe(),
        "model": {
            "name": checkpoint.path.resolve().name,
            "layers": layers,
            "experts": shape.experts,
            "k": k,
            "pages": page_format.kind,
            "dense": dense,
        },
        "sizes": asdict(sizes),
        "speeds": asdict(speeds),
        "lent": curve and {"model": curve.model, "text": curve.text, "tokens": curve.tokens},
        "rows": [
            _row(pool, slots, sizes, speeds, question.miss_rate if curve is None else curve.at(_share(slots, shape)))
            for pool, slots in question.pools.items()
        ],
    }


def _share(slots: list[int], shape: MoeShape) -> float:
    """Of all experts what the pool holds."""
    return sum(slots) / (len(slots) * shape.experts)


def _row(pool: str, slots: list[int], sizes: TokenSizes, speeds: Speeds, miss_rate: float) -> dict:
    seconds = token_seconds(sizes, speeds, miss_rate)
    return {
        "pool": pool,
        "slots": slots,
        "pool_bytes": sum(slots) * sizes.page_bytes,
        "miss_rate": miss_rate,
        "disk_bytes_per_token": sizes.disk_bytes(miss_rate),
        "memory_bytes_per_token": sizes.memory_bytes,
        "ms_per_token": 1e3 * seconds,
        "tokens_per_second": 1 / seconds,
    }
