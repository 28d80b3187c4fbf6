"""`report.json`: what each stage of a road measured, gathered from the run folders below one root.

Nothing is computed anew and nothing is invented: a stage that was not run is absent, and so is a figure that no stage
measured. Figures on held-out questions come from the stage `evaluate`, which asks all models the same.
"""

import dataclasses
from pathlib import Path
from typing import Any

from hf_scratch_gpt.runs import read_metrics
from hf_scratch_gpt.runs.hardware import peak_rss_bytes
from hf_scratch_gpt.runs.identity import METRICS

# The stages in the order of the road.
ROAD = (
    *("tokenizer", "prepare", "pretrain", "sft", "classify", "rlaif", "reward", "dpo", "ppo"),
    *("kto", "grpo", "rloo", "best_of_n", "iterate", "evaluate"),
)
MODEL_STAGES = ("pretrain", "sft", "dpo", "ppo")
# What a model is called in the evaluation if its run cannot be told by its id.
_USUAL_NAMES = {"pretrain": "base"}
# What a stage measures of its own policy's answers to held-out prompts.
_HELD_OUT = (
    "heldout_gold",
    "heldout_gold_interval",
    "heldout_gold_start",
    "heldout_gold_start_interval",
    "heldout_gold_gain",
    "heldout_gold_gain_interval",
    "heldout_prompts",
    "heldout_kl",
    "heldout_share_ended",
)
# Figures that are copied from a stage's own metrics as they are.
_COPIED = {
    "rlaif": ("ranked_by", "questions", "answers", "pairs", "order_agreement", "gold_agreement", "gold_pairs"),
    "kto": ("labels", "answers", "steps", "beta", "heldout_label_auc", "heldout_answers"),
    "grpo": ("checker_weight", "steps", "episodes", "reward_start", "reward_end", *_HELD_OUT),
    "rloo": ("checker_weight", "steps", "episodes", "reward_start", "reward_end", *_HELD_OUT),
    "best_of_n": ("questions", "answers", "answers_per_question", "chosen", "heldout_by_n", "steps", *_HELD_OUT),
    "iterate": ("rounds", "best_round", "last_round_raised_gold", *_HELD_OUT),
    "tokenizer": ("vocab_size", "bytes_per_token", "characters_per_token", "heldout_bytes", "vocabulary_used"),
    "prepare": (
        "train_tokens",
        "train_documents",
        "train_bytes",
        "heldout_tokens",
        "heldout_documents",
        "heldout_bytes",
    ),
    "pretrain": (
        "parameters",
        "tokens",
        "steps",
        "seconds",
        "tokens_per_second",
        "compile_seconds",
        "precision",
        "compiled",
        "optimizer",
        "train_loss",
        "heldout_bits_per_byte",
        "heldout_bits_per_byte_interval",
        "random_init_bits_per_byte",
        "heldout_bytes",
        "objective",
        "heldout_masked_accuracy",
        "heldout_masked_accuracy_interval",
        "unigram_masked_accuracy",
        "random_init_masked_accuracy",
        "heldout_masked_loss",
        "heldout_masked_tokens",
    ),
    "sft": ("examples", "steps", "tokens", "last_train_loss", "heldout_loss", "heldout_token_accuracy"),
    "classify": (
        "examples",
        "steps",
        "tokens",
        "heldout_accuracy",
        "heldout_accuracy_interval",
        "heldout_examples",
        "heldout_f1",
        "heldout_f1_interval",
        "f1_of",
        "majority_accuracy",
        "majority_label",
    ),
    "reward": (
        "pairs",
        "steps",
        "heldout_accuracy",
        "heldout_accuracy_interval",
        "heldout_pairs",
        "heldout_margin",
        "length_correlation",
    ),
    "dpo": (
        "preferences",
        "pairs",
        "steps",
        "beta",
        "preference_accuracy",
        "preference_accuracy_interval",
        "heldout_margin",
    ),
    "ppo": (
        "checker_weight",
        "steps",
        "episodes",
        "reward_start",
        "reward_end",
        "kl",
        "share_ended",
        "response_length",
    ),
}


@dataclasses.dataclass(frozen=True)
class StageFolder:
    """A finished run: its folder and the content of its `metrics.json`."""

    folder: Path
    report: dict[str, Any]

    @property
    def metrics(self) -> dict[str, Any]:
        """What the stage itself measured."""
        return self.report.get("metrics", {})


def find_stages(root: str | Path) -> dict[str, StageFolder]:
    """The finished stages in folders directly below `root`, by the stage they name, in the order of the road.

    Of several runs of one stage the one that finished last counts. Folders that a newer run has set aside (`*.old`)
    and hidden ones are passed over.
    """
    found: dict[str, StageFolder] = {}
    folders = [path.parent for path in sorted(Path(root).glob(f"*/{METRICS}"))]
    for folder in folders:
        if folder.name.startswith(".") or folder.name.endswith(".old"):
            continue
        candidate = StageFolder(folder, read_metrics(folder))
        stage = candidate.report.get("stage")
        known = found.get(str(stage))
        if known is None or candidate.report.get("finished_at", "") >= known.report.get("finished_at", ""):
            found[str(stage)] = candidate
    return {stage: found[stage] for stage in ROAD if stage in found}


def model_names(stages: dict[str, StageFolder]) -> dict[str, str]:
    """For each stage that made a model, what the evaluation calls it; stages that it did not measure are absent."""
    if "evaluate" not in stages:
        return {}
    evaluation = stages["evaluate"]
    names = list(evaluation.metrics.get("models", {}))
    inputs = evaluation.report.get("inputs", {}).get("models", [])
    run_ids = {entry.get("run_id"): name for entry, name in zip(inputs, names, strict=False) if entry.get("run_id")}
    found = {}
    for stage in MODEL_STAGES:
        if stage not in stages:
            continue
        usual = _USUAL_NAMES.get(stage, stage)
        name = run_ids.get(stages[stage].report["run_id"])
        if name is None and usual in names and usual not in run_ids.values():
            name = usual
        if name is not None:
            found[stage] = name
    return found


def _ends(interval: dict[str, Any]) -> list[float]:
    return [interval["low"], interval["high"]]


def _put(target: dict[str, Any], name: str, interval: dict[str, Any] | None) -> None:
    """Store an interval's mean under `name` and its ends beside it."""
    if interval is not None:
        target[name] = interval["mean"]
        target[f"{name}_interval"] = _ends(interval)


def _copied(stage: str, run: StageFolder) -> dict[str, Any]:
    values = {name: run.metrics[name] for name in _COPIED.get(stage, ()) if run.metrics.get(name) is not None}
    return {"stage_seconds": run.report["seconds"], "folder": run.folder.name, **values}


def _add_tuning(target: dict[str, Any], metrics: dict[str, Any], names: dict[str, str]) -> None:
    models = metrics["models"]
    tuned = models[names["sft"]]
    _put(target, "heldout_exact_match", tuned["exact_match"])
    _put(target, "few_shot_exact_match", tuned.get("few_shot_exact_match"))
    target["questions"] = metrics["questions"]
    target["chance_level"] = metrics["chance_level"]
    if "pretrain" in names:
        base = models[names["pretrain"]]
        _put(target, "base_exact_match", base["exact_match"])
        _put(target, "base_few_shot_exact_match", base.get("few_shot_exact_match"))
        versus = base.get("versus_reference")
        if versus and metrics.get("reference") == names["sft"]:
            difference = versus["exact_difference"]  # the base model minus the tuned one
            target["exact_match_gain"] = -difference["mean"]
            target["exact_match_gain_interval"] = [-difference["high"], -difference["low"]]


def _add_alignment(target: dict[str, Any], metrics: dict[str, Any], name: str, reference: str | None) -> None:
    """Gold reward and win rate of an aligned model against the tuned one, on sampled answers if there are any."""
    models = metrics["models"]
    ours = models[name]
    sampled = "sampled_gold_reward" in ours
    prefix = "sampled_" if sampled else ""
    target["gold_reward_of"] = (
        f"answers sampled at temperature {metrics['temperature']:g}" if sampled else "greedy answers"
    )
    _put(target, "gold_reward", ours[f"{prefix}gold_reward"])
    _put(target, "greedy_gold_reward", ours["gold_reward"])
    _put(target, "exact_match", ours["exact_match"])
    _put(target, "share_ended", ours[f"{prefix}share_ended"])
    _put(target, "kl", ours.get("kl"))
    target["questions"] = metrics["questions"]
    if reference is None or reference != metrics.get("reference") or "versus_reference" not in ours:
        return
    theirs, versus = models[reference], ours["versus_reference"]
    _put(target, "sft_gold_reward", theirs[f"{prefix}gold_reward"])
    _put(target, "sft_greedy_gold_reward", theirs["gold_reward"])
    _put(target, "sft_exact_match", theirs["exact_match"])
    _put(target, "gold_gain", versus[f"{prefix}gold_difference"])
    _put(target, "greedy_gold_gain", versus["gold_difference"])
    _put(target, "win_rate_vs_sft", versus[f"{prefix}win_rate"])
    target["ties_vs_sft"] = versus[f"{prefix}ties"]
    if "preference_accuracy" not in target:
        _put(target, "preference_accuracy", versus.get("preference_accuracy"))


def _add_evaluation(stages: dict[str, Any], runs: dict[str, StageFolder]) -> None:
    metrics, names = runs["evaluate"].metrics, model_names(runs)
    if "sft" in names:
        _add_tuning(stages["sft"], metrics, names)
    for stage in ("dpo", "ppo"):
        if stage in names:
            _add_alignment(stages[stage], metrics, names[stage], names.get("sft"))
    accuracy = metrics.get("reward_model")
    if accuracy and "reward" in stages and "heldout_accuracy" not in stages["reward"]:
        _put(stages["reward"], "heldout_accuracy", accuracy["accuracy"])
        stages["reward"]["heldout_pairs"] = accuracy["pairs"]
    for name in ("questions", "samples_per_prompt", "temperature", "chance_level", "reference"):
        if name in metrics:
            stages["evaluate"][name] = metrics[name]
    stages["evaluate"]["models"] = names


def make_report(root: str | Path, wall_seconds: float) -> dict[str, Any]:
    """Gather the stages below `root` into what `report.json` says.

    Args:
        root (`str` or `Path`): Folder whose sub-folders are run folders.
        wall_seconds (`float`): Seconds that the whole road took.

    Returns:
        `dict`: `stages` by name, `wall_seconds`, `peak_rss_bytes` (the largest of any stage) and `environment`.

    Raises:
        FileNotFoundError: if there is no finished run below `root`.
        ValueError: if a `metrics.json` is damaged.
    """
    runs = find_stages(root)
    if not runs:
        raise FileNotFoundError(f"{root}: no finished run below it, so there is nothing to report")
    stages: dict[str, Any] = {stage: _copied(stage, run) for stage, run in runs.items()}
    compression = runs["prepare"].metrics.get("heldout_compression") if "prepare" in runs else None
    if compression:
        stages["prepare"]["heldout_compression"] = compression
    if "reward" in stages:
        stages["reward"]["chance_level"] = 0.5
    if "reward_start" in stages.get("ppo", {}):
        weight = stages["ppo"].get("checker_weight")
        checked = f" plus {weight:g} times the checker's verdict" if weight else ""
        stages["ppo"]["reward_start_and_end_of"] = (
            f"learnt reward, normalised,{checked} of answers sampled to training prompts"
        )
    if "evaluate" in runs:
        _add_evaluation(stages, runs)
    newest = max(runs.values(), key=lambda run: run.report.get("finished_at", ""))
    return {
        "stages": stages,
        "wall_seconds": wall_seconds,
        "peak_rss_bytes": max(peak_rss_bytes(), *(run.report.get("peak_rss_bytes", 0) for run in runs.values())),
        "finished_at": newest.report.get("finished_at"),
        "environment": newest.report.get("environment", {}),
    }
