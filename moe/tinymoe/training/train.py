"""Train tinymoe, steepmoe or coarsemoe (``MODELS``), byte-level, on a CPU.

    python train.py --model tinymoe --corpus /tmp/tinymoe/corpus.bin --run /tmp/tinymoe/run --minutes 65
    python train.py --model tinymoe --run /tmp/tinymoe/run --export ..   # the final bfloat16 folder

The first command, given again, continues an interrupted run from its last checkpoint. One single-threaded process a
core shares each batch: on small matrices that beats one process with many threads by a wide margin. The learning
rate follows the time spent (warm-up, constant, linear decay), so a run ends decayed however busy the machine was.
"""

import argparse
import csv
import math
import os
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedConfig, PreTrainedModel, Qwen2MoeConfig
from transformers.integrations.moe import ExpertsInterface

SEED = 20
CONTEXT = 512  # bytes a sequence; before the decay, each is cut in two
REVIVAL, Z_LOSS = 0.05, 0.001  # each a layer
MUON_RATE, ADAM_RATE, WEIGHT_DECAY = 0.02, 0.003, 0.01
WARM_UP_STEPS, DECAY_SHARE = 100, 0.4
LOG_STEPS, EVALUATE_STEPS, CHECKPOINT_SECONDS = 20, 200, 300
HELD_OUT_BYTES = 1 << 16


@dataclass(frozen=True)
class Recipe:
    """A model, and what is asked of its gates.

    Args:
        config: its architecture and sizes, and how much the balance loss of a layer counts.
        gates: weights by rank, ``[K]``, that each token's are pulled towards; they add up to one.
        pull: how hard, a layer; it fades with the learning rate.
        batch: sequences a step.
    """

    config: PreTrainedConfig
    gates: tuple[float, ...]
    pull: float
    batch: int


COMMON = {
    "vocab_size": 256,
    "hidden_size": 160,
    "num_hidden_layers": 8,
    "num_attention_heads": 5,
    "num_key_value_heads": 5,
    "max_position_embeddings": 2048,
    "initializer_range": 0.04,
    "tie_word_embeddings": False,
    "use_cache": True,
}
FINE = COMMON | {
    "intermediate_size": 160,  # no dense layer uses it
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 128,
    "num_experts": 60,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
}
COARSE = COMMON | {
    "intermediate_size": 128,  # a token uses as many weights as of FINE's four experts and the shared one
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "bos_token_id": None,
    "eos_token_id": None,
}
MODELS = {  # Qwen2-MoE is the architecture of Qwen1.5-MoE-A2.7B
    "tinymoe": Recipe(Qwen2MoeConfig(**FINE, router_aux_loss_coef=0.01), (0.25, 0.25, 0.25, 0.25), 0.1, 16),
    "steepmoe": Recipe(Qwen2MoeConfig(**FINE, router_aux_loss_coef=0.002), (0.40, 0.26, 0.19, 0.15), 0.05, 8),
    "coarsemoe": Recipe(MixtralConfig(**COARSE, router_aux_loss_coef=0.01), (0.68, 0.32), 0.05, 8),
}


def untrained(recipe: Recipe) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(recipe.config, dtype=torch.float32)


@torch.compile(dynamic=False)
def swiglu(hidden: Tensor, scale: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return F.silu(gate) * up * scale


@torch.compile(dynamic=False)
def swiglu_backward(hidden: Tensor, scale: Tensor, grad_act: Tensor) -> tuple[Tensor, Tensor]:
    gate, up = hidden.chunk(2, dim=-1)
    sigmoid = gate.sigmoid()
    silu = gate * sigmoid
    grad_scale = (grad_act * silu * up).sum(-1)
    grad_act = grad_act * scale
    return torch.cat([grad_act * up * (sigmoid + silu * (1 - sigmoid)), grad_act * silu], dim=-1), grad_scale


class SortedExperts(torch.autograd.Function):
    """All experts of a layer: rows sorted by expert, so that each expert is one dense product on a slice."""

    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, weight: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        order = index.flatten().argsort(stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order))
        counts = index.flatten().bincount(minlength=len(gate_up)).tolist()
        top_k = index.shape[1]
        rows, scale = x.index_select(0, order // top_k), weight.flatten()[order, None]
        hidden, out = rows.new_empty(len(rows), gate_up.shape[1]), torch.empty_like(rows)
        for h, r, w in zip(hidden.split(counts), rows.split(counts), gate_up, strict=True):
            torch.mm(r, w.T, out=h)
        act = swiglu(hidden, scale)
        for o, a, w in zip(out.split(counts), act.split(counts), down, strict=True):
            torch.mm(a, w.T, out=o)
        ctx.save_for_backward(rows, hidden, act, scale, order, place, gate_up, down)
        ctx.counts, ctx.top_k = counts, top_k
        return out.index_select(0, place).view(len(x), top_k, -1).sum(1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, act, scale, order, place, gate_up, down = ctx.saved_tensors
        counts, top_k = ctx.counts, ctx.top_k
        grad_out = grad.index_select(0, order // top_k)
        grad_act, grad_down = torch.empty_like(act), torch.empty_like(down)
        for o, a, ga, w, gw in zip(
            grad_out.split(counts), act.split(counts), grad_act.split(counts), down, grad_down, strict=True
        ):
            torch.mm(o, w, out=ga)
            torch.mm(o.T, a, out=gw)
        grad_hidden, grad_scale = swiglu_backward(hidden, scale, grad_act)
        grad_weight = grad_scale[place].view(-1, top_k)
        grad_rows, grad_gate_up = torch.empty_like(rows), torch.empty_like(gate_up)
        for h, r, gr, w, gw in zip(
            grad_hidden.split(counts), rows.split(counts), grad_rows.split(counts), gate_up, grad_gate_up, strict=True
        ):
            torch.mm(h, w, out=gr)
            torch.mm(h.T, r, out=gw)
        grad_x = grad_rows.index_select(0, place).view(-1, top_k, rows.shape[1]).sum(1)
        return grad_x, None, grad_weight, grad_gate_up, grad_down


def sorted_experts(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    return SortedExperts.apply(hidden_states, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj)


ExpertsInterface.register("sorted", sorted_experts)


class Router:
    """Keeps what a layer's gate last computed, for the losses that keep its experts in use and shape its weights."""

    def __init__(self, gate: nn.Module, recipe: Recipe):
        self.gates, self.pull = torch.tensor(recipe.gates), recipe.pull
        self.balance = recipe.config.router_aux_loss_coef
        gate.register_forward_hook(self.keep)

    def keep(self, _module: nn.Module, _inputs: tuple, outputs: tuple[Tensor, ...]) -> None:
        self.logits, self.weight, self.index = outputs

    def losses(self, fade: float) -> tuple[Tensor, Tensor]:
        """Switch Transformer's balance loss of this layer (1 when even), and the sum of all terms as they are weighed.

        The balance loss hardly moves an expert of small probability, so revival pushes up those below half their even
        share. The shape, of a token's weights by rank, keeps those of its later experts up: towards the recipe's, which
        for an even recipe is the sum of their squares less a constant. The z-loss keeps the logits small.
        """
        experts, probability = self.logits.shape[1], self.logits.softmax(-1).mean(0)
        share = self.index.flatten().bincount(minlength=experts) / self.index.numel()
        balance = experts * (share * probability).sum()
        revival = -(F.relu(1 - 2 * experts * share) * (experts * probability).log()).mean()
        shape = (self.weight - self.gates).square().sum(-1).mean()
        z = self.logits.logsumexp(-1).square().mean()
        return balance, self.balance * balance + REVIVAL * revival + self.pull * fade * shape + Z_LOSS * z


def orthogonal(matrix: Tensor) -> Tensor:
    """Muon's Newton-Schulz iteration: the nearest (semi-)orthogonal matrix, roughly; batched over leading sizes."""
    wide = matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix
    x = wide / (wide.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrix.shape[-2] > matrix.shape[-1] else x


class Muon:
    """Momentum made orthogonal (Jordan et al., 2024), every expert's matrices on their own, shared by the processes."""

    def __init__(self, named: dict[str, Tensor]):
        self.named, self.momentum = named, [torch.zeros_like(p) for p in named.values()]

    @torch.no_grad()
    def step(self, rate: float, gradient: Tensor) -> None:
        for i, ((name, p), m) in enumerate(zip(self.named.items(), self.momentum, strict=True)):
            m.lerp_(p.grad, 0.05)
            if i % dist.get_world_size() != dist.get_rank():
                p.grad.zero_()
                continue
            update = p.grad.lerp(m, 0.95)
            if "gate_up" in name:  # two matrices, stored as one
                update = update.unflatten(1, (2, -1))
            scale = max(1, update.shape[-2] / update.shape[-1]) ** 0.5
            p.grad.copy_(orthogonal(update).mul_(scale).reshape(p.shape))
        dist.all_reduce(gradient)  # the gradient's place now holds the updates: each process's own, and zeros
        for p in self.named.values():
            p.mul_(1 - rate * WEIGHT_DECAY).add_(p.grad, alpha=-rate)


class Run:
    """A process's copy of the model and its optimizers; all copies stay equal, as they see the same gradient."""

    def __init__(self, recipe: Recipe, folder: Path, budget: float):
        torch.manual_seed(SEED)
        self.model = untrained(recipe)
        self.model.set_experts_implementation("sorted")
        layers = self.model.model.layers
        self.routers = [Router(layer.mlp.gate, recipe) for layer in layers]
        for layer in layers:
            norms = layer.input_layernorm, layer.post_attention_layernorm
            shared = [layer.mlp.shared_expert] if hasattr(layer.mlp, "shared_expert") else []
            for part in (layer.self_attn, *shared, *norms):
                part.compile(dynamic=False)
        params = list(self.model.parameters())
        self.gradient = torch.zeros(sum(p.numel() for p in params) + 1)  # the last place carries the time spent
        for p, part in zip(params, self.gradient[:-1].split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)
        matrices = {n: p for n, p in layers.named_parameters() if p.ndim > 1 and "gate.weight" not in n}
        others = [p for p in params if all(p is not m for m in matrices.values())]
        self.muon = Muon(matrices)
        self.adam = torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0, fused=True)
        self.step, self.seconds, self.budget, self.checkpoint = 0, 0.0, budget, folder / "checkpoint.safetensors"
        if self.checkpoint.exists():
            saved, counts = read_checkpoint(self.checkpoint)
            self.model.load_state_dict(saved["model"])
            adam = self.adam.state_dict()
            for name, tensor in saved["adam"].items():
                index, part = name.split(".")
                adam["state"].setdefault(int(index), {})[part] = tensor
            self.adam.load_state_dict(adam)
            for i, mine in enumerate(self.muon.momentum):
                mine.copy_(saved["muon"][str(i)])
            self.step, self.seconds = int(counts["step"]), float(counts["seconds"])

    @property
    def fade(self) -> float:
        """One until the decay, then falling to nothing by the end of the time."""
        return min(1, max(0, 1 - self.seconds / self.budget) / DECAY_SHARE)

    def save(self) -> None:
        tensors = {f"model/{name}": tensor for name, tensor in self.model.state_dict().items()}
        for index, state in self.adam.state_dict()["state"].items():
            tensors |= {f"adam/{index}.{part}": tensor for part, tensor in state.items()}
        tensors |= {f"muon/{i}": momentum for i, momentum in enumerate(self.muon.momentum)}
        counts = {"step": str(self.step), "seconds": str(self.seconds)}
        save_file(tensors, self.checkpoint.with_suffix(".new"), counts)
        self.checkpoint.with_suffix(".new").replace(self.checkpoint)  # a kill leaves the old file or the new one

    def bits(self, batch: Tensor) -> Tensor:
        length = CONTEXT if self.fade < 1 else CONTEXT // 2
        batch = batch.unfold(1, length + 1, length).flatten(0, 1)
        hidden = self.model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        return F.cross_entropy(self.model.lm_head(hidden).flatten(0, 1), batch[:, 1:].flatten()) / math.log(2)

    def train(self, batch: Tensor, spent: float) -> tuple[float, float]:
        self.gradient.zero_()
        bits = self.bits(batch)
        balance, routing = map(sum, zip(*(router.losses(self.fade) for router in self.routers), strict=True))
        (bits * math.log(2) + routing).backward()
        self.gradient[-1] = spent
        dist.all_reduce(self.gradient)
        self.gradient /= dist.get_world_size()
        nn.utils.clip_grad_norm_(self.adam.param_groups[0]["params"], 1.0)
        self.seconds = self.gradient[-1].item()
        self.step += 1
        rate = min(self.step / WARM_UP_STEPS, self.fade)
        self.adam.param_groups[0]["lr"] = rate * ADAM_RATE
        self.adam.step()
        self.muon.step(rate * MUON_RATE, self.gradient)
        return bits.item(), balance.item() / len(self.routers)

    @torch.no_grad()
    def held_out_bits(self, windows: Tensor) -> float:
        total = torch.stack([self.bits(part) * len(part) for part in windows.split(4)]).sum() / len(windows)
        dist.all_reduce(total)
        return total.item() / dist.get_world_size()


def cut(data: np.ndarray, length: int) -> Tensor:
    """Windows of length + 1 bytes, each sharing one byte with the next: every byte is predicted once."""
    return torch.from_numpy(data[: (len(data) - 1) // length * length + 1].copy()).unfold(0, length + 1, length)


class LossLog:
    """loss.csv; rows past the checkpoint that a run continues from are dropped, as they will be written again."""

    HEADER = ("step", "tokens", "seconds", "train_bits_per_byte", "balance_loss", "held_out_bits_per_byte")

    def __init__(self, path: Path, step: int):
        rows = list(csv.reader(path.open()))[1:] if path.exists() else []
        self.file = path.open("w", newline="")
        self.writer = csv.writer(self.file, lineterminator="\n")
        self.writer.writerows([self.HEADER, *(row for row in rows if int(row[0]) <= step)])

    def add(self, row: list) -> None:
        self.writer.writerow(row)
        self.file.flush()


def worker(rank: int, world: int, meeting: str, args: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    budget = args.minutes * 60
    recipe = MODELS[args.model]
    run = Run(recipe, args.run, budget)
    corpus = cut(np.fromfile(args.corpus, np.uint8), CONTEXT)
    order = torch.randperm(len(corpus), generator=torch.Generator().manual_seed(SEED))
    text = "\n\n".join(topics[name].strip() for name in sorted(topics)).encode()[:HELD_OUT_BYTES]
    held_out = cut(np.frombuffer(text, np.uint8), CONTEXT)[rank::world].long()
    started, saved = time.monotonic() - run.seconds, time.monotonic()
    if rank == 0:
        log = LossLog(args.run / "loss.csv", run.step)
    tty = sys.stdout.isatty()
    with Progress(disable=rank > 0 or not tty) as progress:
        bar, recent = progress.add_task("training", total=budget), []
        while run.seconds < budget:
            first = run.step * recipe.batch + rank
            picks = order[torch.arange(first, first + recipe.batch - rank, world) % len(order)]
            recent.append(run.train(corpus[picks].long(), time.monotonic() - started))
            done = run.seconds >= budget
            evaluation = run.held_out_bits(held_out) if done or run.step % EVALUATE_STEPS == 0 else None
            if rank == 0 and (done or run.step % LOG_STEPS == 0):
                bits, balance = np.mean(recent, axis=0)
                tokens = run.step * recipe.batch * CONTEXT
                shown = "" if evaluation is None else f"{evaluation:.4f}"
                log.add([run.step, tokens, f"{run.seconds:.0f}", f"{bits:.4f}", f"{balance:.4f}", shown])
                recent.clear()
                line = f"step {run.step}  {tokens / 1e6:.1f} MB  {bits:.3f} bits/byte  balance {balance:.3f}  {shown}"
                progress.update(bar, completed=run.seconds, description=line)
                if not tty:
                    print(f"{run.seconds:6.0f} s  {line}", flush=True)
            if rank == 0 and (done or time.monotonic() - saved > CHECKPOINT_SECONDS):
                run.save()
                saved = time.monotonic()
    dist.destroy_process_group()


def read_checkpoint(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """Its tensors as {"model": {name: tensor}, "adam": ..., "muon": ...}, and the run's step and seconds."""
    saved: dict[str, dict[str, Tensor]] = {"model": {}, "adam": {}, "muon": {}}
    with safe_open(path, "pt") as file:
        for key in file.keys():  # noqa: SIM118 (no mapping)
            part, name = key.split("/")
            saved[part][name] = file.get_tensor(key)
        return saved, file.metadata()


def export(recipe: Recipe, run: Path, folder: Path) -> None:
    model = untrained(recipe)
    model.load_state_dict(read_checkpoint(run / "checkpoint.safetensors")[0]["model"])
    model.to(torch.bfloat16).save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--corpus", type=Path, help="corpus.bin, as corpus.py writes it")
    parser.add_argument("--run", type=Path, required=True, help="folder for the checkpoint and loss.csv")
    parser.add_argument("--minutes", type=float, default=65, help="training time")
    parser.add_argument("--processes", type=int, default=min(os.cpu_count() or 1, 2), help="two made all three")
    parser.add_argument("--export", type=Path, help="write the run's checkpoint here instead of training")
    args = parser.parse_args()
    if args.export:
        export(MODELS[args.model], args.run, args.export)
        return
    args.run.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        meeting = f"file://{folder}/processes"
        torch.multiprocessing.spawn(worker, (args.processes, meeting, args), nprocs=args.processes)


if __name__ == "__main__":
    main()
