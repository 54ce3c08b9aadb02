"""The ``cachemoe`` command."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from cachemoe.benchmarks import cli_comparisons
from cachemoe.moe import cli as cli_models
from cachemoe.moe.progress import show_progress
from cachemoe.moe.terminal import check_destination, console, errors, one_sentence, save_report
from cachemoe.offload.files import whole_file

app = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode="markdown")


@app.callback()
def about():
    """Mixture-of-Experts inference where only some experts fit in fast memory.

    Experts live as pages in a store; a pool of slots caches some of them; the router knows which are resident and,
    where the model would hardly notice, prefers them. Nothing is trained. After Skliar et al., "Mixture of
    Cache-Conditional Experts for Efficient Mobile Device Inference" (arXiv 2412.00099).

    Begin with **cachemoe latency**: it needs no download and no GPU.
    """


@app.command()
def latency(
    model: Annotated[
        Path | None,
        typer.Option(help="Checkpoint folder of the routing model.", show_default="the built-in steepmoe"),
    ] = None,
    payload: Annotated[
        str,
        typer.Option(
            help="Pages that move and compute: **qwen1.5-moe**, that model's geometry in int4 with random weights, or "
            "**native**, the routing model's own."
        ),
    ] = "qwen1.5-moe",
    capacity: Annotated[
        list[str], typer.Option(help="Experts of each layer that fit, as 50% or as a number; repeatable.")
    ] = ["25%", "50%", "75%"],  # noqa: B006 (typer copies it)
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help=f"{cli_models.ROUTINGS}; repeatable; original always runs.",
            show_default="a few of each",
        ),
    ] = None,
    top_j: cli_models.TopJ = None,
    eviction: Annotated[str, typer.Option(help="Which resident expert leaves: lru or lfu.")] = "lru",
    tokens: Annotated[
        int, typer.Option(min=6, help="Tokens decoded on the clock for each row, in three segments.")
    ] = 72,
    quality_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens that quality is measured on, at least one --context.")
    ] = 8192,
    context: Annotated[int, typer.Option(min=2, help="Tokens the model sees at once.")] = 512,
    text: Annotated[
        Path | None,
        typer.Option(help="Text to measure on.", show_default="prose of the Python language reference, held out"),
    ] = None,
    profile: Annotated[
        str,
        typer.Option(
            help="Pace the link as a device's: phone-ufs3.1, phone-ufs4.0, pcie3, pcie4 or pcie5. Missed bytes cost, "
            "against resident experts as fast as this machine computes them, what they cost there."
        ),
    ] = "none",
    device: Annotated[
        str | None, typer.Option(help="Where experts run: cpu or cuda.", show_default="cuda where there is a GPU")
    ] = None,
    store: Annotated[
        str | None,
        typer.Option(
            help="Where missing pages come from: **file**; **pinned**, all in page-locked memory; or **pinned:PAGES**, "
            "so many there and the rest in the file.",
            show_default="file; pinned on a GPU",
        ),
    ] = None,
    prefetch: Annotated[
        list[str],
        typer.Option(
            help="Which experts are asked for ahead: none; **gate**, the next layers' routers on this layer's input, "
            "or **gate:N**, its N likeliest; **stacked**, the same up to the first layer that lacks one; **previous**, "
            "the last token's; **frequency**; **history**, what followed the two layers before in the scored text; "
            "**oracle**, exact routing only; **admission**, nothing ahead, but, while the link is idle, who gave way "
            "or ran cheaply. Repeatable: a row each."
        ),
    ] = ["none"],  # noqa: B006 (typer copies it)
    ahead: Annotated[int, typer.Option(help="Layers that prefetchers look ahead.")] = 1,
    drive: Annotated[
        list[str],
        typer.Option(
            help="Who decides: **host**, page by page; or **graph**, the device itself, a whole decode step in one "
            "CUDA graph (on a CPU, the same without the graph). Repeatable: a row each."
        ),
    ] = ["host"],  # noqa: B006 (typer copies it)
    timeline: Annotated[
        Path | None,
        typer.Option(help="Where a Chrome trace of the decoding goes; Perfetto opens it. A picture goes beside it."),
    ] = None,
    calibration: cli_models.Calibration = None,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Beside each policy the quality of as many changes by chance."),
    ] = False,
    cheaper: cli_models.Cheaper = None,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path("results/latency.json"),
    plot_path: Annotated[Path, typer.Option("--plot", help="Where the picture goes.")] = Path("results/latency.png"),
):
    """Latency table: what each routing strategy saves in time and costs in quality, at the same pool size.

    The routing model reads real text. Quality is measured stepped, token by token, with the caches evolving; latency by
    decoding token by token while the experts' pages really come off the disk (O_DIRECT, past the page cache).

    Examples:

    - cachemoe latency

    - cachemoe latency --capacity 50% --strategy cache-prior:0.3 --payload native

    - cachemoe latency --profile phone-ufs4.0
    """
    with one_sentence():
        # Imported here: torch, transformers and matplotlib take seconds that --help should not.
        from cachemoe.benchmarks.latency_plot import plot_report
        from cachemoe.benchmarks.latency_run import LatencyOptions, run_latency
        from cachemoe.benchmarks.latency_tables import notes, summary, tables

        options = LatencyOptions(
            *(model, payload, capacity, strategy, top_j, eviction, tokens, quality_tokens, context, text, profile),
            *(device, store, prefetch, ahead, drive, timeline, calibration, controls, cheaper),
        )
        for path in (json_path, plot_path, *([timeline] if timeline else [])):
            check_destination(path)
        report = run_latency(options, show_progress)
        for table in tables(report, console.width):
            console.print(table)
        console.print(summary(report))
        for note in notes(report):
            console.print(note)
        save_report(report, json_path)
        with whole_file(plot_path) as partial:
            plot_report(report, partial)
        console.print(f"[dim]Picture: {plot_path}.[/dim]")


@app.command()
def systems(
    model: Annotated[
        list[Path] | None,
        typer.Option(help="Byte-level model folder; repeatable.", show_default="those that are shipped"),
    ] = None,
    text: Annotated[
        list[Path] | None,
        typer.Option(
            help="Text; repeatable. Speed is measured on each model's first.",
            show_default="prose of the Python language reference, and Python source",
        ),
    ] = None,
    capacity: Annotated[
        str, typer.Option(help="Size of every pool: experts of each layer, or a share of them.")
    ] = "50%",
    payload: Annotated[str, typer.Option(help="As latency's.")] = "qwen1.5-moe",
    tokens: Annotated[int, typer.Option(min=3, help="Tokens decoded on the clock, in three segments.")] = 24,
    quality_tokens: Annotated[
        int, typer.Option(min=512, help="Tokens of each text that quality is measured on.")
    ] = 2048,
    free: Annotated[
        int,
        typer.Option(
            min=0, help="Tokens decoded greedily after each of 96 prompts by the systems on the front; 0: none."
        ),
    ] = 0,
    profile: Annotated[str, typer.Option(help="As latency's.")] = "none",
    strategy: Annotated[
        list[str] | None,
        typer.Option(help="As latency's; repeatable.", show_default="each system at a setting of its own"),
    ] = None,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path("results/systems.json"),
    plot_path: Annotated[Path, typer.Option("--plot", help="Where the picture goes.")] = Path("results/systems.png"),
):
    """Eleven systems on the same work, in pools of the same bytes: what each saves and costs, and what chance costs.

    Calibrations are made where they are missing, which takes a minute or two a model.
    """
    with one_sentence():
        import argparse

        from cachemoe.benchmarks.systems_plot import plot_systems
        from cachemoe.benchmarks.systems_run import SystemsOptions, run_systems
        from cachemoe.benchmarks.systems_tables import notes, tables
        from cachemoe.moe.checkpoint import COARSEMOE, STEEPMOE, TINYMOE

        for path in (json_path, plot_path):
            check_destination(path)
        texts = text or [None, Path(argparse.__file__)]
        options = SystemsOptions(
            model or [STEEPMOE, TINYMOE, COARSEMOE],
            *(texts, capacity, payload, tokens, quality_tokens, free, profile, strategy),
        )
        report = run_systems(options, show_progress)
        for table in tables(report):
            console.print(table)
        for note in notes(report):
            console.print(note)
        save_report(report, json_path)
        with whole_file(plot_path) as partial:
            plot_systems(report, partial)
        console.print(f"[dim]Picture: {plot_path}.[/dim]")


@app.command()
def gpu(
    out: Annotated[Path, typer.Option(help="Where every figure goes; the pictures go beside it.")] = Path(
        "results/gpu.json"
    ),
    minutes: Annotated[float, typer.Option(min=0.1, help="Time for all steps together.")] = 9.0,
    step: Annotated[
        list[str] | None,
        typer.Option(
            help="environment, compile, correctness, latency, latency-phone, latency-pcie, microbenchmarks; with "
            "compute-sanitizer memcheck and racecheck. Repeatable.",
            show_default="all of them",
        ),
    ] = None,
    rehearse: Annotated[bool, typer.Option("--rehearse", help="Run the same steps on the CPU.")] = False,
):
    """Everything that needs a GPU, in one run from a checkout, into one JSON file.

    Every kernel is compiled, then come tests, tables and microbenchmarks.

    Each step is a process of its own; one that fails or hangs does not keep the others from running. Exits with 1 if
    any step failed, with 2 if there is no GPU.
    """
    with one_sentence():
        from cachemoe.benchmarks.gpu_report import gpu_summary, gpu_tables
        from cachemoe.benchmarks.gpu_run import run_gpu

        check_destination(out)
        report = run_gpu(out, 60 * minutes, step or [], rehearse, show_progress)
        for table in gpu_tables(report):
            console.print(table)
        for line in gpu_summary(report):
            console.print(line, highlight=False, markup=False)
        console.print(f"[dim]Every figure: {out}.[/dim]")
    if any(step["status"] != "passed" for step in report["steps"]):
        raise typer.Exit(1)


@app.command("compile")
def compile_kernels(
    capability: Annotated[
        list[int] | None,
        typer.Option(help="Compute capability, once for each.", show_default="the GPU's own; without one 80 and 90"),
    ] = None,
    tiles: Annotated[
        bool, typer.Option("--tiles", help="The tiles too that the microbenchmarks try beside the chosen ones.")
    ] = False,
    json_path: Annotated[Path | None, typer.Option("--json", help="Where every figure goes.")] = None,
):
    """Compile every kernel configuration for GPUs that need not be there, and show what each uses.

    The exit code is 1 if one that the heuristics choose spills registers, asks for too much shared memory, or lacks the
    wide loads or the pipeline that it claims.
    """
    with one_sentence():
        from cachemoe.benchmarks.compile_run import compile_table, default_capabilities, run_compile, wrong

        if json_path is not None:
            check_destination(json_path)
        report = run_compile(capability or default_capabilities(), tiles, show_progress)
        console.print(compile_table(report))
        if json_path is not None:
            save_report(report, json_path)
        rows = wrong(report)
        for row in rows:
            what = f"{row['kernel']} for {row['for']} on sm_{row['capability']}: {'; '.join(row['defects'])}"
            errors.print(what, highlight=False, soft_wrap=True)
        if report["interrupted"]:  # what there is has been written
            raise KeyboardInterrupt
        if rows:
            raise typer.Exit(1)


for command in (*cli_models.COMMANDS, *cli_comparisons.COMMANDS):
    app.command()(command)


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(main())
