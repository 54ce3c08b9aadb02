"""Measure that a trained model is worth measuring on: its quality, what its router knows, how hard it is to cache.

    python report.py --folder ../../steepmoe --wikitext wikitext2-valid.txt     # writes report.json into the folder

Everything is measured on text the model was not trained on. Random choices have fixed seeds.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cachemoe.kernels.state import Residency, Routing
from cachemoe.moe.checkpoint import Checkpoint
from cachemoe.moe.layers import moe_layers, routing_rules
from cachemoe.moe.machine import describe
from cachemoe.moe.models import load_model
from cachemoe.moe.quality import NATS_PER_BIT, Setting, evaluate
from cachemoe.moe.routers import choose
from cachemoe.moe.strategies import Strategy, kept
from cachemoe.moe.swap import Swap
from cachemoe.moe.text import HELD_OUT, held_out_text, load_tokens
from cachemoe.offload.residency import least_recently_used
from cachemoe.offload.simulate import belady_misses

CONTEXT, TOKENS, STEPPED, BATCH = 512, 65536, 16384, 16
CAPACITIES = (0.25, 0.5, 0.75)
LAMBDA = 0.5  # of cache-prior


@torch.inference_mode()
def bits_per_byte(model, windows: torch.Tensor) -> float:
    """Mean over the predicted bytes of ``[windows, context]``."""
    nats = 0.0
    for batch in windows.split(BATCH):
        log_p = model(batch).logits[:, :-1].log_softmax(-1)
        nats -= float(log_p.gather(-1, batch[:, 1:, None]).double().sum())
    return nats / windows[:, 1:].numel() / NATS_PER_BIT


class Altered:
    """The model's own routing with ids altered; records what it saw."""

    def __init__(self, shape, rules, alter):
        self.shape, self.rules, self.alter = shape, rules, alter
        self.ids, self.weights = [[] for _ in shape.layers], [[] for _ in shape.layers]

    def __call__(self, layer: int, logits: torch.Tensor, hidden: torch.Tensor) -> Routing:
        everything = Residency.empty(torch.tensor([self.shape.experts]), self.shape.experts)
        routing = choose(self.rules[layer], logits[None], everything, least_recently_used, self.shape.top_k)
        self.ids[layer].append(routing.ids[0])
        self.weights[layer].append(routing.weights[0])
        return replace(routing, ids=self.alter(routing.ids))


def random_ids(generator: torch.Generator, experts: int, ids: torch.Tensor) -> torch.Tensor:
    """K distinct experts at random."""
    return torch.rand(*ids.shape[:-1], experts, generator=generator).argsort(-1)[..., : ids.shape[-1]]


def replace_rank(generator: torch.Generator, experts: int, rank: int, ids: torch.Tensor) -> torch.Tensor:
    """The expert of one rank, and its gate weight, given to an expert that was not selected."""
    draw = torch.rand(*ids.shape[:-1], experts, generator=generator).scatter(-1, ids, -1.0)
    ids = ids.clone()
    ids[..., rank] = draw.argmax(-1)
    return ids


def cache_prior_costs(model, shape, windows: torch.Tensor) -> dict[str, float]:
    """Of cache-prior at half of the experts."""
    strategy = Strategy("cache-prior", LAMBDA)
    capacity = shape.experts // 2
    found = evaluate(model, shape, windows, [Setting(strategy, capacity)], least_recently_used)
    (quality,) = found.settings
    settings = {
        "lambda": LAMBDA,
        "top_j": kept(strategy.top_j, shape.top_k),
        "capacity": capacity,
        "bytes": windows.numel(),
    }
    return settings | {
        "perplexity_change": quality.perplexity_change(found.unmodified),
        "kl_nats": quality.kl / quality.tokens,
        "miss_rate": quality.miss_rate,
        "experts_swapped": quality.changes.swaps / quality.changes.selections,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, required=True, help="the model's, as train.py exports it")
    parser.add_argument("--wikitext", type=Path, help="WikiText-2 validation text, a second, out-of-domain measurement")
    arguments = parser.parse_args()

    checkpoint, model = Checkpoint(arguments.folder), load_model(arguments.folder)
    shape = checkpoint.shape
    rules = routing_rules(moe_layers(model), shape.top_k, "cpu")
    windows = load_tokens(None, shape.vocabulary, TOKENS).view(-1, CONTEXT)
    everything = load_tokens(None, shape.vocabulary, len(held_out_text()) // CONTEXT * CONTEXT).view(-1, CONTEXT)

    own = Altered(shape, rules, lambda ids: ids)
    with Swap(model, own):
        base = bits_per_byte(model, windows)
    costs = {}
    alterations = {"random routing": random_ids} | {
        f"rank {rank + 1} replaced": lambda generator, experts, ids, rank=rank: replace_rank(
            generator, experts, rank, ids
        )
        for rank in range(shape.top_k)
    }
    for name, alter in track(alterations.items(), "altering the routing"):
        generator = torch.Generator().manual_seed(0)
        with Swap(model, Altered(shape, rules, lambda ids, f=alter, g=generator: f(g, shape.experts, ids))):
            costs[name] = bits_per_byte(model, windows) - base

    ids = torch.stack([torch.cat(layer) for layer in own.ids])
    weights = torch.stack([torch.cat(layer) for layer in own.weights])
    share = torch.stack([layer.flatten().bincount(minlength=shape.experts) / layer.numel() for layer in ids])

    capacities = [round(fraction * shape.experts) for fraction in CAPACITIES]
    settings = [Setting(Strategy("original"), capacity) for capacity in capacities]
    stepped = evaluate(model, shape, windows[: STEPPED // CONTEXT], settings, least_recently_used)
    belady = [sum(belady_misses(layer, c) for layer in stepped.original_ids) for c in capacities]
    report = {
        "machine": describe(),
        "model": {
            "parameters": sum(p.numel() for p in model.parameters()),
            "bytes": (arguments.folder / "model.safetensors").stat().st_size,
            "layers": len(shape.layers),
            "experts": shape.experts,
            "k": shape.top_k,
            "hidden": shape.hidden,
            "intermediate": shape.intermediate,
            "renormalised_gates": rules[0].scores.renormalise,
        },
        "held_out": {
            "text": HELD_OUT,
            "context": CONTEXT,
            "whole_text_bytes": everything.numel(),
            "whole_text_bits_per_byte": bits_per_byte(model, everything),
            "first_bytes": TOKENS,
            "first_bytes_bits_per_byte": base,
        },
        "bits_per_byte_lost": costs,
        "gate_weight_by_rank": weights.mean((0, 1)).tolist(),
        "gate_weight_deviation_by_rank": weights.flatten(0, 1).std(0).tolist(),
        "gate_weight_by_rank_and_layer": weights.mean(1).tolist(),
        "expert_share": {
            "even": 1 / shape.experts,
            "least": float(share.min()),
            "most": float(share.max()),
            "least_by_layer": share.amin(1).tolist(),
            "unused": int((share == 0).sum()),
        },
        "original_routing_misses": [
            {"capacity": c, "lru": q.miss_rate, "belady": b / stepped.original_ids.numel()}
            for c, q, b in zip(capacities, stepped.settings, belady, strict=True)
        ],
        "cache_prior": cache_prior_costs(model, shape, windows[: STEPPED // CONTEXT]),
    }
    if arguments.wikitext:
        tokens = load_tokens(arguments.wikitext, shape.vocabulary, 4 * TOKENS).view(-1, CONTEXT)
        report["wikitext2_validation"] = {
            "bytes": tokens.numel(),
            "bits_per_byte": bits_per_byte(model, tokens),
            "cache_prior": cache_prior_costs(model, shape, tokens[: STEPPED // CONTEXT]),
        }
    (arguments.folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")

    table = Table("measured", "value", title=arguments.folder.resolve().name)
    table.add_row("bits a byte, held-out prose", f"{report['held_out']['whole_text_bits_per_byte']:.3f}")
    if arguments.wikitext:
        table.add_row("bits a byte, WikiText-2", f"{report['wikitext2_validation']['bits_per_byte']:.3f}")
    for name, cost in costs.items():
        table.add_row(f"{name}, bits a byte lost", f"{cost:+.3f}")
    table.add_row("gate weight by rank", " ".join(f"{w:.2f}" for w in report["gate_weight_by_rank"]))
    table.add_row("least used expert, of an even share", f"{float(share.min()) * shape.experts:.2f}")
    for row in report["original_routing_misses"]:
        table.add_row(f"misses with {row['capacity']} slots: LRU, Belady", f"{row['lru']:.1%}, {row['belady']:.1%}")
    texts = {"held-out prose": report, "WikiText-2": report.get("wikitext2_validation")}
    for name, cost in ((name, found["cache_prior"]) for name, found in texts.items() if found):
        told = f"{cost['perplexity_change']:+.2%}, {cost['miss_rate']:.1%}"
        table.add_row(f"cache-prior {LAMBDA} with {cost['capacity']} slots, {name}: perplexity, misses", told)
    Console().print(table)


if __name__ == "__main__":
    main()
