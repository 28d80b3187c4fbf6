"""`README.md` of a finished model: a model card from what its road measured, and from nothing else.

Card format: https://huggingface.co/docs/hub/model-cards (Mitchell et al. 2019, https://arxiv.org/abs/1810.03993).
"""

from pathlib import Path
from typing import Any

from hf_scratch_gpt.reporting.summary import StageFolder, find_stages
from hf_scratch_gpt.runs import write_text
from hf_scratch_gpt.runs.files import shipped_folder

CARD = "README.md"
_WHAT = {
    "pretrain": "A base language model, trained from scratch.",
    "sft": "An instruction-tuned language model.",
    "dpo": "A language model aligned by direct preference optimisation.",
    "ppo": "A language model aligned by PPO against a learnt reward model, and a checker where one has a weight.",
}
_WHAT_MASKED = "A masked language model, trained from scratch, which fills in tokens and writes no text."
# What a card shows of its stage's part of the report: key and label, in this order.
_FIGURES = {
    "heldout_bits_per_byte": "held-out bits per byte",
    "random_init_bits_per_byte": "the same before training",
    "heldout_masked_accuracy": "masked tokens of held-out text predicted right",
    "unigram_masked_accuracy": "the same by the most frequent token",
    "heldout_masked_loss": "held-out loss (nats a masked token)",
    "heldout_loss": "held-out loss (nats a token)",
    "heldout_exact_match": "exact match on held-out questions",
    "base_exact_match": "the same of the base model",
    "exact_match": "exact match on held-out questions",
    "sft_exact_match": "the same before alignment",
    "gold_reward": "gold reward of {gold_reward_of}",
    "sft_gold_reward": "the same before alignment",
    "win_rate_vs_sft": "win rate against the model before alignment",
    "preference_accuracy": "accuracy on held-out preferences",
    "kl": "KL to the model before alignment (nats an answer)",
    "share_ended": "share of answers that end by themselves",
}


def card_figures(measured: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of a card's table, from its stage's part of the report: label, value, 95% interval."""
    rows = []
    for key, label in _FIGURES.items():
        if measured.get(key) is None:
            continue
        interval = measured.get(f"{key}_interval")
        shown = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else ""
        rows.append({"label": label.format_map(measured), "value": f"{measured[key]:.3f}", "interval": shown})
    return rows


def _describe_inputs(inputs: dict[str, Any], names: dict[str, str]) -> str:
    """The inputs of a stage as text: runs by their stage, all else by the last part of its path."""
    entries = [item for entry in inputs.values() for item in (entry if isinstance(entry, list) else [entry])]
    shown = [names.get(entry.get("run_id", "")) or Path(entry["path"]).name for entry in entries]
    return ", ".join(dict.fromkeys(shown))


def lineage(stage: str, runs: dict[str, StageFolder]) -> list[dict[str, Any]]:
    """The runs that led to `stage`, first to last: stage, seconds, and what each was made from."""
    names = {run.report["run_id"]: name for name, run in runs.items()}
    wanted, queue = set(), [stage]
    while queue:
        current = queue.pop()
        wanted.add(current)
        for entry in runs[current].report["inputs"].values():
            for item in entry if isinstance(entry, list) else [entry]:
                source = names.get(item.get("run_id", ""))
                if source and source not in wanted:
                    queue.append(source)
    return [
        {
            "stage": name,
            "seconds": run.report["seconds"],
            "inputs": _describe_inputs(run.report["inputs"], names),
        }
        for name, run in runs.items()
        if name in wanted
    ]


def _metadata(pipeline_tag: str) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers", pipeline_tag=pipeline_tag, tags=["scratch_gpt", "hf_scratch_gpt"]
    )
    return f"---\n{data.to_yaml()}\n---\n"


def write_cards(root: str | Path, report: dict[str, Any]) -> list[Path]:
    """Write the card of every language model below `root` from `report`; returns the files.

    Args:
        root (`str` or `Path`): Folder whose sub-folders are run folders.
        report (`dict`): What `make_report` said of them.

    Raises:
        OSError: if a card cannot be written.
    """
    import jinja2

    from hf_scratch_gpt import __version__

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True, autoescape=False)
    template = environment.from_string((shipped_folder("model_cards") / "template.md.jinja").read_text("utf-8"))
    runs = find_stages(root)
    paths = []
    for stage in [name for name in _WHAT if name in runs]:
        run = runs[stage]
        machine = run.report["environment"]
        is_masked = run.metrics.get("objective") == "masked"
        text = template.render(
            name=f"{Path(root).resolve().name}-{stage}",
            what=_WHAT_MASKED if is_masked else _WHAT[stage],
            auto_class="AutoModelForMaskedLM" if is_masked else "AutoModelForCausalLM",
            version=__version__,
            stage=stage,
            lineage=lineage(stage, runs),
            parameters=run.metrics["parameters"],
            environment=f"Trained on {machine['cores']} cores ({machine['cpu']}) with torch {machine['torch']}.",
            figures=card_figures(report["stages"][stage]),
        )
        paths.append(write_text(run.folder / CARD, _metadata("fill-mask" if is_masked else "text-generation") + text))
    return paths
