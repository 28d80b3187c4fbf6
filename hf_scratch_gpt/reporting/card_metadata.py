"""The metadata of a card, which the Hub reads (https://github.com/huggingface/hub-docs/blob/main/modelcard.md)."""

import re
from typing import Any

from hf_scratch_gpt.reporting import card_making, card_measures
from hf_scratch_gpt.reporting.card_measures import Evaluated, own_kind
from hf_scratch_gpt.reporting.card_settings import CardSettings
from hf_scratch_gpt.reporting.ledger import Ledger, Record, look_up
from hf_scratch_gpt.reporting.lineage import Lineage, last_part

# Task of the Hub, and the Auto class that loads it.
TASKS = {
    "pretrain": ("text-generation", "AutoModelForCausalLM"),
    "masked": ("fill-mask", "AutoModelForMaskedLM"),
    "sft": ("text-generation", "AutoModelForCausalLM"),
    "classify": ("text-classification", "AutoModelForSequenceClassification"),
    "reward": ("text-classification", "AutoModelForSequenceClassification"),
    **dict.fromkeys(card_measures.ALIGNED, ("text-generation", "AutoModelForCausalLM")),
}


def _eval_results(
    lineage: Lineage, evaluated: Evaluated | None, task: str, sources: list[str], ledger: Ledger
) -> list[Any]:
    from huggingface_hub import EvalResult

    headline = card_measures.headline_measure(lineage, evaluated)
    if headline is None:
        return []
    run, keys, metric, name = headline
    value, low, high = (ledger.plain_number([(run.metrics, end)]) for end in card_measures.interval_keys(run, keys))
    what = f"text of {', '.join(sources)}" if sources else "text"
    if metric == "exact_match" and evaluated is not None:
        what = f"questions {evaluated.questions_about()}"
    elif own_kind(lineage.run) == "reward":
        what = "preferences"
    elif own_kind(lineage.run) == "classify":
        what = "labelled texts"
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^a-z0-9]+", "-", f"heldout {what}".lower().replace("'", "")).strip("-"),
            dataset_name=f"Held-out {what}",
            dataset_split="heldout",
            metric_type=metric,
            metric_name=name,
            metric_value=value,
            metric_args={"confidence_interval": [low, high], "confidence_level": "95%"},
        )
    ]


def make_metadata(
    name: str, lineage: Lineage, evaluated: Evaluated | None, settings: CardSettings, card: Record, ledger: Ledger
) -> Any:
    """The `huggingface_hub.ModelCardData` of a model; what is not known is left out, and a missing number is noted.

    Args:
        name (`str`): The model's name.
        lineage (`Lineage`): Its runs.
        evaluated (`Evaluated`, *optional*): What `evaluate` measured of it.
        settings (`CardSettings`): What is declared.
        card (`Record`): The same as a file.
        ledger (`Ledger`): Takes the figures.
    """
    from huggingface_hub import ModelCardData

    task, _ = TASKS[own_kind(lineage.run)]
    sources = [
        last_part(str(source))
        for run in lineage.runs
        for source in look_up(run.report, ("metrics", "by_source", "*", "source"))
    ]
    emissions = ledger.plain_number(
        card_making.emission_origins(lineage.runs, card), card_making.EMISSION_RULE, digits=3
    )
    environment = lineage.run.report.get("environment", {})
    hardware = ", ".join(
        [f"{environment.get('cores')} cores of {environment.get('cpu')}", *environment.get("gpus", [])]
    )
    results = _eval_results(lineage, evaluated, task, list(dict.fromkeys(sources)), ledger)
    base = card_making.base_models(lineage, settings, card, ledger)
    details: dict[str, Any] = {
        "co2_eq_emissions": {
            "emissions": emissions,
            "source": "hf_scratch_gpt: energy of every training stage times the grid's carbon intensity, see the card",
            "training_type": "fine-tuning"
            if base
            else "pre-training"
            if lineage.run.stage == "pretrain"
            else "pre-training and fine-tuning",
            "hardware_used": hardware,
            **({"geographical_location": settings.location} if settings.location else {}),
        }
    }
    return ModelCardData(
        language=card_making.languages(lineage, settings) or None,
        license=settings.license or None,
        license_name=settings.license_name or None,
        license_link=settings.license_link or None,
        library_name="transformers",
        pipeline_tag=task,
        tags=["scratch_gpt", "hf_scratch_gpt", lineage.run.stage],
        datasets=card_making.data_set_ids(lineage) or None,
        base_model=base or None,
        model_name=name if results else None,
        eval_results=results or None,
        **details,
    )


def check_card(text: str) -> None:
    """Check a card as far as that goes without the Hub: what huggingface_hub reads back is what was meant.

    Raises:
        ValueError: naming what the Hub or a reader would stumble over.
    """
    from huggingface_hub import ModelCard

    card = ModelCard(text)
    again = ModelCard(str(card))
    if again.data.to_dict() != card.data.to_dict() or again.text != card.text:
        raise ValueError("the card's metadata does not survive being read and written by huggingface_hub")
    metadata = card.data.to_dict()
    for name in ("license", "library_name", "pipeline_tag", "co2_eq_emissions"):
        if not metadata.get(name):
            raise ValueError(f"the card's metadata has no '{name}'")
    path = re.search(r"(?<![\w.:/\])])(?:~|[A-Za-z]:)?[/\\](?!/)\w[\w.-]*[/\\][\w./\\-]*", _without_links(text))
    if path:
        raise ValueError(f"the card names a place on this machine, '{path.group()}'; rename that folder or source")


def _without_links(text: str) -> str:
    return re.sub(r"https?://\S+", "", text)
