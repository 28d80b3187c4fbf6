"""Know a model's loss before you pay for it: train a ladder of small models, predict a larger one's loss, check it.

    scratch-gpt scaling RECIPE --sizes 50k 110k 200k --budget 60

RECIPE is a recipe of `pretrain`; further `--field value` change it. Every size is the recipe's model at another width,
trained on the same number of tokens a parameter. The recipe's batch, warm-up and rates are those of the check run, a
model four times as large as the ladder's largest; the ladder's are scaled down from them. The prediction is written to
prediction.json before the check run starts. The same command continues what was interrupted. The prepared text should
be long enough for the check run to read it once, and what is held out of other groups than what is trained on
(`prepare --group_column`).
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_scratch_gpt.pretraining.ladder import COUNTS, parse_size, short_size
from hf_scratch_gpt.reporting.scaling_chart import law_chart
from hf_scratch_gpt.runs.command_line import CommandParser

PAGE = "scaling.html"
_FOLDER = "scaling"
_LEAST_STEPS = 200
_LEAST_SPAN = 2.5


def plan_text(plan: dict[str, Any]) -> str:
    """What will be trained, and how long that takes, as lines for the terminal."""
    ratio = plan["tokens_a_parameter"]
    lines = [
        f"scaling: {ratio:g} tokens a {plan['count']} parameter, seeds {', '.join(map(str, plan['seeds']))}",
        f"  {'':7}{plan['count'] + ' parameters':>25}{'all':>12}{'width':>7}{'steps':>8}{'expected':>11}",
    ]
    entries = [*(("ladder", entry) for entry in plan["ladder"]), ("check", plan["check"])]
    for name, entry in entries:
        lines.append(
            f"  {name:7}{entry['size']:>25,}{entry['parameters']:>12,}{entry['width']:>7,}{entry['steps']:>8,}"
            f"{entry['expected_seconds']:>9,.0f} s"
        )
    total = sum(entry["expected_seconds"] for _, entry in entries) / 60
    budget = "" if plan["budget_minutes"] is None else f" of {plan['budget_minutes']:g}"
    lines.append(f"  about {total:.1f} minutes{budget}, by speeds measured just now or when this was planned")
    if plan["left_out"]:
        lines.append(f"  left out, as they do not fit: {', '.join(short_size(size) for size in plan['left_out'])}")
    return "\n".join([*lines, *(f"  warning: {text}" for text in plan_warnings(plan))])


def plan_warnings(plan: dict[str, Any]) -> list[str]:
    """What of a plan makes its law doubtful, before anything is trained."""
    warnings = []
    sizes, tokens = [entry["size"] for entry in plan["ladder"]], plan["training_tokens"]
    epochs = plan["tokens_a_parameter"] * plan["check"]["size"] / tokens
    if epochs > 1:  # the smaller models see a part of the text once: what a repetition does is outside their law
        warnings.append(
            f"the check run sees its {tokens:,} tokens of text {epochs:.1f} times, and the ladder does not know what "
            "repetition does; prepare more text or take fewer tokens a parameter"
        )
    short = plan["ladder"][0]["steps"]
    if short < _LEAST_STEPS:
        warnings.append(
            f"the smallest model takes {short:,} optimizer steps, fewer than {_LEAST_STEPS}: it is hardly trained, "
            "and lies above its law; take more tokens a parameter, a smaller batch or larger sizes"
        )
    if max(sizes) < _LEAST_SPAN * min(sizes):
        warnings.append(
            f"the ladder's largest model has {max(sizes) / min(sizes):.1f} times the parameters of its smallest, less "
            f"than {_LEAST_SPAN:g}: the exponent is uncertain; take sizes that are further apart"
        )
    return warnings


def run_text(run: dict[str, Any]) -> str:
    """A finished run as a line."""
    return (
        f"  {short_size(run['size']):>7} seed {run['seed']}: {run['bits_per_byte']:.4f} bits per byte, "
        f"{run['nats_a_token']:.4f} nats a token, {run['seconds']:.0f} s"
    )


def prediction_text(prediction: dict[str, Any], path: Path) -> str:
    """The law and what it predicts, as lines."""
    law, check, target = prediction["law"], prediction["check"], prediction["target"]
    lines = [
        f"law: 1 / loss = 1 / ({law['coefficient']:.4g} x N^-{law['exponent']:.4f}) + 1 / {law['ceiling']:.4f}",
        f"  exponent 95% {law['exponent_low']:.4f} to {law['exponent_high']:.4f}; a run deviates by "
        f"{law['deviation']:.2%}",
    ]
    if law["backtest"] is not None:
        lines.append(f"  the smaller sizes alone miss the ladder's largest by {law['backtest']:+.2%}")
    plain = law["without_ceiling"]
    lines.append(
        f"  the plain power law would predict {plain['bits_per_byte']:.4f}; from it a run deviates by "
        f"{plain['deviation']:.2%}"
    )
    lines += [f"  warning: {text}" for text in prediction["warnings"]]
    lines.append(_predicted("prediction", check))
    if target is not None:
        lines.append(_predicted("target", target))
    if not prediction["made_before_check"]:
        lines.append("  note: the check run had begun when this was predicted")
    return "\n".join([*lines, f"  written to {path}"])


def _predicted(name: str, told: dict[str, Any]) -> str:
    return (
        f"{name}: {short_size(told['size'])} parameters, {told['extrapolation']:.2f} x the ladder's largest: "
        f"{told['bits_per_byte']:.4f} bits per byte (95% {told['low']:.4f} to {told['high']:.4f}), "
        f"{told['nats_a_token']:.4f} nats a token"
    )


def outcome_text(record: dict[str, Any]) -> str:
    """The check run against its prediction, as lines."""
    check, inside = record["check"], record["inside_interval"]
    return (
        f"outcome: {check['bits_per_byte']:.4f} bits per byte, {check['nats_a_token']:.4f} nats a token\n"
        f"error of the prediction: {record['error']:+.2%}, {'inside' if inside else 'OUTSIDE'} its interval"
    )


def make_page(folder: Path, record: dict[str, Any]) -> str:
    """The page as text, from the content of `scaling.json`."""
    from hf_scratch_gpt.pretraining.scaling import PowerLaw
    from hf_scratch_gpt.reporting.html import page_environment

    law = PowerLaw(*(record["prediction"]["law"][name] for name in ("coefficient", "exponent", "ceiling")))
    return (
        page_environment()
        .get_template("scaling.html.jinja")
        .render(folder=folder, record=record, chart=law_chart(record), law_loss=law.loss, short_size=short_size)
    )


def _make_parser() -> CommandParser:
    parser = CommandParser(
        prog="scratch-gpt scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("recipe", metavar="RECIPE", help="a recipe of pretrain: the model, its data, its learning rates")
    add(
        "--sizes",
        nargs="+",
        default=[],
        metavar="N",
        help="parameters of each model, such as 50k 100k 200k; default: 1/32, 1/16, 1/8 and 1/4 of the recipe's",
    )
    add(
        "--budget",
        type=float,
        metavar="MINUTES",
        help="what all of it may take: fewer tokens a parameter, then fewer sizes are taken",
    )
    add(
        "--tokens-per-parameter",
        type=float,
        metavar="K",
        help="the same for all models; default 20, or what --budget allows",
    )
    add("--seeds", type=int, default=2, metavar="K", help="runs of each size of the ladder (default 2)")
    add(
        "--count",
        choices=COUNTS,
        default=COUNTS[0],
        help="which parameters the law and --sizes count (default non-embedding)",
    )
    add(
        "--check-factor",
        type=float,
        default=4.0,
        metavar="F",
        help="size of the check run over the ladder's largest (default 4, at most 10)",
    )
    add(
        "--target",
        metavar="N",
        help="predict this size too, without training it; at most 10 times the ladder's largest",
    )
    add("--output-dir", metavar="DIR", help="folder of the ladder (default: `scaling` beside the recipe's output_dir)")
    return parser


def _read_request(arguments: Sequence[str]) -> Any:
    from hf_scratch_gpt.pretraining.arguments import PretrainArguments
    from hf_scratch_gpt.pretraining.scaling_run import LadderRequest
    from hf_scratch_gpt.runs import parse_arguments

    options, rest = _make_parser().parse_known_args(list(arguments))
    recipe = parse_arguments(PretrainArguments, [options.recipe, *rest], program="scratch-gpt scaling")
    recipe.check()
    sizes = tuple(parse_size(size) for text in options.sizes for size in text.split(",") if size)
    folder = Path(options.output_dir) if options.output_dir else Path(recipe.output_dir).parent / _FOLDER
    return LadderRequest(
        arguments=recipe,
        output_dir=folder,
        sizes=sizes,
        count=options.count,
        minutes=options.budget,
        tokens_a_parameter=options.tokens_per_parameter,
        seeds=options.seeds,
        check_factor=options.check_factor,
        target=None if options.target is None else parse_size(options.target),
    )


def main(arguments: Sequence[str]) -> int:
    """Entry point of `scratch-gpt scaling`.

    Raises:
        OSError, ValueError: for a request that cannot be served, a recipe that cannot be trained, or a ladder whose
            losses do not fall with size.
        Interrupted: if a signal stopped a run, after its checkpoint; the same command continues.
    """
    request = _read_request(arguments)

    from hf_scratch_gpt.pretraining.distributed import launched_processes
    from hf_scratch_gpt.pretraining.scaling_run import PREDICTION, Ladder
    from hf_scratch_gpt.runs import write_text
    from hf_scratch_gpt.runs.hardware import keep_freed_memory

    if launched_processes() > 1:
        raise ValueError(f"scaling: launched as {launched_processes()} processes; its models are small: launch one")
    keep_freed_memory()
    ladder = Ladder(request)
    plan = ladder.plan()
    print(plan_text(plan), flush=True)
    runs = []
    for entry in plan["ladder"]:
        for seed in plan["seeds"]:
            runs.append(ladder.train(plan, entry, seed))
            print(run_text(runs[-1]), flush=True)
    prediction = ladder.predict(plan, runs)
    print(prediction_text(prediction, ladder.folder / PREDICTION), flush=True)
    check = ladder.train(plan, plan["check"], plan["seeds"][0], prefix="check-")
    record = ladder.finish(plan, runs, prediction, check)
    print(outcome_text(record))
    print(f"page: {write_text(ladder.folder / PAGE, make_page(ladder.folder, record))}")
    return 0
