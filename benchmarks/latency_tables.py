"""The latency report in the terminal: its tables, and what must be said beside them."""

from collections.abc import Sequence

from rich.table import Table

from cachemoe.benchmarks.latency_decode import FREE_MISSES, IN_A_GRAPH, ORIGINAL, RESIDENT
from cachemoe.benchmarks.latency_prefetch import ADMISSION, NO_PREFETCH
from cachemoe.benchmarks.payload import FILE, NATIVE
from cachemoe.benchmarks.ratios import with_spread
from cachemoe.moe.quality_report import CHANCE_COLUMN, CHANGED_COLUMN, COST_COLUMNS
from cachemoe.moe.terminal import table_of

TARGET_PERPLEXITY_CHANGE = 0.03


def best_within_target(rows: Sequence[dict]) -> dict | None:
    """The row with the fewest misses among those that raise perplexity by at most 3 %; None if there is none."""
    allowed = [
        row
        for row in rows
        if "miss_rate" in row
        and row["strategy"] != str(ORIGINAL)
        and row["perplexity_change"] <= TARGET_PERPLEXITY_CHANGE
    ]
    # Misses as they are printed: what differs by less is decided by quality.
    return min(allowed, key=lambda row: (round(row["miss_rate"], 3), row["perplexity_change"]), default=None)


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _speedup(row: dict) -> str:
    return with_spread(row["speedup_over_original"])


def _some_percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.0f}"


# (heading, text of a row, whether only rows with a measured quality have one)
SPEED_COLUMNS = (
    ("miss\n%", lambda r: _percent(r["miss_rate"]), True),
    ("MB a\ntoken", lambda r: f"{r['bytes_per_token'] / 1e6:.1f}", False),
    ("ms\np50", lambda r: f"{r['ms_per_token']['p50']:.1f}", False),
    ("tokens\na s", lambda r: f"{r['tokens_per_second']:.1f}", False),
    ("speed-up\n(spread)", lambda r: _speedup(r), False),
    ("% of\nresident", lambda r: f"{100 * r['fraction_of_resident_speed']:.0f}", False),
)
QUALITY_COLUMNS = (
    ("bits\na byte", lambda r: f"{r['bits_per_byte']:.3f}", True),
    ("change", lambda r: f"{round(r['bits_per_byte_change'], 3) + 0.0:+.3f}", True),
    *((heading, text, True) for heading, text in COST_COLUMNS),
    (*CHANCE_COLUMN, True),
    (*CHANGED_COLUMN, False),
)
MOVEMENT_COLUMNS = (
    ("ms\np95", lambda r: f"{r['ms_per_token']['p95']:.1f}", False),
    ("stall\nms", lambda r: "" if r["stall_ms_per_token"] is None else f"{r['stall_ms_per_token']:.1f}", False),
    ("over-\nlap %", lambda r: _some_percent(r["overlap"]), False),
    ("link\n%", lambda r: _some_percent(r["link_fraction"] or None), False),
    ("bound\nms", lambda r: f"{r['bound_ms_per_token']:.1f}", False),
    ("times\nbound", lambda r: f"{r['times_bound']:.2f}", False),
)
PREFETCH_COLUMNS = (
    ("pre-\ncision %", lambda r: _some_percent(r.get("precision")), False),
    ("re-\ncall %", lambda r: _some_percent(r.get("recall")), False),
    ("used\n%", lambda r: _some_percent(r.get("prefetches_used")), False),
    ("of misses\n%", lambda r: _some_percent(r.get("misses_prefetched")), False),
    ("timely\n%", lambda r: _some_percent(r.get("prefetches_timely")), False),
    ("waste, MB\na token", lambda r: f"{r['wasted_bytes_per_token'] / 1e6:.1f}" if "precision" in r else "", False),
)
ADMISSION_COLUMNS = (
    ("swapped\n%", lambda r: _percent(r["decode_swapped"]), False),
    ("cheap\n%", lambda r: _percent(r["decode_cheap"]), False),
    ("missed\n%", lambda r: _percent(r["decode_miss_rate"]), False),
    ("admitted\na token", lambda r: f"{r['admissions_per_token']:.1f}", False),
    ("idle link, MB\na token", lambda r: f"{r['background_bytes_per_token'] / 1e6:.1f}", False),
)
WIDE = 130  # columns of terminal below which speed and quality go into two tables


def tables(report: dict, width: int) -> list[Table]:
    """The report as tables, one a capacity, or two where the terminal is narrower than ``WIDE``."""
    made = []
    for capacity in report["capacities"]:
        title = (
            f"{capacity['capacity']} of {report['model']['experts']} experts resident in each layer "
            f"({capacity['capacity_fraction']:.0%})\n"
            f"Belady on the original routing misses {_percent(capacity['belady_miss_rate'])} %"
        )
        best = best_within_target(capacity["rows"])
        rows = capacity["rows"]
        # However pages move, quality is the strategy's.
        by_strategy = [
            row
            for row in rows
            if (row["prefetch"] == NO_PREFETCH or row["name"] == row["strategy"]) and not row["in_a_graph"]
        ]
        predicted = [row for row in rows if "precision" in row]
        # Each that admits experts, after the same without.
        admitting = {row["strategy"] for row in rows if row["prefetch"] == ADMISSION}
        beside = [
            row
            for row in rows
            if row["strategy"] in admitting and row["prefetch"] in (NO_PREFETCH, ADMISSION) and not row["in_a_graph"]
        ]
        with_controls = any(row.get("control") for row in rows)
        quality = [column for column in QUALITY_COLUMNS if with_controls or column[0] != CHANCE_COLUMN[0]]
        if width >= WIDE:
            parts = [(rows, [*SPEED_COLUMNS, *quality])]
        else:
            parts = [(rows, SPEED_COLUMNS), (by_strategy, quality)]
        for shown, columns in [
            *parts,
            (rows, MOVEMENT_COLUMNS),
            *([(predicted, PREFETCH_COLUMNS)] if predicted else []),
            *([(beside, ADMISSION_COLUMNS)] if beside else []),
        ]:
            table = table_of(title, "strategy", (heading for heading, _, _ in columns), CHANGED_COLUMN[:1])
            for row in shown:
                style = (
                    "bold green" if row is best else "dim" if row["name"].startswith((RESIDENT, FREE_MISSES)) else None
                )
                cells = (text(row) if "miss_rate" in row or not scored else "" for _, text, scored in columns)
                table.add_row(row["name"].replace(",", ",\n"), *cells, style=style)
            made.append(table)
            title = None
    return made


def summary(report: dict) -> Table:
    """The paper's claim on this run: the fewest misses that 3 % of perplexity buys, a line a capacity."""
    title = "Fewest misses at no more than 3 % higher perplexity"
    misses = ("original\nmiss %", "Belady\nmiss %", "its\nmiss %", "against\noriginal", "against\nBelady")
    table = table_of(title, "pool", ("strategy", *misses, "perplexity\nchange"), ("strategy",))
    for capacity in report["capacities"]:
        original = next(row for row in capacity["rows"] if row["name"] == str(ORIGINAL))["miss_rate"]
        belady, best = capacity["belady_miss_rate"], best_within_target(capacity["rows"])
        cells = [f"{capacity['capacity_fraction']:.0%}", best["name"] if best else "none"]
        cells += [_percent(original), _percent(belady)]
        if best:
            cells += [_percent(best["miss_rate"])]
            cells += [f"{best['miss_rate'] / other - 1:+.0%}" if other else "" for other in (original, belady)]
            cells += [f"{best['perplexity_change']:+.1%}"]
        table.add_row(*cells)
    return table


def notes(report: dict) -> list[str]:
    """What must be said beside the tables: what was moved, read and compared, and what the figures are not."""
    store, settings, speeds, unmodified = (report[name] for name in ("store", "settings", "machine", "unmodified"))
    first = report["capacities"][0]["rows"][0]
    model, segments, decoded = report["model"]["name"], len(first["seconds"]), first["tokens"]
    disk = speeds["disk_bytes_per_second"]
    said = [
        f"Text: {settings['text']}, {unmodified['tokens']} tokens scored. The unmodified model has "
        f"{unmodified['bits_per_byte']:.3f} bits a byte, perplexity {unmodified['perplexity']:.3f} a token.",
        f"Machine: disk {disk / 1e9:.2f} GB/s bare and {speeds['engine_disk_bytes_per_second'] / 1e9:.2f} through the "
        f"engine, memory {speeds['memory_bytes_per_second'] / 1e9:.1f} GB/s, resident experts "
        f"{speeds['resident_expert_bytes_per_second'] / 1e9:.1f} GB/s; {speeds['torch_threads']} threads.",
    ]
    if settings["payload"] != NATIVE:
        said.append(
            f"Payload: routing decisions and quality are {model}'s on the text; the pages that move and compute have "
            f"{settings['payload']}'s geometry ({store['page_bytes'] / 1e6:.2f} MB each) and random weights, and what "
            "they compute is discarded."
        )
    if not store["direct"]:
        said.append("The file system refuses O_DIRECT: the page cache took part, and misses are faster than the disk.")
    if device := report["profile"]:
        link = device["pacing"]["bytes_per_second"]
        resident = speeds["resident_expert_bytes_per_second"]
        said.append(
            f"Link paced to {link / 1e9:.2f} GB/s: {device['name']}'s {device['link'] / device['memory']:.1%} of the "
            f"speed at which resident experts were read here before the run. {device['source']}"
        )
        if resident < 0.6 * speeds["memory_bytes_per_second"]:
            said.append(
                f"Resident experts ran at {resident / speeds['memory_bytes_per_second']:.0%} of this machine's memory "
                "speed: the machine was busy, or its processor is what limits them, and the pace is as much too slow."
            )
        if link > speeds["link_bytes_per_second"]:
            said.append(
                f"This machine's own link moves {speeds['link_bytes_per_second'] / 1e9:.2f} GB/s, less than that: the "
                "times are its, not the device's."
            )
    said.append(
        f"{ORIGINAL}: exact routing, {settings['eviction'].upper()} eviction. {RESIDENT}: every expert in memory. "
        f"{FREE_MISSES}: the same with routing told of the pool, as {ORIGINAL}, so that what a pool costs beside its "
        "misses shows."
    )
    rows = report["capacities"][0]["rows"]
    graphed = {row["strategy"] for row in rows if row["in_a_graph"]}
    if graphed and (others := [s for s in settings["strategy"] if s not in graphed]):
        said.append(
            f"Not in a graph: {', '.join(others)}; they choose another number of experts than the captured engine has, "
            "or ask the host ahead of a layer."
        )
    if any(row.get("control") for row in rows):
        said.append(
            "KL by chance: of the same text with as many experts dropped, swapped for others, or at a cheaper level, "
            "chosen by chance."
        )
    scored = sorted({row["scored_tokens"] for row in rows if "scored_tokens" in row})
    fewer = "" if len(scored) == 1 else f", where layers share a cache the first {scored[0]}"
    said.append(
        f"Misses are counted over the {unmodified['tokens']} scored tokens{fewer}, from cold caches, against the "
        f"{report['model']['k']} experts a token and layer that the model itself selects; MB and ms over {decoded} "
        f"other tokens, warm. The clock covers all of {model}'s own forward, routing included, and the "
        "experts moved; no attention or shared expert of the payload's size is in it."
    )
    said.append(
        f"Pages came from {_source(store['level'])}, measured at {speeds['link_bytes_per_second'] / 1e9:.2f} GB/s"
        f"{' and paced' if device else ''}. Stall: waiting "
        "for pages with nothing left to compute. Overlap: what was hidden of the needed pages' time on the link. Link: "
        "bytes moved, of what it could have moved. Bound: a token's missing bytes over the link or its experts' out of "
        f"memory, whichever takes longer, and the time that {RESIDENT} spends outside its experts."
    )
    rows = [row for capacity in report["capacities"] for row in capacity["rows"]]
    if any(row["times_bound"] < 1 for row in rows):
        said.append(
            "A row below its bound: bandwidths are measured before the run, and the machine was faster while it ran."
        )
    if any("precision" in row for row in rows):
        said.append(
            "Precision and recall: of the experts predicted, and of all that were chosen. Used: of the pages asked for "
            "ahead. Of misses: those whose page was asked for ahead; timely: of these, landed before they were needed."
        )
    if any(row["prefetch"] == ADMISSION for row in rows):
        said.append(
            "Admission: an expert that gave way to another, or ran at a cheaper level, is fetched while the link is "
            "idle and given a slot. Swapped, cheap and missed: of the selections of the tokens decoded, with and "
            "without."
        )
    if any(row["in_a_graph"] for row in rows):
        how = "one CUDA graph a token" if settings["device"] == "cuda" else "rehearsed on a CPU, without a graph"
        said.append(f"{IN_A_GRAPH}: driven by the device, {how}; pruning, which uses fewer experts, is left out.")
    said.append(
        "Green: fewest misses at no more than 3 % higher perplexity. Speed-up over original: the same text decoded one "
        f"row after another in one process; median, least and most of {segments} segments."
    )
    return said


def _source(level: str) -> str:
    """In words, where pages came from."""
    kind, _, pages = level.partition(":")
    if kind == FILE:
        return "the file"
    return f"{pages} pages in pinned memory, and the others from the file" if pages else "pinned memory"
