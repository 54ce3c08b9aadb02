"""Waves: in which order a call of many tokens fetches and computes its experts, given fewer slots than experts."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Wave:
    """(expert, slot) of experts computed together: ``resident`` have their page, ``loads`` are fetched meanwhile."""

    resident: list[tuple[int, int]]
    loads: list[tuple[int, int]]


def plan_waves(held: Sequence[int], needed: Sequence[int], final: set[int]) -> list[Wave]:
    """Order a call of many tokens so that each needed expert is computed once and ``final`` is what stays.

    Args:
        held: the expert in each slot, -1 for none.
        needed: distinct experts of the call, in order of first use.
        final: experts resident after the call, at most as many as slots; those not held are among ``needed``.

    Raises:
        ValueError: if ``final`` does not fit.

    Returns:
        Waves, to be run one after another. A wave's loads never overwrite a page that the wave computes with. An expert
        is loaded at most once, but for one that must give up its slot where every slot holds an expert that stays.
    """
    here = [(e, slot) for slot, e in enumerate(held) if e in needed]
    passing = [e for e in needed if e not in held and e not in final]
    staying = [e for e in needed if e not in held and e in final]
    free = [slot for slot, e in enumerate(held) if e not in final and e not in needed]
    free_after_first = [slot for slot, e in enumerate(held) if e not in final and e in needed]
    if passing and not free and not free_after_first:
        free_after_first, staying = [len(held) - 1], [*staying, held[-1]]

    waves: list[Wave] = []
    todo = [*passing, *staying]
    while todo or not waves:
        if todo and not free and waves:
            raise ValueError(f"{len(held)} slots that hold {list(held)} cannot end with {sorted(final)}")
        loads = list(zip(todo, free, strict=False))
        todo = todo[len(loads) :]
        kept = {slot for e, slot in loads if e in final}
        free = [slot for slot in free if slot not in kept] + (free_after_first if not waves else [])
        waves.append(Wave(here if not waves else [], loads))
    return waves
