"""The commands on a user's own checkpoint: info, pack, verify, generate, quality, trace and calibrate."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from cachemoe.moe.progress import show_progress
from cachemoe.moe.sizes import size_text
from cachemoe.moe.terminal import check_destination, console, one_sentence, save_report

ROUTINGS = (
    "original, pruning:K', max-rank:M, cumsum:p, cache-prior:lambda, latency-ratio:gamma, pregated-hint, "
    "pregated-exec, smola-lowrank:r, random-drop:p, random-swap:p, random-cheap:p; with a calibration relu-route, "
    "relu-literal, naee-skip:q, "
    "naee-prune:r, adap-skip:T, decoupled-hint, decoupled-exec, hobbit:T1:T2, edgemoe:P, "
    "moec-substitute:likeness, readme-lookahead:W. After those that swap experts also ,max-regret=bound"
)
Checkpoint = Annotated[str, typer.Argument(help="Checkpoint folder of safetensors, or a Hugging Face hub id.")]
Format = Annotated[
    str | None,
    typer.Option(
        help="Of the pages: bf16, fp16, fp32, int8, int4 or int2.", show_default="the checkpoint's own precision"
    ),
]
Formats = Annotated[
    list[str] | None,
    typer.Option(
        help="Of the pages: bf16, fp16, fp32, int8, int4 or int2; repeatable: of cheaper levels after full precision.",
        show_default="the checkpoint's own precision",
    ),
]
Dense = Annotated[
    str | None,
    typer.Option(
        help="Round all other matrices too, int8 or int4: a token reads them all.", show_default="as they are"
    ),
]
Cheaper = Annotated[
    str | None,
    typer.Option(
        help="Format of the cheaper level that some strategies ask for.", show_default="int4, or of int4 pages int2"
    ),
]
Revision = Annotated[
    str | None, typer.Option(help="Of a hub id: branch, tag or commit.", show_default="its main branch")
]
Pool = Annotated[
    str | None,
    typer.Option(
        help="Experts in memory: a share, 50%; a size, 6GiB; or slots of each layer.",
        show_default="50%, or what a token uses where that is more",
    ),
]
TopJ = Annotated[
    int | None,
    typer.Option(
        help="J, the best-ranked experts that every strategy keeps.",
        show_default="2, or of 2 experts a token the best",
    ),
]
Calibration = Annotated[
    Path | None, typer.Option(help="Made by cachemoe calibrate, for strategies that need one.", show_default=False)
]
Eviction = Annotated[str, typer.Option(help="Which resident expert leaves: lru or lfu.")]
Text = Annotated[
    Path | None,
    typer.Option(help="Text in UTF-8.", show_default="prose of the Python language reference"),
]


def info(
    checkpoint: Checkpoint,
    memory: Annotated[
        str | None, typer.Option(help="Memory to be had, such as 8GiB: what fits into it, and what a token fetches.")
    ] = None,
    predict: Annotated[
        bool,
        typer.Option("--predict", help="Measure this machine, and tell tokens a second before anything is packed."),
    ] = False,
    pool: Annotated[
        list[str] | None,
        typer.Option(
            help="For --predict: experts in memory, as a share, 50%; a size, 6GiB; or slots of each layer; repeatable.",
            show_default="25%, 50% and 100%",
        ),
    ] = None,
    format: Format = None,
    dense: Dense = None,
    miss_rate: Annotated[
        str | None,
        typer.Option(
            help="For --predict, of one pool: share of the selections that miss, as 14%.",
            show_default="lent from the built-in tinymoe",
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", help="For --predict: where every figure goes.", show_default=False)
    ] = None,
    revision: Revision = None,
):
    """What a checkpoint needs, from its headers alone: experts, bytes an expert, what fits in a given memory.

    With --predict also how fast this machine's CPU will decode with it: --pool, --format and --dense say how it will be
    loaded.
    """
    with one_sentence():
        from cachemoe.moe.checkpoint import Checkpoint as Opened
        from cachemoe.moe.hub import checkpoint_folder
        from cachemoe.moe.info import needs
        from cachemoe.moe.load import check_loadable
        from cachemoe.moe.predict_report import predict_table, predict_words
        from cachemoe.moe.predict_run import question_of, run_predict
        from cachemoe.moe.sizes import size_of
        from cachemoe.offload.errors import InputError

        of_predict = {"pool": pool, "format": format, "dense": dense, "miss-rate": miss_rate, "json": json_path}
        given = next((name for name, value in of_predict.items() if value), None)
        if given is not None and not predict:
            raise InputError(f"--{given} is for --predict: give that too, or leave --{given} out")
        opened = Opened(checkpoint_folder(checkpoint, revision))
        check_loadable(opened, format)
        question = question_of(opened, pool, format, dense, miss_rate) if predict else None
        if json_path is not None:
            check_destination(json_path)
        shape, needed = opened.shape, needs(opened, None if memory is None else size_of(memory))
        console.print(
            f"{opened.path.resolve().name}, {opened.config.get('model_type')}: {len(shape.layers)} MoE layers of "
            f"{shape.experts} experts, {shape.top_k} used; hidden {shape.hidden}, expert {shape.intermediate}; all but "
            f"the experts {size_text(needed.dense)}.",
            highlight=False,
        )
        table = Table(box=box.SIMPLE_HEAD, padding=0)
        columns = ("pages", "an expert", "all experts", "a token\nreads", "least pool")
        for heading in (*columns, *(() if memory is None else (f"fit in\n{memory}", "a token\nfetches"))):
            table.add_column(heading, justify="left" if heading == "pages" else "right", no_wrap=True)
        for row in needed.formats:
            least = len(shape.layers) * shape.top_k * row.page
            cells = [row.kind, *map(size_text, (row.page, row.experts, row.read_per_token, least))]
            if memory is not None:
                enough = row.fetched_per_token is not None
                cells += [
                    f"{row.fits} of {shape.experts}" if enough else "too little",
                    size_text(row.fetched_per_token) if enough else "",
                ]
            table.add_row(*cells)
        console.print(table)
        if memory is not None:
            console.print(
                "A token fetches this if its experts were missing as often as any expert; models have favourites, and "
                "fetch less. Tokens in flight, activations and the key-value cache need memory besides.",
                highlight=False,
            )
        if question is not None:
            report = run_predict(opened, question, show_progress)
            console.print(predict_table(report))
            for words in predict_words(report):
                console.print(words, highlight=False)
            if json_path is not None:
                save_report(report, json_path)


def pack(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="The store to make, .safetensors; another that is there is replaced.")],
    format: Formats = None,
    revision: Revision = None,
):
    """Make a store of a checkpoint's experts, one expert in memory at a time; whole or not at all.

    Of several formats each has a file of its own, the second and further with its format in the name: a level can so be
    added, or made anew, without the others.
    """
    with one_sentence():
        from cachemoe.moe.checkpoint import Checkpoint as Opened
        from cachemoe.moe.hub import checkpoint_folder
        from cachemoe.moe.load import check_loadable
        from cachemoe.moe.pack import pack as pack_store
        from cachemoe.offload.store import ExpertStore

        opened = Opened(checkpoint_folder(checkpoint, revision))
        layouts = []
        for kind in dict.fromkeys(format or [None]):
            check_loadable(opened, kind)
            path = out.with_stem(f"{out.stem}-{kind}") if layouts else out
            layouts.append((path, opened.layout(kind)))
            check_destination(path)
            if path.exists():
                ExpertStore(path).close()  # refuses anything but a store: nothing else is replaced
        for path, layout in layouts:
            rounding = pack_store(opened, layout, path, show_progress)
            pages, kind = layout.layers * layout.experts, layout.page_format.kind
            size = size_text(pages * layout.page_format.page_bytes)
            console.print(f"{path}: {pages} pages of {kind}, {size}.", highlight=False)
            if rounding is not None:
                title = f"Rounding error of the weights in {kind}"
                table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
                table.add_column("layer", justify="right")
                table.add_column("root mean square, %", justify="right")
                for layer, error in zip(opened.shape.layers, rounding, strict=True):
                    table.add_row(str(layer), f"{100 * error:.2f}")
                console.print(table)


def verify(store: Annotated[Path, typer.Argument(help="The store, a .safetensors file in the cache directory.")]):
    """Check every page of a store against its checksum."""
    with one_sentence():
        from cachemoe.offload.store import ExpertStore

        with ExpertStore(store) as opened, show_progress("reading every page", opened.pages) as advance:
            opened.verify(advance)
        console.print(f"{store}: {opened.pages} pages, all as they were written.", highlight=False)


def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str, typer.Option(help="What the model goes on from.")],
    tokens: Annotated[int, typer.Option(min=1, help="New tokens at most.")] = 100,
    pool: Pool = None,
    routing: Annotated[str, typer.Option(help=f"{ROUTINGS}; original is exact.")] = "original",
    top_j: TopJ = None,
    calibration: Calibration = None,
    capacity: Annotated[
        str, typer.Option(help="How layers share the pool: even, or adaptive, as a calibration's misses say.")
    ] = "even",
    format: Formats = None,
    store: Annotated[
        list[Path] | None,
        typer.Option(
            help="Made by cachemoe pack; repeatable: of cheaper levels after full precision.",
            show_default="in the cache directory",
        ),
    ] = None,
    eviction: Annotated[
        str | None, typer.Option(help="Which resident expert leaves: lru or lfu.", show_default="the routing's, or lru")
    ] = None,
    dense: Dense = None,
    prefetch: Annotated[
        str | None,
        typer.Option(help="gate: fetch what the next layer's router says of this one's input.", show_default=False),
    ] = None,
    residency: Annotated[
        Path | None,
        typer.Option(help="Who is resident: read if the file is there, and written at the end.", show_default=False),
    ] = None,
    revision: Revision = None,
):
    """Generate text with a checkpoint whose experts do not all fit: greedily, printed with the prompt as it comes."""
    with one_sentence():
        from inspect import signature

        import torch

        from cachemoe.moe.checkpoint import Checkpoint as Opened
        from cachemoe.moe.hub import checkpoint_folder
        from cachemoe.moe.load import load
        from cachemoe.moe.models import outside, text_streamer
        from cachemoe.moe.strategies import Strategy
        from cachemoe.moe.text import check_tokenizer, check_tokens
        from cachemoe.offload.errors import InputError

        folder = checkpoint_folder(checkpoint, revision)
        shape = Opened(folder).shape
        strategy = Strategy.parse(routing, shape.experts, shape.top_k, top_j)
        if not prompt:
            raise InputError("--prompt is empty: give the model something to go on from")
        check_tokenizer(folder)
        how = {"calibration": calibration, "capacity": capacity, "dense": dense, "prefetch": prefetch}
        if residency is not None:
            check_destination(residency)
            how["residency"] = residency if residency.exists() else None
        model, tokenizer = load(folder, pool, strategy, format, store, eviction, **how)
        with closing(model.cachemoe):
            with outside("the tokenizer fails on the prompt"):
                inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
            check_tokens(inputs["input_ids"], shape)
            takes = signature(model.forward).parameters  # a tokenizer may give more, as token_type_ids
            inputs = {name: value for name, value in inputs.items() if name in takes}
            model.generation_config.pad_token_id = model.generation_config.pad_token_id or 0
            with outside(f"{checkpoint} cannot go on from the prompt"), torch.inference_mode():
                model.generate(**inputs, max_new_tokens=tokens, do_sample=False, streamer=text_streamer(tokenizer))
            if residency is not None:
                model.cachemoe.save_residency(residency)
            Console(stderr=True).print(str(model.cachemoe), style="dim", highlight=False)


def quality(
    checkpoint: Checkpoint,
    text: Text = None,
    capacity: Annotated[
        list[str], typer.Option(help="Experts of each layer that the routing finds resident; repeatable.")
    ] = ["25%", "50%", "75%"],  # noqa: B006 (typer copies it)
    strategy: Annotated[
        list[str] | None,
        typer.Option(
            help="As generate's --routing; repeatable; original always runs.",
            show_default="cache-prior:0.1, 0.2 and 0.5",
        ),
    ] = None,
    top_j: TopJ = None,
    calibration: Calibration = None,
    eviction: Eviction = "lru",
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = 4096,
    context: Annotated[int, typer.Option(min=2, help="Tokens the model sees at once.")] = 512,
    free: Annotated[
        int,
        typer.Option(help="Tokens decoded greedily after each prompt, with no text to follow; 0: none."),
    ] = 0,
    prompts: Annotated[int, typer.Option(min=2, help="For --free, cut from the text's tokens.")] = 16,
    pool: Pool = None,
    format: Format = None,
    cheaper: Cheaper = None,
    revision: Revision = None,
    json_path: Annotated[Path, typer.Option("--json", help="Where every figure goes.")] = Path("results/quality.json"),
):
    """What each routing costs a model: misses, perplexity, divergence and agreement, stepped token by token."""
    with one_sentence():
        from cachemoe.moe.quality_report import quality_table
        from cachemoe.moe.quality_run import run_quality

        check_destination(json_path)
        strategies = strategy or [f"cache-prior:{lam}" for lam in (0.1, 0.2, 0.5)]
        options = (text, capacity, strategies, top_j, eviction, tokens, context, pool, format, cheaper, calibration)
        report = run_quality(checkpoint, revision, *options, free, prompts, show_progress)
        for table in quality_table(report):
            console.print(table)
        save_report(report, json_path)


def trace(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="The trace to make, a .safetensors file.")],
    text: Text = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = 4096,
    context: Annotated[int, typer.Option(min=2, help="Tokens the model sees at once.")] = 512,
    pool: Pool = None,
    format: Format = None,
    revision: Revision = None,
):
    """Record a model's router logits on a text: what policies need, without the model. The format: moe/trace.py."""
    with one_sentence():
        from cachemoe.moe.trace import RoutingTrace
        from cachemoe.moe.trace_run import run_trace

        check_destination(out)
        if out.exists():
            RoutingTrace.load(out)  # refuses anything but a trace: nothing else is replaced
        recorded = run_trace(checkpoint, revision, text, tokens, context, pool, format, show_progress)
        recorded.save(out)
        layers, count, experts = recorded.logits.shape
        console.print(
            f"{out}: {count} tokens, {layers} layers, {experts} experts, {size_text(out.stat().st_size)}.",
            highlight=False,
        )


def calibrate(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="The calibration to make, a .safetensors file.")],
    text: Annotated[
        Path | None,
        typer.Option(help="Text in UTF-8.", show_default="the end of the Python language reference's prose"),
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text, at most.")] = 4096,
    context: Annotated[int, typer.Option(min=2, help="Tokens the model sees at once.")] = 512,
    pool: Pool = None,
    format: Format = None,
    cheaper: Cheaper = None,
    revision: Revision = None,
):
    """Measure what some strategies have to know of a model: thresholds, sensitivities, experts that it can do without.

    The text is to be like the one that the model will be used on, and another than quality is measured on. The format:
    moe/calibration.py.
    """
    with one_sentence():
        from cachemoe.moe.calibrate_run import run_calibrate
        from cachemoe.moe.calibration import Calibration as Made

        check_destination(out)
        if out.exists():
            Made.load(out)  # refuses anything but a calibration: nothing else is replaced
        made = run_calibrate(checkpoint, revision, text, tokens, context, pool, format, cheaper, show_progress)
        made.save(out)
        layers, experts = made.removal.shape
        console.print(f"{out}: {made.name}, {layers} layers, {experts} experts, {made.tokens} tokens.", highlight=False)


COMMANDS = (info, pack, verify, generate, quality, trace, calibrate)
