"""The parts of a card that tell what a model can do: its stage's own measures, the evaluation's, and what follows."""

import math
from typing import Any

from hf_scratch_gpt.reporting.card_making import tasks_of
from hf_scratch_gpt.reporting.ledger import Ledger, look_up
from hf_scratch_gpt.reporting.lineage import Lineage, Run, last_part

ALIGNED = ("dpo", "ppo", "kto", "grpo", "rloo", "best_of_n")
_SHARE = "{:.3f}"
# What each stage measures itself: key of its metrics (its interval is `KEY_interval`), label, key and unit of the
# sample's size, and the key of the same before training.
_OWN: dict[str, tuple[tuple[str, str, str, str, str | None], ...]] = {
    "pretrain": (
        (
            *(
                "heldout_bits_per_byte",
                "bits a byte of held-out text",
                "heldout_documents",
                "documents, {heldout_bytes} bytes",
            ),
            "random_init_bits_per_byte",
        ),
    ),
    "masked": (
        (
            *("heldout_masked_accuracy", "masked tokens of held-out text filled in rightly", "heldout_masked_tokens"),
            *("masked tokens", "random_init_masked_accuracy"),
        ),
    ),
    "sft": (
        ("heldout_loss", "loss on held-out answers, nats a token", "heldout_examples", "answers", None),
        ("heldout_token_accuracy", "tokens of held-out answers predicted", "heldout_examples", "answers", None),
    ),
    "classify": (
        ("heldout_accuracy", "held-out texts labelled rightly", "heldout_examples", "texts", None),
        ("heldout_f1", "harmonic mean of precision and recall on held-out texts", "heldout_examples", "texts", None),
    ),
    "reward": (("heldout_accuracy", "held-out pairs ranked rightly", "heldout_pairs", "pairs", None),),
    "dpo": (("preference_accuracy", "held-out pairs preferred rightly", "heldout_pairs", "pairs", None),),
}
# What `evaluate` measures of a model, in the order of the table.
_MEASURES = {
    "exact_match": "questions answered exactly, greedy",
    "few_shot_exact_match": "the same, shown solved examples",
    "gold_reward": "gold reward, greedy",
    "share_ended": "answers that end by themselves, greedy",
    "sampled_exact_match": "questions answered exactly, sampled",
    "sampled_gold_reward": "gold reward, sampled",
    "sampled_share_ended": "answers that end by themselves, sampled",
    "reward": "reward model's score, sampled",
    "kl": "divergence from the model that it is compared with, nats an answer, sampled",
    "bits_per_byte": "bits a byte of held-out text",
}
_DIFFERENCES = {
    "exact_difference": "questions answered exactly, greedy",
    "gold_difference": "gold reward, greedy",
    "sampled_gold_difference": "gold reward, sampled",
}
_OPTIONAL = ("few_shot_exact_match", "kl", "reward", "bits_per_byte")


def own_kind(run: Run) -> str:
    """The stage, or `"masked"` for a masked language model."""
    masked = run.stage == "pretrain" and run.report.get("metrics", {}).get("objective") == "masked"
    return "masked" if masked else run.stage


def own_rows(run: Run, ledger: Ledger) -> list[dict[str, str]]:
    """What the model's own stage measured on held-out material: label, before, value, interval, sample."""
    rows = []
    for key, label, size, unit, before in _OWN.get(own_kind(run), ()):
        if key == "heldout_f1" and key not in run.report.get("metrics", {}):
            continue  # no held-out text is of that label, nor was one taken for it
        rows.append(
            {
                "label": label,
                "before": ledger.number(run.metrics, "metrics", before, form=_SHARE) if before else "",
                "value": ledger.number(run.metrics, "metrics", key, form=_SHARE),
                "interval": ledger.interval(run.metrics, "metrics", f"{key}_interval"),
                "sample": f"{ledger.number(run.metrics, 'metrics', size)} {_with_bytes(unit, run, ledger)}",
            }
        )
    return rows


def _with_bytes(unit: str, run: Run, ledger: Ledger) -> str:
    mark = "{heldout_bytes}"
    return unit.replace(mark, ledger.number(run.metrics, "metrics", "heldout_bytes")) if mark in unit else unit


def own_remarks(lineage: Lineage, ledger: Ledger) -> list[str]:
    """What helps to read the stage's own measures: what guessing, compressors or length alone would give."""
    run, kind = lineage.run, own_kind(lineage.run)
    metrics = run.report.get("metrics", {})
    if kind == "masked":
        guess = ledger.number(run.metrics, "metrics", "unigram_masked_accuracy", form=_SHARE)
        return [f"Always filling in the most frequent token gives {guess}."]
    if kind == "classify":
        guess = ledger.number(run.metrics, "metrics", "majority_accuracy", form=_SHARE)
        told_of = "means over all labels"
        if metrics.get("f1_of") != "macro":
            told_of = f"those of the label '{ledger.text(run.metrics, 'metrics', 'f1_of')}'"
        label = ledger.text(run.metrics, "metrics", "majority_label")
        told = [f"Always giving the most frequent label, '{label}', is right on {guess}."]
        return [*told, *([f"Precision and recall are {told_of}."] if "heldout_f1" in metrics else [])]
    if kind == "reward":
        chance = ledger.number(run.metrics, "metrics", "chance", form=_SHARE)
        told = [f"Guessing gives {chance}."]
        if metrics.get("length_correlation") is not None:
            correlation = ledger.number(run.metrics, "metrics", "length_correlation", form="{:+.3f}")
            told.append(f"Its score's correlation with an answer's length is {correlation}.")
        return told
    rivals = _rivals(lineage, ledger) if kind == "pretrain" else []
    return [f"For the same bytes {' and '.join(rivals)}."] if rivals else []


def _rivals(lineage: Lineage, ledger: Ledger) -> list[str]:
    heldout_bytes = lineage.run.report.get("metrics", {}).get("heldout_bytes")
    for run in lineage.runs:
        compression = run.report.get("metrics", {}).get("heldout_compression")
        if run.stage == "prepare" and compression and compression.get("bytes") == heldout_bytes:
            keys = ("metrics", "heldout_compression")
            return [
                f"`{name}` at its best needs {ledger.number(run.metrics, *keys, f'{name}_bits_per_byte', form=_SHARE)}"
                for name in ("gzip", "xz")
            ]
    return []


class Evaluated:
    """A model in the stage `evaluate`: what it is called there, and what it is compared with.

    Args:
        evaluation (`Run`): The evaluation.
        lineage (`Lineage`): The model's.
        ledger (`Ledger`): Takes the figures.
    """

    def __init__(self, evaluation: Run, lineage: Lineage, ledger: Ledger):
        self.run, self.record, self.ledger = evaluation, evaluation.metrics, ledger
        self.metrics = evaluation.report.get("metrics", {})
        self.models: dict[str, Any] = self.metrics.get("models", {})
        ids = [entry.get("run_id") for setting, entry in evaluation.inputs() if setting == "models"]
        self.names = dict(zip(ids, self.models, strict=False))
        self.name = self.names.get(lineage.run.run_id)
        reference = self.metrics.get("reference")
        # The reference itself is compared with the model that it was tuned from.
        self.negated = self.name == reference
        parents = [entry.get("run_id") for setting, entry in lineage.run.inputs() if setting == "model_name_or_path"]
        other = self.names.get(parents[0]) if self.negated and parents else reference
        self.other = other if other != self.name and lineage.run.stage != "pretrain" else None

    def _figures(self, name: str, measure: str) -> tuple[str, str]:
        keys = ("metrics", "models", name, measure)
        value = self.ledger.number(self.record, *keys, "mean", form=_SHARE)
        return value, self.ledger.interval(self.record, *keys)

    def rows(self) -> list[dict[str, str]]:
        """A row for each measure: this model, the other one, intervals, and the sample's size."""
        ours, rows = self.models.get(str(self.name), {}), []
        for measure, label in _MEASURES.items():
            if measure == "kl" and (self.other is None or self.negated):
                continue  # it is a divergence from the reference
            expected = measure not in _OPTIONAL and any(measure in told for told in self.models.values())
            if not expected and ours.get(measure) is None:
                continue
            value, interval = self._figures(str(self.name), measure)
            row = {"label": label, "value": value, "interval": interval, "other": "", "other_interval": ""}
            if self.other and self.models[self.other].get(measure) is not None:
                row["other"], row["other_interval"] = self._figures(self.other, measure)
            keys = ("metrics", "models", str(self.name), measure)
            row["sample"] = f"{self.ledger.number(self.record, *keys, 'n')} questions"
            if measure == "bits_per_byte":
                size = self.ledger.number(self.record, *keys, "bytes")
                row["sample"] = f"{self.ledger.number(self.record, *keys, 'n')} documents, {size} bytes"
            rows.append(row)
        return rows

    def _versus(self) -> tuple[str, dict[str, Any]]:
        name = str(self.other if self.negated else self.name)
        return name, self.models.get(name, {}).get("versus_reference") or {}

    def differences(self) -> list[dict[str, str]]:
        """Differences from the other model, paired by question, each with its interval and what that means."""
        if self.other is None:
            return []
        name, versus = self._versus()
        rows = []
        for measure, label in _DIFFERENCES.items():
            is_sampled = measure.startswith("sampled")
            if measure not in versus and is_sampled and not self.metrics.get("samples_per_prompt"):
                continue
            keys, rule = ("metrics", "models", name, "versus_reference", measure), "negated" if self.negated else ""
            rows.append(
                {
                    "label": label,
                    "value": self.ledger.number(self.record, *keys, "mean", form="{:+.3f}", rule=rule),
                    "interval": self.ledger.interval(self.record, *keys, form="{:+.3f}", rule=rule),
                    "verdict": self.verdict(measure),
                }
            )
        return rows

    def verdict(self, measure: str) -> str:
        """`"better"`, `"worse"` or `"no clear difference"`: what the interval of a difference leaves open."""
        told = self._versus()[1].get(measure) or {}
        low, high = told.get("low", 0.0), told.get("high", 0.0)
        if self.negated:
            low, high = -high, -low
        return "better" if low > 0 else "worse" if high < 0 else "no clear difference"

    def win_rates(self) -> list[str]:
        """How often its answers win against the other model's, ties counting half; not told of the reference."""
        _, versus = self._versus()
        if self.other is None or self.negated:
            return []
        told = []
        for measure, answers in (("win_rate", "greedy"), ("sampled_win_rate", "sampled")):
            if measure in versus:
                keys = ("metrics", "models", str(self.name), "versus_reference", measure)
                share = self.ledger.number(self.record, *keys, "mean", form=_SHARE)
                told.append(f"{share} of {answers} answers ({self.ledger.interval(self.record, *keys)})")
        return told

    def text_remark(self) -> str:
        """What to say of a model that predicts plain text clearly worse than the one that it is compared with."""
        if self.other is None:
            return ""
        ours, theirs = (self.models[name].get("bits_per_byte") or {} for name in (str(self.name), self.other))
        if ours.get("low", 0.0) <= theirs.get("high", math.inf):
            return ""
        return "It predicts plain text worse than before: what it learnt of answers has that price."

    def guessed(self) -> str:
        """The kinds of question at which it is not clearly better than guessing."""
        shares = self.models.get(str(self.name), {}).get("exact_match_by_family", {})
        chances = {family: told.get("chance_level", 1.0) for family, told in self.metrics.get("families", {}).items()}
        return ", ".join(
            self.ledger.name(family) for family, share in shares.items() if share.get("low", 0.0) <= chances[family]
        )

    def families(self) -> list[dict[str, str]]:
        """Exact match by kind of question, with what guessing gives."""
        rows = []
        for family in self.models.get(str(self.name), {}).get("exact_match_by_family", {}):
            keys = ("metrics", "models", str(self.name), "exact_match_by_family", family)
            rows.append(
                {
                    "family": self.ledger.name(family),
                    "questions": self.ledger.number(self.record, *keys, "n"),
                    "value": self.ledger.number(self.record, *keys, "mean", form=_SHARE),
                    "interval": self.ledger.interval(self.record, *keys),
                    "chance": self.ledger.number(
                        self.record, "metrics", "families", family, "chance_level", form=_SHARE
                    ),
                }
            )
        return rows

    def questions_about(self) -> str:
        """What the questions are, in words: the tasks of the stage `prepare`, or a user's own."""
        own = [entry["path"] for setting, entry in self.run.inputs() if setting == "questions_source"]
        return f"of {last_part(own[0])}" if own else "about Python's standard library"

    def terms(self) -> dict[str, str]:
        """How the evaluation asked: questions, chance, samples, temperature, and the names of both models."""
        told = {
            "about": self.ledger.name(self.questions_about()),
            "questions": self.ledger.number(self.record, "metrics", "questions"),
            "chance": self.ledger.number(self.record, "metrics", "chance_level", form=_SHARE),
            "other": self.ledger.name(self.other or ""),
            "samples": "",
        }
        if self.ledger.requires(self.record, "metrics", "samples_per_prompt") != 0:
            told["samples"] = self.ledger.number(self.record, "metrics", "samples_per_prompt")
            told["temperature"] = self.ledger.number(self.record, "metrics", "temperature", form="{:g}")
        return told

    def sampling_remark(self) -> str:
        """What to say of a model whose sampled answers changed otherwise than its greedy ones, or where none did."""
        if self.other is None or "sampled_gold_difference" not in self._versus()[1]:
            return ""
        greedy, sampled = self.verdict("gold_difference"), self.verdict("sampled_gold_difference")
        if sampled == "better" and greedy != "better":
            what = "it got worse" if greedy == "worse" else "there is no clear difference"
            return (
                "**The gain is one of sampled answers.** The likeliest answer, which greedy decoding gives, did not "
                f"gain: {what}. The stage sharpened what the model says; its best answers got no better."
            )
        if sampled == greedy == "no clear difference":
            return "Neither sampled nor greedy answers differ clearly in gold reward from the model before."
        return ""


def teaching_remarks(lineage: Lineage, ledger: Ledger) -> list[str]:
    """What taught the alignment stages of the lineage, which a reader of their rewards has to know."""
    remarks = []
    for run in lineage.runs:
        if run.stage == "dpo" and ledger.requires(run.metrics, "metrics", "preferences") == "own answers":
            remarks.append(
                "DPO learnt from the model's own answers to training questions, told apart by the same rule-based "
                "checker that gives the gold reward of the held-out ones."
            )
        if run.stage == "ppo" and ledger.requires(run.metrics, "metrics", "checker_weight"):
            weight = ledger.number(run.metrics, "metrics", "checker_weight", form="{:g}")
            remarks.append(
                f"PPO's reward was the reward model's score plus {weight} times the verdict of the rule-based "
                "checker on training questions; the same checker gives the gold reward of the held-out ones."
            )
        if run.stage == "reward":
            remarks.append(_reward_remark(run, lineage, ledger))
    return remarks


def _reward_remark(run: Run, lineage: Lineage, ledger: Ledger) -> str:
    source = next((lineage.source_of(entry) for setting, entry in run.inputs() if setting == "dataset"), None)
    made = source is not None and source is tasks_of(lineage)
    what = (
        "pairs of a right answer and a wrong one that rules made up, not on people's preferences"
        if made
        else "the preferences of its data set"
    )
    accuracy = ledger.number(run.metrics, "metrics", "heldout_accuracy", form=_SHARE)
    pairs = ledger.number(run.metrics, "metrics", "heldout_pairs")
    return (
        f"The reward model (`{ledger.name(run.name)}`) was trained on {what}; it ranks {accuracy} of {pairs} held-out "
        "pairs rightly. How it judges a model's own mistakes was not measured."
    )


def required_evaluation(stage: str) -> bool:
    """Whether a card of this stage's model needs the stage `evaluate`: it alone measures these models' answers."""
    return stage == "sft" or stage in ALIGNED


def headline_measure(
    lineage: Lineage, evaluated: Evaluated | None
) -> tuple[Run, tuple[str | int, ...], str, str] | None:
    """The one figure for `model-index`: its run, the key of its mapping or number, metric id and name."""
    kind = own_kind(lineage.run)
    if evaluated is not None and required_evaluation(kind):
        keys = ("metrics", "models", str(evaluated.name), "exact_match")
        return evaluated.run, keys, "exact_match", "Exact match, greedy"
    own = {
        "pretrain": ("heldout_bits_per_byte", "bits_per_byte", "Bits per byte"),
        "masked": ("heldout_masked_accuracy", "accuracy", "Masked tokens filled in rightly"),
        "classify": ("heldout_accuracy", "accuracy", "Texts labelled rightly"),
        "reward": ("heldout_accuracy", "accuracy", "Pairs ranked rightly"),
    }
    if kind not in own:
        return None
    key, metric, name = own[kind]
    return lineage.run, ("metrics", key), metric, name


def interval_keys(run: Run, keys: tuple[str | int, ...]) -> list[tuple[str | int, ...]]:
    """The keys of the value, the lower and the upper end of a headline measure."""
    if isinstance((look_up(run.report, keys) or [None])[0], dict):
        return [(*keys, end) for end in ("mean", "low", "high")]
    *parents, last = keys
    return [keys, (*parents, f"{last}_interval", 0), (*parents, f"{last}_interval", 1)]
