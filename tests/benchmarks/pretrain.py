"""How fast small GPTs train here: ours, nanoGPT's recipe, and transformers' models under `Trainer`, in turn.

    python tests/benchmarks/pretrain.py [--shape 14m] [--json OUT]        speed, then time to loss
    python tests/benchmarks/pretrain.py --shape 124m --repeats 1          speed and memory
    python tests/benchmarks/pretrain.py --equal_time 150 --corpus python-docs --seeds 3

Equal parameters, equal batch; each row in a process of its own, several times in turn. tokens/s leaves out the first
steps (warm-up, compiling) and is the median of the repeats. The share of the peak is model FLOPs (6 for each weight of
a linear layer, head included, and 12 x width x context a layer for attention, hf_scratch_gpt/pretraining/compute.py;
the same formula for all rows) over the bf16 product of matrices that was measured in the same process before and
after, for rows in fp32 too. Memory is the process's peak. Ours is the stage `pretrain` itself; compiling is forced,
because its own choice looks at the length of the run, and a benchmark's few steps would not pay for it.

Time to loss: each row trains for so many seconds (compiling counted, evaluation not) by its own schedule, and its
held-out bits per byte are measured in between; the row's figure is when it first comes down to the target: to where
nanogpt-fp32 ends, or --target_bits_per_byte. `--equal_time` is that alone, at 4M parameters. A row's time to a
baseline's figure, as a share of that baseline's time, is the median over seeds, on the documents of the curves; ours
reads its curve off one run whose rate falls only at the end, so `--ours_budgets` shows what a shorter run reaches.

All works without a network. BENCHMARKS.md has the figures.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pretrain_tables as tables
from pretrain_runner import PYTHON_DOCS, Speed, parse_pairs, prepare_corpus, run_row, work_folder
from pretrain_shapes import DEFAULTS, SHAPES
from pretrain_watch import time_to

SPEED_ROWS = ("ours", "nanogpt-fp32", "nanogpt-bf16", "nanogpt-bf16-compile", "gpt2-trainer", "qwen3-trainer")
EQUAL_TIME_ROWS = ("ours", "nanogpt-fp32", "nanogpt-bf16-compile", "nanochat", "modern-adamw", "modern-muon")
REFERENCE = "nanogpt-fp32"
LEARNING_RATES = {"nanogpt": 1e-3, "gpt2": 1e-3, "qwen3": 3e-3, "modern": 3e-3, "nanochat": 0.0, "ours": 0.0}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line and fill in what depends on the shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    known = sorted({*SPEED_ROWS, *EQUAL_TIME_ROWS})
    parser.add_argument("--shape", choices=SHAPES, help="14m; 4m with --equal_time")
    parser.add_argument("--rows", nargs="+", choices=known, help="only these")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--repeats", type=int, help="times that each row's speed is measured")
    parser.add_argument("--steps", type=int, help="optimizer steps that count")
    parser.add_argument("--warmup", type=int, help="steps before them that do not")
    parser.add_argument("--batch_size", type=int, help="windows of an optimizer step")
    parser.add_argument("--accumulation", type=int, help="parts that each batch is computed in")
    parser.add_argument("--timed_batch_size", type=int, help="windows of a step where time to loss is measured")
    parser.add_argument("--time_to_loss", type=float, metavar="SECONDS", help="training time of each row; 0 for none")
    parser.add_argument("--equal_time", type=float, metavar="SECONDS", help="only that, at 4M parameters")
    parser.add_argument("--corpus", nargs="+", default=[PYTHON_DOCS], help="python-docs, tinyshakespeare, or a path")
    parser.add_argument("--seeds", type=int, default=1, help="of time to loss, counted from 0")
    parser.add_argument("--interval", type=float, help="seconds between points of a curve; a fifteenth of the time")
    parser.add_argument("--curve_bytes", type=int, default=30_000, help="held-out bytes that a curve is measured on")
    parser.add_argument("--heldout_bytes", type=int, help="of the final figure; 0, as with --equal_time, for all")
    parser.add_argument("--target_bits_per_byte", type=float, help="instead of where nanogpt-fp32 ends")
    parser.add_argument(
        "--ours_budgets", type=float, nargs="*", default=[], metavar="SECONDS", help="ours again with less time"
    )
    parser.add_argument("--ours", nargs="*", default=[], metavar="SETTING=VALUE", help="settings of our stage")
    parser.add_argument("--learning_rates", nargs="*", default=[], metavar="ROW=RATE", help="AdamW's of baselines")
    parser.add_argument("--dropout", type=float, default=0.0, help="GPT2LMHeadModel's; GPT2Config has 0.1")
    parser.add_argument("--lr_warmup", type=int, default=20, help="steps over which nanoGPT's loop raises the rate")
    parser.add_argument("--work", help="folder to keep corpora in; temporary by default")
    options = parser.parse_args(arguments)
    options.shape = options.shape or ("4m" if options.equal_time else "14m")
    for name, value in vars(DEFAULTS[options.shape]).items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if options.heldout_bytes is None:
        options.heldout_bytes = 0 if options.equal_time else 200_000
    options.rows = options.rows or list(EQUAL_TIME_ROWS if options.equal_time else SPEED_ROWS)
    return options


def make_request(options: argparse.Namespace, row: str, dataset_dir: Path, **more: Any) -> dict[str, Any]:
    """The request for one run of a row."""
    rates = LEARNING_RATES | {name: float(value) for name, value in parse_pairs(options.learning_rates).items()}
    return {
        "row": row,
        "shape": vars(SHAPES[options.shape]),
        "dataset_dir": str(dataset_dir),
        "batch_size": options.batch_size,
        "accumulation": options.accumulation,
        "warmup": options.warmup,
        "learning_rate": rates.get(row, rates[row.split("-")[0]]),
        "lr_warmup": options.lr_warmup,
        "dropout": options.dropout,
        "ours": parse_pairs(options.ours),
        **more,
    }


def measure_speed(options: argparse.Namespace, dataset_dir: Path, work: Path) -> list[dict[str, Any]]:
    """Each row `repeats` times in turn; a summary of each."""
    results: dict[str, list[dict[str, Any]]] = {row: [] for row in options.rows}
    for repeat in range(options.repeats):
        for row in options.rows:
            request = make_request(options, row, dataset_dir, steps=options.steps, seed=repeat)
            result = run_row(request, work)
            speed = Speed.of(result, options.warmup)
            result |= vars(speed)
            results[row].append(result)
            print(
                f"{row}, repeat {repeat + 1} of {options.repeats}: {speed.tokens_per_second:,.0f} tokens/s, "
                f"{speed.share_of_peak:.0%} of {max(result['peak_flops']) / 1e9:,.0f} GFLOP/s in bf16",
                flush=True,
            )
    return [summarise(row, found) for row, found in results.items()]


def summarise(row: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats of a row."""

    def median(name: str) -> float:
        return statistics.median(result[name] for result in found)

    return {
        "name": row,
        "tokens_per_second": median("tokens_per_second"),
        "share_of_peak": median("share_of_peak"),
        "peak_rss_bytes": max(result["peak_rss_bytes"] for result in found),
        "seconds_to_loss": None,
        "compile_seconds": median("compile_seconds"),
        "parameters": found[0]["parameters"],
        "flops_per_token": found[0]["flops_per_token"],
        "bf16_peak_flops": statistics.median(max(result["peak_flops"]) for result in found),
        "repeats": [result["tokens_per_second"] for result in found],
        "chosen": found[0].get("chosen"),
        "threads": found[0]["threads"],
    }


def expected_steps(options: argparse.Namespace, row: str, request: dict[str, Any], work: Path) -> int:
    """About how many steps a row takes in the request's time; `Trainer`'s schedule has to know."""
    if not row.endswith("-trainer"):
        return 0
    if row not in options.rates:
        result = run_row({**request, "seconds": 0, "steps": 3}, work)
        options.rates[row] = Speed.of(result, options.warmup).tokens_per_second
    tokens_per_step = request["batch_size"] * SHAPES[options.shape].context_length
    return max(1, int(request["seconds"] * options.rates[row] / tokens_per_step))


def run_timed(options: argparse.Namespace, corpus: str, seconds: float, work: Path) -> dict[str, Any]:
    """Each row for `seconds` of training and each seed, in turn; curves and final figures by row."""
    dataset_dir = prepare_corpus(corpus, tokenizer_size(options.shape), work)
    budgets = {f"ours ({budget:g} s)": budget for budget in options.ours_budgets} if "ours" in options.rows else {}
    plan = [(row, row, seconds) for row in options.rows] + [(name, "ours", budget) for name, budget in budgets.items()]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name, _, _ in plan}
    for seed in range(options.seeds):
        for name, row, budget in plan:
            request = make_request(
                options,
                row,
                dataset_dir,
                batch_size=options.timed_batch_size,
                seconds=budget,
                seed=seed,
                interval=options.interval or seconds / 15,
                curve_bytes=options.curve_bytes,
                heldout_bytes=options.heldout_bytes,
            )
            result = run_row({**request, "expected_steps": expected_steps(options, row, request, work)}, work)
            result |= vars(Speed.of(result, options.warmup))
            runs[name].append(result)
            tokens = result["steps"] * result["tokens_per_step"]
            print(
                f"{corpus}, {name}, seed {seed}: {result['bits_per_byte']:.3f} bits per byte after "
                f"{result['training_seconds']:.0f} s of training and {tokens / 1e6:.2f}M tokens",
                flush=True,
            )
    return compare(runs, corpus, options.target_bits_per_byte)


def compare(runs: dict[str, list[dict[str, Any]]], corpus: str, target: float | None) -> dict[str, Any]:
    """When each row comes to each baseline's final figure, seed by seed, on the text of the curves.

    Returns:
        `dict`: `corpus`; `rows` by name, each with `bits_per_byte`, `curves`, `seconds_to_loss` (the median over seeds
        of the time to the target, `None` with a `reason` if a seed never comes there) and `share_of_time`: for each
        baseline the time to its final figure over its own.
    """
    rows: dict[str, Any] = {}
    for name, found in runs.items():
        curves = [result["curve"] for result in found]
        row: dict[str, Any] = {
            "bits_per_byte": [result["bits_per_byte"] for result in found],
            "tokens": [result["steps"] * result["tokens_per_step"] for result in found],
            "tokens_per_second": statistics.median(result["tokens_per_second"] for result in found),
            "share_of_peak": statistics.median(result["share_of_peak"] for result in found),
            "chosen": found[0].get("chosen"),
            "curves": curves,
            "share_of_time": {},
        }
        for other, theirs in runs.items():
            ends = [result["curve"][-1] for result in theirs]
            times = [time_to(curve, end[1]) for curve, end in zip(curves, ends, strict=True)]
            if other.startswith("nanogpt") and None not in times:
                shares = [seconds / end[0] for seconds, end in zip(times, ends, strict=True)]
                row["share_of_time"][other] = statistics.median(shares)
        row["seconds_to_loss"], row["reason"] = seconds_to_loss(runs, curves, target)
        rows[name] = row
    return {"corpus": corpus, "rows": rows}


def seconds_to_loss(
    runs: dict[str, list[dict[str, Any]]], curves: list[Any], target: float | None
) -> tuple[float | None, str | None]:
    """The median time to the target, or `None` and why."""
    if target is None and REFERENCE not in runs:
        return None, f"no target: give --target_bits_per_byte, or the row {REFERENCE} whose end it would be"
    targets = [target] * len(curves) if target else [result["curve"][-1][1] for result in runs[REFERENCE]]
    times = [time_to(curve, goal) for curve, goal in zip(curves, targets, strict=True)]
    if None in times:
        missed = times.index(None)
        best = min(value for _, value in curves[missed])
        return None, f"seed {missed} came down to {best:.3f}, not to {targets[missed]:.3f} bits per byte in its time"
    return statistics.median(times), None


def tokenizer_size(shape: str) -> int:
    """Tokens of the tokenizer: of the model's vocabulary, but no more than a small corpus can fill."""
    return min(SHAPES[shape].vocab_size, 8192)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print the tables, write the JSON file."""
    options, begin = parse_options(arguments), time.monotonic()
    options.rates = {}
    found: dict[str, Any] = {"shape": options.shape, "rows": [], "time_to_loss": []}
    print(tables.describe(options, SHAPES[options.shape]), flush=True)
    with work_folder(options.work) as work:
        if not options.equal_time:
            dataset_dir = prepare_corpus(options.corpus[0], tokenizer_size(options.shape), work)
            found["rows"] = measure_speed(options, dataset_dir, work)
            options.rates |= {row["name"]: row["tokens_per_second"] for row in found["rows"]}
            print(tables.speed_table(found["rows"]), flush=True)
        seconds = options.equal_time or options.time_to_loss
        for corpus in options.corpus if seconds else []:
            timed = run_timed(options, corpus, seconds, work)
            found["time_to_loss"].append(timed)
            print(tables.time_table(timed, seconds), flush=True)
    fill_seconds_to_loss(found)
    if not seconds:
        print(f"seconds_to_loss is null: time to loss is not measured at {options.shape} without --time_to_loss")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{time.monotonic() - begin:.0f} s in all")
    return 0


def fill_seconds_to_loss(found: dict[str, Any]) -> None:
    """Put the first corpus's times into the rows; the runs of `--equal_time` become rows of their own.

    Those have no memory of training: their process evaluates too.
    """
    for timed in found["time_to_loss"][:1]:
        if not found["rows"]:
            names = ("tokens_per_second", "share_of_peak")
            found["rows"] = [
                {"name": name, **{field: row[field] for field in names}, "peak_rss_bytes": None}
                for name, row in timed["rows"].items()
            ]
        for row in found["rows"]:
            row["seconds_to_loss"] = timed["rows"][row["name"]]["seconds_to_loss"]


if __name__ == "__main__":
    sys.exit(main())
