"""`report.html`: one file that shows what each stage did. No request leaves it, and all text in it is escaped."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_scratch_gpt.reporting import charts
from hf_scratch_gpt.reporting.reward_kl import reward_kl_charts
from hf_scratch_gpt.reporting.summary import StageFolder, find_stages, model_names
from hf_scratch_gpt.reporting.table import figure
from hf_scratch_gpt.reporting.verdicts import count, duration, percent, stage_rows
from hf_scratch_gpt.runs import read_json
from hf_scratch_gpt.runs.folder import CURVE

_TEMPLATES = Path(__file__).parent / "templates"
# Curves worth showing: key of curve.jsonl, title, and whether it is a share (shown as such).
_CURVES = {
    "pretrain": (("loss", "Loss (nats a token)"), ("tokens_per_second", "Speed (tokens a second)")),
    "sft": (("loss", "Loss (nats a token)"), ("mean_token_accuracy", "Answer tokens predicted")),
    "classify": (("loss", "Loss (nats a text)"),),
    "reward": (("loss", "Loss"), ("accuracy", "Pairs ranked right (training)"), ("margin", "Margin")),
    "dpo": (("loss", "Loss"), ("rewards/accuracies", "Pairs ranked right (training)"), ("rewards/margins", "Margin")),
    "ppo": (
        ("reward", "Reward (learnt, normalised)"),
        ("kl", "KL from SFT (nats an answer)"),
        ("share_ended", "Share of answers ended"),
    ),
}
_X_AXES = (("episodes", "episodes"), ("tokens", "tokens"), ("step", "steps"))
_STAGE_COLOURS = {
    "pretrain": "var(--c0)",
    "sft": "var(--c1)",
    "classify": "var(--c4)",
    "reward": "var(--c4)",
    "dpo": "var(--c2)",
    "ppo": "var(--c3)",
}
_TITLES = {
    "pretrain": "Pretraining",
    "sft": "Instruction tuning (SFT)",
    "classify": "Classification",
    "reward": "Reward model",
    "dpo": "Direct preference optimisation (DPO)",
    "ppo": "Reinforcement learning (PPO)",
}


def read_curve(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `curve.jsonl`; none if there is no such file."""
    path = folder / CURVE
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {len(rows) + 1}: not valid JSON ({error.msg})") from error
    return rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def curve_charts(runs: dict[str, StageFolder]) -> list[dict[str, Any]]:
    """For each training stage its title and charts: a heading, the last value, and the SVG."""
    told = []
    for stage, wanted in _CURVES.items():
        if stage not in runs:
            continue
        rows = read_curve(runs[stage].folder)
        shown = []
        for key, title in wanted:
            usable = [row for row in rows if _is_number(row.get(key))]
            x_key, x_label = next(
                (axis for axis in _X_AXES if usable and all(_is_number(row.get(axis[0])) for row in usable)),
                _X_AXES[-1],
            )
            points = [(float(row[x_key]), float(row[key])) for row in usable]
            svg = charts.line_chart(points, title, x_label, _STAGE_COLOURS[stage])
            if svg:
                shown.append({"title": title, "first": points[0][1], "last": points[-1][1], "svg": svg})
        if stage == "ppo":
            shown += reward_kl_charts(runs[stage].folder, _STAGE_COLOURS[stage])
        if shown:
            told.append({"stage": stage, "title": _TITLES[stage], "charts": shown})
    return told


def table_rows(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The stage table's rows with their marks drawn."""
    told = []
    for row in stage_rows(report):
        mark = ""
        if row.scale is not None and row.after is not None:
            mark = charts.interval_mark(
                row.after, row.interval, row.before, row.before_interval, row.scale, row.chance
            )
        interval = row.interval if row.interval and None not in row.interval else None
        told.append({"row": row, "mark": mark, "interval": interval})
    return told


def headline(report: dict[str, Any]) -> list[dict[str, Any]]:
    """The few numbers that somebody sees first: label, value, and what it is to be compared with."""
    stages, cards = report["stages"], []

    def add(label: str, before: str, after: str, note: str) -> None:
        cards.append({"label": label, "before": before, "after": after, "note": note})

    pretrain, sft = stages.get("pretrain", {}), stages.get("sft", {})
    compression = stages.get("prepare", {}).get("heldout_compression") or {}
    if "heldout_bits_per_byte" in pretrain:
        rivals = [f"{name} −9: {compression[f'{name}_bits_per_byte']:.2f}" for name in ("gzip", "xz") if compression]
        before = pretrain.get("random_init_bits_per_byte")
        add(
            "Bits a byte of unseen text",
            "" if before is None else f"{before:.2f}",
            f"{pretrain['heldout_bits_per_byte']:.2f}",
            ", ".join(rivals) or "less is better",
        )
    if "heldout_masked_accuracy" in pretrain:
        add(
            "Masked tokens of unseen text filled in",
            percent(pretrain["random_init_masked_accuracy"]),
            percent(pretrain["heldout_masked_accuracy"]),
            f"always the most frequent token: {percent(pretrain['unigram_masked_accuracy'])}",
        )
    if "heldout_exact_match" in sft:
        before = sft.get("base_exact_match")
        add(
            "Unseen questions answered exactly",
            "" if before is None else percent(before),
            percent(sft["heldout_exact_match"]),
            f"after tuning; guessing gives {percent(sft['chance_level'])}",
        )
    classify = stages.get("classify", {})
    if "heldout_accuracy" in classify:
        note = f"{classify['heldout_examples']} texts; always '{classify['majority_label']}' gives"
        note += f" {percent(classify['majority_accuracy'])}"
        add("Unseen texts labelled right", "", percent(classify["heldout_accuracy"]), note)
    reward = stages.get("reward", {})
    if "heldout_accuracy" in reward:
        note = f"by the reward model, {reward['heldout_pairs']} unseen pairs; guessing gives 50%"
        add("Preferences ranked right", "", percent(reward["heldout_accuracy"]), note)
    for stage in ("dpo", "ppo"):
        told = stages.get(stage, {})
        if "gold_reward" in told:
            before = told.get("sft_gold_reward")
            notes = [f"wins {percent(told['win_rate_vs_sft'])} against SFT"] if "win_rate_vs_sft" in told else []
            notes += [f"KL {told['kl']:.2f}"] if "kl" in told else []
            add(
                f"Gold reward after {stage.upper()}",
                "" if before is None else f"{before:.2f}",
                f"{told['gold_reward']:.2f}",
                ", ".join(notes),
            )
    return cards


def tokenizer_part(runs: dict[str, StageFolder], report: dict[str, Any]) -> dict[str, Any] | None:
    """Statistics of the tokenizer, and how the model compares with gzip and xz on held-out text."""
    told: dict[str, Any] = {"facts": [], "histogram": "", "longest": []}
    if "tokenizer" in runs:
        metrics = runs["tokenizer"].metrics
        sizes = metrics.get("token_bytes_histogram") or {}
        counts = [(size, float(number)) for size, number in sorted(sizes.items(), key=lambda item: int(item[0]))]
        # A few very long tokens (lines of dashes) would press all other bars together.
        long = [(int(size), number) for size, number in counts if int(size) > 20]
        shown = [(size, number) for size, number in counts if int(size) <= 20]
        shown += [("21+", sum(number for _, number in long))] if long else []
        told = {
            "facts": [
                ("tokens in the vocabulary", f"{metrics['vocab_size']:,}" if "vocab_size" in metrics else ""),
                ("bytes a token", f"{metrics['bytes_per_token']:.2f}" if "bytes_per_token" in metrics else ""),
                (
                    "of the vocabulary used",
                    percent(metrics["vocabulary_used"]) if "vocabulary_used" in metrics else "",
                ),
            ],
            "histogram": charts.histogram(shown, "bytes a token", "var(--c1)"),
            "longest": metrics.get("longest_tokens", [])[:24],
        }
    pretrain = report["stages"].get("pretrain", {})
    compression = report["stages"].get("prepare", {}).get("heldout_compression") or {}
    rows = [
        ("untrained model", pretrain.get("random_init_bits_per_byte"), "var(--c0)"),
        ("gzip −9", compression.get("gzip_bits_per_byte"), "var(--muted)"),
        ("xz −9", compression.get("xz_bits_per_byte"), "var(--muted)"),
        ("trained model", pretrain.get("heldout_bits_per_byte"), "var(--c1)"),
    ]
    told["compression"] = charts.bars([(label, bits, colour) for label, bits, colour in rows if bits is not None], 3)
    told["compression_bytes"] = compression.get("bytes")
    return told if any(told.values()) else None


def family_part(runs: dict[str, StageFolder]) -> dict[str, Any] | None:
    """Exact match of each family by each model, with the number of questions and the chance level."""
    if "evaluate" not in runs:
        return None
    metrics = runs["evaluate"].metrics
    models = metrics.get("models", {})
    rows: list[dict[str, Any]] = []
    for family, told in metrics.get("families", {}).items():
        cells = [models[name]["exact_match_by_family"].get(family) for name in models]
        rows.append({"name": family, "questions": told["questions"], "chance": told["chance_level"], "cells": cells})
    rows.sort(key=lambda row: -max((cell["mean"] for cell in row["cells"] if cell), default=0.0))
    totals = [told["exact_match"] for told in models.values()]
    few_shot = [told.get("few_shot_exact_match") for told in models.values()]
    return {
        "models": list(models),
        "rows": rows,
        "totals": totals,
        "few_shot": few_shot if any(few_shot) else None,
        "questions": metrics.get("questions"),
        "chance": metrics.get("chance_level"),
    }


def model_part(runs: dict[str, StageFolder]) -> list[dict[str, Any]]:
    """All that was measured of each model, for the table of models."""
    if "evaluate" not in runs:
        return []
    return [{"name": name, **told} for name, told in runs["evaluate"].metrics.get("models", {}).items()]


def visible(text: str) -> str:
    """A token with its white space shown: `␣`, `⏎`, `⇥`; long runs are cut."""
    shown = text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
    return shown if len(shown) <= 34 else f"{shown[:30]}… ({len(shown)})"


def _optional_json(runs: dict[str, StageFolder], name: str) -> Any:
    path = runs["evaluate"].folder / name if "evaluate" in runs else None
    return read_json(path) if path is not None and path.is_file() else None


def page_environment() -> Any:
    """The jinja2 environment of all pages: all text is escaped, and an unknown name is an error."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Callable[..., Any]] = {
        "figure": figure,
        "percent": percent,
        "duration": duration,
        "count": count,
        "visible": visible,
    }
    environment.filters.update(filters)
    return environment


def taught_by_the_checker(stages: dict[str, Any]) -> list[str]:
    """The alignment methods that the checker's verdicts on training questions took part in: a reader has to know."""
    taught = []
    if stages.get("dpo", {}).get("preferences") == "own answers":
        taught.append("DPO")
    if stages.get("ppo", {}).get("checker_weight"):
        taught.append("PPO")
    return taught


def make_html(root: str | Path, report: dict[str, Any]) -> str:
    """The page as text, from a report that `make_report` made and the files of the run folders below `root`."""
    runs = find_stages(root)
    names = model_names(runs)
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            report=report,
            stages=report["stages"],
            cards=headline(report),
            rows=table_rows(report),
            curves=curve_charts(runs),
            tokenizer=tokenizer_part(runs, report),
            families=family_part(runs),
            models=model_part(runs),
            taught=taught_by_the_checker(report["stages"]),
            reference=report["stages"].get("evaluate", {}).get("reference"),
            stage_of={name: stage for stage, name in names.items()},
            samples=_optional_json(runs, "samples.json") or [],
            attention=_optional_json(runs, "attention.json"),
        )
    )
