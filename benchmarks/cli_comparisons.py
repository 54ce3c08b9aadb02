"""The commands that compare ways of running a model, or models of several sizes, and the one that makes a model."""

from pathlib import Path
from typing import Annotated

import typer

from cachemoe.moe.cli import Dense, Format
from cachemoe.moe.progress import show_progress
from cachemoe.moe.terminal import check_destination, console, one_sentence, save_report
from cachemoe.offload.files import whole_file

Made = Annotated[Path, typer.Argument(help="A checkpoint; cachemoe synthetic makes one.")]
BUILT_IN = "the built-in steepmoe"


def swap_overhead(
    folder: Annotated[
        Path | None,
        typer.Argument(help="A checkpoint that fits into memory five times.", show_default=BUILT_IN),
    ] = None,
    rounds: Annotated[int, typer.Option(min=3, help="How often each implementation decodes.")] = 7,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded on the clock each time.")] = 24,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path("results/swap.json"),
):
    """Decode through the swapped path and through transformers' own, everything resident."""
    with one_sentence():
        from cachemoe.benchmarks.ratios import ratio_table
        from cachemoe.benchmarks.swap_overhead import BASELINE, measure
        from cachemoe.moe.checkpoint import DEFAULT_MODEL

        check_destination(json_path)
        report = measure(folder or DEFAULT_MODEL, rounds, tokens, show_progress)
        title = f"{report['model']}, {report['dtype']}: decode, everything resident"
        console.print(ratio_table(title, "implementation", report["rows"], BASELINE))
        save_report(report, json_path)


def compare(
    folder: Made,
    pool: Annotated[str, typer.Option(help="As load takes it; the ways beside it get the same memory.")] = "50%",
    format: Format = None,
    dense: Dense = None,
    routing: Annotated[str, typer.Option(help="Of a way that does not route exactly.")] = "cache-prior:0.5",
    rounds: Annotated[int, typer.Option(min=3, help="How often each decodes.")] = 3,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens on the clock, after as many to warm up.")] = 16,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path("results/compare.json"),
):
    """Decode in several ways, in all of the memory and in little: cachemoe, mmap, accelerate; beside int4 llama.cpp."""
    with one_sentence():
        from cachemoe.benchmarks.compare import compare as run
        from cachemoe.benchmarks.compare_tables import compare_tables

        check_destination(json_path)
        report = run(folder, pool, format, dense, routing, rounds, tokens, show_progress)
        for table in compare_tables(report):
            console.print(table)
        save_report(report, json_path)


def growth(
    axis: Annotated[
        list[str], typer.Option(help="What changes: context, experts, layers, batch or pool; repeatable.")
    ] = ["context", "experts", "layers", "batch", "pool"],  # noqa: B006 (typer copies it)
    context: Annotated[list[int], typer.Option(help="Tokens before; repeatable.")] = [64, 256, 1024, 4096],  # noqa: B006
    experts: Annotated[list[int], typer.Option(help="Experts of a layer; repeatable.")] = [16, 32, 64, 128, 256, 512],  # noqa: B006
    layers: Annotated[list[int], typer.Option(help="Layers; repeatable.")] = [4, 8, 16, 32],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Sequences in a step; repeatable.")] = [1, 2, 4, 8],  # noqa: B006
    pool: Annotated[
        list[str], typer.Option(help="As load takes it; repeatable. A token uses 4 of the 32 experts of a layer.")
    ] = ["4", "25%", "50%", "75%", "100%"],  # noqa: B006
    hidden: Annotated[int, typer.Option(help="H of the models.")] = 1024,
    intermediate: Annotated[int, typer.Option(help="I of an expert.")] = 128,
    format: Annotated[str, typer.Option(help="Of the pages: bf16, fp16, fp32, int8, int4 or int2.")] = "int4",
    dense: Annotated[str, typer.Option(help="How all other matrices are rounded: int8, int4 or none.")] = "int4",
    rounds: Annotated[int, typer.Option(min=3, help="How often each point decodes.")] = 5,
    tokens: Annotated[int, typer.Option(min=1, help="Steps on the clock each time.")] = 12,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path("results/growth.json"),
    plot_path: Annotated[Path, typer.Option("--plot", help="Where the picture goes.")] = Path("results/growth.png"),
):
    """How the cost of decode grows with context, experts, layers, sequences in a step and pool, beside its bound.

    Every axis changes one thing of one random Qwen3-MoE: 4 layers of 32 experts, 4 used, 64 tokens before, one
    sequence, everything resident. With batch, the experts that 1 to 8 sequences need are counted, of the built-in
    models too. The models are made for it beside the stores, 2.2 GB at most at a time, and removed.
    """
    with one_sentence():
        from cachemoe.benchmarks.growth_plot import plot_growth
        from cachemoe.benchmarks.growth_run import GrowthOptions, run_growth
        from cachemoe.benchmarks.growth_tables import growth_notes, growth_tables

        for path in (json_path, plot_path):
            check_destination(path)
        every = {"context": context, "experts": experts, "layers": layers, "batch": batch, "pool": pool}
        values = {name: every.get(name, []) for name in axis}
        report = run_growth(GrowthOptions(values, hidden, intermediate, format, dense, rounds, tokens), show_progress)
        for table in growth_tables(report):
            console.print(table)
        for note in growth_notes(report):
            console.print(note, highlight=False)
        save_report(report, json_path)
        with whole_file(plot_path) as partial:
            plot_growth(report, partial)
        console.print(f"[dim]Picture: {plot_path}.[/dim]")


def first_token(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(
            help="A byte-level checkpoint, whose time to the first token is measured too.", show_default="misses alone"
        ),
    ] = None,
    pool: Annotated[str, typer.Option(help="Of the checkpoint, as load takes it.")] = "50%",
    format: Annotated[
        str, typer.Option(help="Of its pages: bf16, fp16, fp32, int8, int4 or int2; llama.cpp runs beside int4.")
    ] = "int4",
    dense: Annotated[
        str, typer.Option(help="Round its other matrices too, int8 or int4; none: they stay as they are.")
    ] = "int4",
    prompt: Annotated[list[int], typer.Option(min=1, help="Tokens of a prompt; repeatable.")] = [64, 512, 2048],  # noqa: B006 (typer copies it)
    rounds: Annotated[int, typer.Option(min=3, help="How often each way reads each prompt.")] = 3,
    windows: Annotated[int, typer.Option(min=3, help="Of each text, in which misses are counted.")] = 8,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path(
        "results/first-token.json"
    ),
):
    """What a user waits for at the beginning: misses of the first 32 tokens, and the time from a prompt to the first.

    Misses are those of steepmoe and tinymoe, exactly routed, from an empty pool, after a prompt, and from a saved
    residency. Times are a checkpoint's, everything resident and from a pool; beside int4 llama.cpp's.
    """
    with one_sentence():
        from cachemoe.benchmarks.first_token import run_first_token
        from cachemoe.benchmarks.first_token_tables import first_token_tables, notes

        check_destination(json_path)
        rounded = None if dense == "none" else dense
        report = run_first_token(checkpoint, pool, format, rounded, prompt, rounds, windows, show_progress)
        for table in first_token_tables(report):
            console.print(table)
        for note in notes(report):
            console.print(note)
        save_report(report, json_path)


def memory_limit(
    folder: Made,
    pool: Annotated[str, typer.Option(help="As load takes it.")] = "25%",
    json_path: Annotated[Path | None, typer.Option("--json", help="Where every figure goes.")] = None,
):
    """Run a checkpoint under a limit of memory below its weights, through cachemoe and without."""
    with one_sentence():
        from cachemoe.benchmarks.memory_limit import run_limited
        from cachemoe.moe.machine import describe
        from cachemoe.moe.sizes import size_text

        if json_path is not None:
            check_destination(json_path)
        report = run_limited(folder, pool)
        loaded, unmodified = report["loaded"], report["unmodified"]
        limit, weights = (size_text(report[name]) for name in ("limit_bytes", "weights_bytes"))
        print(f"limit {limit} of address space, weights {weights}")
        if loaded["error"] is None:
            over = loaded["peak_bytes"] / report["budget_bytes"]
            print(f"load: generated; peak {size_text(loaded['peak_bytes'])}, {over:.2f} of pool and dense weights")
        else:
            print(f"load: {loaded['error']}")
        print(f"unmodified: {unmodified['error'] or 'generated'}")
        if json_path is not None:
            save_report(report | {"pool": pool, "machine": describe()}, json_path)


def verify_cost(
    folder: Annotated[Path | None, typer.Argument(help="A checkpoint with a tokenizer.", show_default=BUILT_IN)] = None,
    pool: Annotated[str, typer.Option(help="Of each way; both are in memory.")] = "50%",
    rounds: Annotated[int, typer.Option(min=3, help="How often each way decodes.")] = 9,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens decoded on the clock each time.")] = 32,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path("results/verify.json"),
):
    """Decode with pages verified as they land, and without."""
    with one_sentence():
        from rich.table import Table

        from cachemoe.benchmarks.ratios import ratio_table
        from cachemoe.benchmarks.verify_cost import BASELINE, measure
        from cachemoe.moe.checkpoint import DEFAULT_MODEL

        check_destination(json_path)
        report = measure(folder or DEFAULT_MODEL, pool, rounds, tokens, show_progress)
        title = f"{report['model']}, pool {pool}: decode, pages verified on each read, and never"
        console.print(ratio_table(title, "verify", report["rows"], BASELINE))
        table = Table.grid(padding=(0, 2))
        table.add_row("one page", f"{report['page_bytes'] / 1e6:.2f} MB")
        table.add_row("read by one thread, checked", f"{report['read_ms']:.2f} ms")
        table.add_row("its checksum, XXH3", f"{report['checksum_ms']:.2f} ms")
        console.print(table)
        save_report(report, json_path)


def synthetic(
    folder: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
    gigabytes: Annotated[float, typer.Option(help="Of weights, at least.")] = 3.2,
):
    """Write a random Qwen3-MoE checkpoint of a given size."""
    with one_sentence():
        from cachemoe.benchmarks.synthetic import write_synthetic

        write_synthetic(folder, gigabytes, show_progress)


COMMANDS = (swap_overhead, compare, first_token, growth, memory_limit, verify_cost, synthetic)
