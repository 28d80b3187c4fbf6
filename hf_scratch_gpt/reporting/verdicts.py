"""One line a stage: what it is judged by, before and after, with the interval, and whether it did its job."""

import dataclasses
from typing import Any

from hf_scratch_gpt.reporting.summary import ROAD

GOOD, NEUTRAL, BAD = "good", "neutral", "bad"


@dataclasses.dataclass(frozen=True)
class StageRow:
    """A row of the stage table; numbers that do not exist are `None`.

    Args:
        stage (`str`): Name of the stage.
        seconds (`float`): How long it took.
        measure (`str`): What it is judged by.
        before, after (`float`): The measure before and after the stage.
        interval (`list[float]`): 95% interval of `after`.
        before_interval (`list[float]`): 95% interval of `before`.
        scale (`tuple[float, float]`): Range in which to draw the measure; `None` if it is not drawn.
        chance (`float`): What guessing gives.
        verdict (`str`): In words.
        evidence (`str`): The interval that the verdict rests on, in words.
        state (`str`): `"good"`, `"neutral"` or `"bad"`.
        detail (`str`): Further figures, in words.
    """

    stage: str
    seconds: float
    measure: str = ""
    before: float | None = None
    after: float | None = None
    interval: list[float] | None = None
    before_interval: list[float] | None = None
    scale: tuple[float, float] | None = None
    chance: float | None = None
    verdict: str = ""
    evidence: str = ""
    state: str = NEUTRAL
    detail: str = ""


def percent(value: float) -> str:
    """A share as a percentage: 0.954 is `95%`, 0.004 is `0.4%`."""
    return f"{100 * value:.1f}%" if 0 < value < 0.0995 or 0.995 <= value < 1 else f"{100 * value:.0f}%"


def duration(seconds: float) -> str:
    """Seconds as people say them: `8.4 s`, `2 min 05 s`, `1 h 12 min`."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float) -> str:
    """A count with a unit: `4.10M`, `1.1M`, `920k`, `37`."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g}{unit}"
    return f"{value:.0f}"


def _tokenizer(stage: dict[str, Any]) -> dict[str, Any]:
    if "bytes_per_token" not in stage:
        return {}
    return {
        "measure": "bytes a token, held-out",
        "before": 1.0,
        "after": stage["bytes_per_token"],
        "verdict": f"{stage['bytes_per_token']:.2f}× shorter than bytes",
        "state": GOOD if stage["bytes_per_token"] > 1 else BAD,
        "detail": f"{stage['vocab_size']:,} tokens in the vocabulary" if "vocab_size" in stage else "",
    }


def _prepare(stage: dict[str, Any]) -> dict[str, Any]:
    if "train_tokens" not in stage:
        return {}
    heldout = f"{stage['heldout_documents']:,} held out" if "heldout_documents" in stage else ""
    return {
        "measure": "training tokens",
        "after": stage["train_tokens"],
        "verdict": f"{count(stage['train_tokens'])} tokens ready",
        "state": GOOD,
        "detail": ", ".join(
            part
            for part in (f"{stage['train_documents']:,} documents" if "train_documents" in stage else "", heldout)
            if part
        ),
    }


def _pretrain(stage: dict[str, Any], compression: dict[str, Any]) -> dict[str, Any]:
    if stage.get("objective") == "masked":
        return _pretrain_masked(stage)
    after, before = stage.get("heldout_bits_per_byte"), stage.get("random_init_bits_per_byte")
    if after is None:
        return {"measure": "held-out bits a byte", "verdict": "not measured"}
    # Compressors are rivals on the very same bytes only: a model may have been measured on a part of them.
    same_bytes = stage.get("heldout_bytes", compression.get("bytes")) == compression.get("bytes")
    rivals = {name: compression.get(f"{name}_bits_per_byte") for name in ("gzip", "xz") if same_bytes}
    beaten = [name for name, bits in rivals.items() if bits is not None and after < bits]
    unbeaten = [name for name, bits in rivals.items() if bits is not None and after >= bits]
    improved = before is not None and after < before
    words = f"beats {' and '.join(beaten)}" if beaten else "better than untrained" if improved else "learnt nothing"
    words += f", not yet {' and '.join(unbeaten)}" if beaten and unbeaten else ""
    told = _training_size(stage)
    told += [f"{name} {bits:.2f}" for name, bits in rivals.items() if bits is not None]
    return {
        "measure": "held-out bits a byte",
        "before": before,
        "after": after,
        "interval": stage.get("heldout_bits_per_byte_interval"),
        "scale": (0.0, max(before or 0.0, after, 1.0)),
        "verdict": words,
        "state": GOOD if improved else BAD,
        "detail": ", ".join(told),
    }


def _training_size(stage: dict[str, Any]) -> list[str]:
    told = [f"{count(stage['parameters'])} parameters"] if "parameters" in stage else []
    told += [f"{count(stage['tokens'])} tokens"] if "tokens" in stage else []
    return told + ([f"{stage['tokens_per_second']:,.0f} tokens/s"] if "tokens_per_second" in stage else [])


def _pretrain_masked(stage: dict[str, Any]) -> dict[str, Any]:
    """Judged against always predicting the most frequent token, which is what a model learns first."""
    after, interval = stage.get("heldout_masked_accuracy"), stage.get("heldout_masked_accuracy_interval")
    if after is None or interval is None:
        return {"measure": "masked tokens right, held-out", "verdict": "not measured"}
    guess = stage["unigram_masked_accuracy"]
    better = interval[0] > guess
    return {
        "measure": "masked tokens right, held-out",
        "before": stage.get("random_init_masked_accuracy"),
        "after": after,
        "interval": interval,
        "scale": (0.0, 1.0),
        "chance": guess,
        "verdict": f"most frequent token: {percent(guess)}" if better else "no better than the most frequent token",
        "state": GOOD if better else BAD,
        "detail": ", ".join(_training_size(stage)),
    }


def _change(gain: list[float] | None, mean: float | None) -> dict[str, str]:
    """What to say of a gain (of a share or a reward in 0..1): it is one only if its interval leaves zero out."""
    if gain is None or mean is None:
        return {}
    evidence = f"95%: {100 * gain[0]:+.1f} to {100 * gain[1]:+.1f}"
    points = f"{100 * abs(mean):.1f} points"
    if gain[0] > 0:
        return {"verdict": f"better by {points}", "state": GOOD, "evidence": evidence}
    if gain[1] < 0:
        return {"verdict": f"worse by {points}", "state": BAD, "evidence": evidence}
    return {"verdict": "no clear change", "state": NEUTRAL, "evidence": evidence}


def _sft(stage: dict[str, Any]) -> dict[str, Any]:
    if "heldout_exact_match" not in stage:
        return {"measure": "exact match, held-out", "verdict": "not evaluated"}
    told = [f"{stage['questions']} unseen questions"]
    if "base_few_shot_exact_match" in stage:
        told.append(f"base model shown examples {percent(stage['base_few_shot_exact_match'])}")
    return {
        "measure": "exact match, held-out",
        "before": stage.get("base_exact_match"),
        "before_interval": stage.get("base_exact_match_interval"),
        "after": stage["heldout_exact_match"],
        "interval": stage["heldout_exact_match_interval"],
        "scale": (0.0, 1.0),
        "chance": stage.get("chance_level"),
        **_change(stage.get("exact_match_gain_interval"), stage.get("exact_match_gain")),
        "detail": ", ".join(told),
    }


def _classify(stage: dict[str, Any]) -> dict[str, Any]:
    """Judged against always giving the most frequent label, which a classifier that learnt nothing does."""
    if "heldout_accuracy" not in stage:
        return {"measure": "texts labelled right, held-out", "verdict": "not measured"}
    low, high = stage["heldout_accuracy_interval"]
    guess = stage["majority_accuracy"]
    state = GOOD if low > guess else BAD if high < guess else NEUTRAL
    told = [f"{stage['heldout_examples']} held-out texts"]
    if "heldout_f1" in stage:
        of = "mean over the labels" if stage["f1_of"] == "macro" else f"'{stage['f1_of']}'"
        told.append(f"F1 {stage['heldout_f1']:.3f} ({of})")
    words = {GOOD: "better than", NEUTRAL: "not clearly better than", BAD: "worse than"}[state]
    return {
        "measure": "texts labelled right, held-out",
        "after": stage["heldout_accuracy"],
        "interval": stage["heldout_accuracy_interval"],
        "scale": (0.0, 1.0),
        "chance": guess,
        "verdict": f"{words} always '{stage['majority_label']}': {percent(guess)}",
        "state": state,
        "detail": ", ".join(told),
    }


def _reward(stage: dict[str, Any]) -> dict[str, Any]:
    if "heldout_accuracy" not in stage:
        return {"measure": "pairs ranked right, held-out", "verdict": "not measured"}
    low, high = stage.get("heldout_accuracy_interval") or (stage["heldout_accuracy"],) * 2
    state = GOOD if low > 0.5 else BAD if high < 0.5 else NEUTRAL
    return {
        "measure": "pairs ranked right, held-out",
        "after": stage["heldout_accuracy"],
        "interval": stage.get("heldout_accuracy_interval"),
        "scale": (0.0, 1.0),
        "chance": 0.5,
        "verdict": {GOOD: "above chance", NEUTRAL: "not above chance", BAD: "below chance"}[state],
        "state": state,
        "detail": f"{stage['heldout_pairs']} held-out pairs, guessing gives 50%",
    }


def _aligned(stage: dict[str, Any]) -> dict[str, Any]:
    if "gold_reward" not in stage:
        return {"measure": "gold reward, held-out", "verdict": "not evaluated"}
    told = [f"wins {percent(stage['win_rate_vs_sft'])} against sft"] if "win_rate_vs_sft" in stage else []
    told += [f"KL {stage['kl']:.2f} nats"] if "kl" in stage else []
    told += [f"{percent(stage['share_ended'])} ended"] if "share_ended" in stage else []
    return {
        "measure": "gold reward, held-out",
        "before": stage.get("sft_gold_reward"),
        "before_interval": stage.get("sft_gold_reward_interval"),
        "after": stage["gold_reward"],
        "interval": stage["gold_reward_interval"],
        "scale": (0.0, 1.0),
        **_change(stage.get("gold_gain_interval"), stage.get("gold_gain")),
        "detail": ", ".join(told),
    }


def _rlaif(stage: dict[str, Any]) -> dict[str, Any]:
    if "pairs" not in stage:
        return {}
    told = [f"{stage['answers']} answers to {stage['questions']} questions"]
    if "order_agreement" in stage:
        told.append(f"{percent(stage['order_agreement'])} alike in both orders")
    if "gold_agreement" in stage:
        told.append(f"{percent(stage['gold_agreement'])} as the checker has it")
    return {
        "measure": "preferences made",
        "after": stage["pairs"],
        "verdict": f"ranked by {stage['ranked_by']}",
        "state": GOOD,
        "detail": ", ".join(told),
    }


def _kto(stage: dict[str, Any]) -> dict[str, Any]:
    if "heldout_label_auc" not in stage:
        return {"measure": "answers told apart, held-out", "verdict": "not measured"}
    better = stage["heldout_label_auc"] > 0.5
    return {
        "measure": "answers told apart, held-out",
        "after": stage["heldout_label_auc"],
        "scale": (0.0, 1.0),
        "chance": 0.5,
        "verdict": "above chance" if better else "not above chance",
        "detail": f"{stage['heldout_answers']} held-out answers, guessing gives 50%",
    }


def _measured_itself(stage: dict[str, Any]) -> dict[str, Any]:
    """A stage that compared its policy with the start on held-out prompts; gold where these were questions."""
    if "heldout_gold" not in stage:
        return {"measure": "gold reward, held-out", "verdict": "not measured"}
    told = [f"{stage['heldout_prompts']} questions", f"KL {stage['heldout_kl']:.2f} nats"]
    told.append(f"{percent(stage['heldout_share_ended'])} ended")
    return {
        "measure": "gold reward, held-out",
        "before": stage["heldout_gold_start"],
        "before_interval": stage["heldout_gold_start_interval"],
        "after": stage["heldout_gold"],
        "interval": stage["heldout_gold_interval"],
        "scale": (0.0, 1.0),
        **_change(stage["heldout_gold_gain_interval"], stage["heldout_gold_gain"]),
        "detail": ", ".join(told),
    }


def _evaluate(stage: dict[str, Any]) -> dict[str, Any]:
    models = stage.get("models", {})
    return {
        "measure": "models compared",
        "after": len(models),
        "verdict": f"{stage['questions']} questions each" if "questions" in stage else "",
        "state": GOOD,
    }


def stage_rows(report: dict[str, Any]) -> list[StageRow]:
    """A row for each stage of a report that `make_report` made, in the order of the road."""
    stages = report["stages"]
    makers: dict[str, Any] = {
        "tokenizer": _tokenizer,
        "prepare": _prepare,
        "pretrain": lambda stage: _pretrain(stage, stages.get("prepare", {}).get("heldout_compression") or {}),
        "sft": _sft,
        "classify": _classify,
        "rlaif": _rlaif,
        "reward": _reward,
        "dpo": _aligned,
        "ppo": _aligned,
        "kto": _kto,
        **dict.fromkeys(("grpo", "rloo", "best_of_n", "iterate"), _measured_itself),
        "evaluate": _evaluate,
    }
    return [
        StageRow(name, stages[name]["stage_seconds"], **makers[name](stages[name])) for name in ROAD if name in stages
    ]
