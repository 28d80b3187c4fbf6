"""The parts of a card that tell how a model was made: stages, settings, data, machine, time and energy."""

from collections.abc import Iterator
from typing import Any

from hf_scratch_gpt.data.sources import KNOWN_TERMS, PYTHON_DOCS
from hf_scratch_gpt.reporting.card_settings import CARD_SETTINGS, CardSettings
from hf_scratch_gpt.reporting.ledger import WILDCARD, Ledger, Origin, Record, key_text, look_up
from hf_scratch_gpt.reporting.lineage import Lineage, Run, last_part
from hf_scratch_gpt.runs import read_json
from hf_scratch_gpt.runs.arguments import VOLATILE_FIELDS

# What each stage did, in figures of its own: key of its metrics and words.
_DEEDS: dict[str, tuple[tuple[str, str], ...]] = {
    "tokenizer": (("vocab_size", "tokens learnt"), ("train_documents", "documents read")),
    "prepare": (("train_tokens", "training tokens"), ("heldout_tokens", "tokens held out")),
    "pretrain": (("steps", "steps"), ("tokens", "tokens read")),
    "sft": (("steps", "steps"), ("examples", "examples"), ("tokens", "tokens read")),
    "classify": (("steps", "steps"), ("examples", "texts"), ("tokens", "tokens read")),
    "reward": (("steps", "steps"), ("pairs", "pairs")),
    "dpo": (("steps", "steps"), ("pairs", "pairs")),
    "ppo": (("steps", "steps"), ("episodes", "answers sampled and scored")),
    "kto": (("steps", "steps"), ("answers", "answers labelled good or bad")),
    "grpo": (("steps", "steps"), ("episodes", "answers sampled and scored")),
    "rloo": (("steps", "steps"), ("episodes", "answers sampled and scored")),
    "best_of_n": (("steps", "steps"), ("answers", "answers sampled"), ("chosen", "of them chosen")),
    "rlaif": (("answers", "answers sampled and ranked"), ("pairs", "pairs")),
}
_ENERGY = ("energy", "kilowatt_hours")
_DATA_FIELDS = ("sources", "stream", "dataset", "eval_dataset")
_MODEL_FIELDS = ("model_name_or_path", "reward_model")


def stage_rows(lineage: Lineage, ledger: Ledger) -> list[dict[str, str]]:
    """A row for each stage of the lineage: what it did, what from, how long it took, and the energy."""
    rows = []
    for run in lineage.runs:
        deeds = [f"{ledger.number(run.metrics, 'metrics', key)} {words}" for key, words in _DEEDS.get(run.stage, ())]
        sources = [lineage.source_of(entry) for _, entry in run.inputs()]
        entries = [entry for _, entry in run.inputs()]
        made_from = [
            source.name if source else last_part(entry["path"]) for source, entry in zip(sources, entries, strict=True)
        ]
        rows.append(
            {
                "stage": ledger.name(run.name if run.name == run.stage else f"{run.name} ({run.stage})"),
                "deed": ", ".join(deeds),
                "inputs": ledger.name(", ".join(dict.fromkeys(made_from))),
                "seconds": ledger.number(run.metrics, "seconds", form="{:,.1f}"),
                "energy": energy_figure([run], ledger),
            }
        )
    return rows


def _flat(settings: Any, keys: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:
    if isinstance(settings, dict):
        for name, value in settings.items():
            yield from _flat(value, (*keys, name))
    else:
        yield keys


def setting_rows(lineage: Lineage, ledger: Ledger) -> list[dict[str, Any]]:
    """For each stage the settings that its recipe gave, without folders, files, and what changes no result."""
    rows = []
    for run in lineage.runs:
        recipe, left_out = run.recipe, {*VOLATILE_FIELDS, *run.report.get("inputs", {})}
        shown = []
        for keys in _flat(recipe.content):
            (value,) = look_up(recipe.content, keys)
            texts = [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, str)]
            if keys[0] not in left_out and all(last_part(text) == text for text in texts):
                shown.append(f"`{'.'.join(map(str, keys))}: {ledger.setting(recipe, *keys)}`")
        if shown:
            rows.append({"stage": ledger.name(run.name), "settings": shown})
    return rows


def _declared_licence(source: str, settings: CardSettings, card: Record, ledger: Ledger) -> str:
    name = last_part(source)
    if source in KNOWN_TERMS:
        return ledger.name(KNOWN_TERMS[source]["license"])
    if not settings.licence_of(source):
        ledger.miss(
            card.name,
            f"source_licenses.{name} (the licence of the data '{name}': set it in {CARD_SETTINGS} of the model or the "
            f"recipe folder, or with --source-license {name}=LICENSE)",
        )
        return ""
    return ledger.text(card, "source_licenses", name)


def _source_row(run: Run, index: int, settings: CardSettings, card: Record, ledger: Ledger) -> dict[str, str]:
    keys = ("metrics", "by_source", index)
    (told,) = look_up(run.report, keys)
    if told.get("license"):
        licence = ledger.text(run.metrics, *keys, "license")
        if told.get("license_link"):
            licence = f"[{licence}]({told['license_link']})"
    else:
        licence = _declared_licence(str(told["source"]), settings, card, ledger)
    names = [f"{split}_{unit}" for split in ("train", "heldout") for unit in ("documents", "tokens")]
    return {
        "source": ledger.name(last_part(str(told["source"]))),
        "licence": licence,
        **{name: ledger.number(run.metrics, *keys, name) for name in names},
    }


def data_rows(lineage: Lineage, settings: CardSettings, card: Record, ledger: Ledger) -> list[dict[str, str]]:
    """A row for each source of training text: licence, documents and tokens of both splits.

    A source that no stage `prepare` of the lineage counted (of a tokenizer alone, or of a tuning stage) has no counts
    here: what a tuning stage read of it stands with the stage. So has the text that questions were made of.
    """
    rows: list[dict[str, str]] = []
    known: set[str] = set()
    for run in lineage.runs:
        if run.stage != "prepare":
            continue
        by_source = run.report.get("metrics", {}).get("by_source")
        if not by_source:
            ledger.miss(run.metrics.name, ".metrics.by_source")
            known.update(entry["path"] for setting, entry in run.inputs() if setting in _DATA_FIELDS)
            continue
        for index, told in enumerate(by_source):
            known.add(str(told["source"]))
            rows.append(_source_row(run, index, settings, card, ledger))
    for source in _uncounted_sources(lineage):
        if source not in known:
            known.add(source)
            row = dict.fromkeys(("train_documents", "train_tokens", "heldout_documents", "heldout_tokens"), "")
            licence = _declared_licence(source, settings, card, ledger)
            rows.append({**row, "source": ledger.name(last_part(source)), "licence": licence})
    return rows


def _uncounted_sources(lineage: Lineage) -> Iterator[str]:
    for run in lineage.runs:
        for setting, entry in run.inputs():
            if setting in _DATA_FIELDS and "run_id" not in entry:
                yield entry["path"]
    if tasks_of(lineage) is not None:
        yield PYTHON_DOCS


def tasks_of(lineage: Lineage) -> Run | None:
    """The stage `prepare` whose questions and preferences a stage of the lineage learnt from, or `None`."""
    for run in lineage.runs:
        for setting, entry in run.inputs():
            source = lineage.source_of(entry)
            if setting == "dataset" and source is not None and look_up(source.report, ("metrics", "tasks", "train")):
                return source
    return None


def task_figures(lineage: Lineage, ledger: Ledger) -> dict[str, str] | None:
    """How many questions and preferences the stage `prepare` made for each split, or `None` where none were learnt."""
    run = tasks_of(lineage)
    if run is None:
        return None
    names = ("train", "heldout", "preferences_train", "preferences_heldout")
    return {name: ledger.number(run.metrics, "metrics", "tasks", name, WILDCARD, rule="sum") for name in names}


def languages(lineage: Lineage, settings: CardSettings) -> list[str]:
    """ISO 639 codes of the training text: those declared, else those of the sources if all of these are known."""
    if settings.language:
        return list(settings.language)
    by_source = [told for run in lineage.runs for told in run.report.get("metrics", {}).get("by_source", [])]
    languages_of = {str(told["source"]): told.get("language", []) for told in by_source}
    for source in _uncounted_sources(lineage):
        languages_of.setdefault(source, KNOWN_TERMS.get(source, {}).get("language", []))
    if not all(languages_of.values()):
        return []
    return list(dict.fromkeys(code for codes in languages_of.values() for code in codes))


def reading_figures(lineage: Lineage, ledger: Ledger) -> dict[str, str] | None:
    """How many tokens pretraining read, and how many times the training text that is; `None` without both stages.

    `None` too for a run that read a stream, once, and not what the stage `prepare` counted.
    """
    run = next((run for run in lineage.runs if run.stage == "pretrain"), None)
    if run is None or any(setting == "stream" for setting, _ in run.inputs()):
        return None
    source = next((lineage.source_of(entry) for setting, entry in run.inputs() if setting == "dataset_dir"), None)
    if source is None:
        return None
    origins: list[Origin] = [(run.metrics, ("metrics", "tokens")), (source.metrics, ("metrics", "train_tokens"))]
    return {
        "tokens": ledger.number(run.metrics, "metrics", "tokens"),
        "times": ledger.compute(origins, "first / second", "{:.2f}"),
    }


def share_rows(lineage: Lineage, ledger: Ledger) -> list[dict[str, str]]:
    """A row for each source that pretraining drew from: weight asked for, realised share of its tokens, and epochs.

    Without a mixture all windows are drawn equally often, so that a source's share is that of its text.
    """
    run = next((run for run in lineage.runs if run.stage == "pretrain"), None)
    if run is None:
        return []
    metrics, mixture = run.metrics, run.report.get("metrics", {}).get("mixture")
    if mixture:
        return [
            {
                "source": ledger.name(last_part(str(told["source"]))),
                "weight": ledger.number(metrics, "metrics", "mixture", index, "weight", form="{:.3f}"),
                "share": ledger.number(metrics, "metrics", "mixture", index, "share", form="{:.3f}"),
                "epochs": ledger.number(metrics, "metrics", "mixture", index, "epochs", form="{:,.3g}"),
            }
            for index, told in enumerate(mixture)
        ]
    source = next((lineage.source_of(entry) for setting, entry in run.inputs() if setting == "dataset_dir"), None)
    by_source = source.report.get("metrics", {}).get("by_source") if source is not None else None
    if source is None or not by_source:
        return []
    whole: Origin = (source.metrics, ("metrics", "train_tokens"))
    return [
        {
            "source": ledger.name(last_part(str(told["source"]))),
            "weight": "",
            "share": ledger.compute(
                [(source.metrics, ("metrics", "by_source", index, "train_tokens")), whole], "first / second", "{:.3f}"
            ),
            "epochs": ledger.number(metrics, "metrics", "epochs", form="{:,.3g}"),
        }
        for index, told in enumerate(by_source)
    ]


def hub_ids(lineage: Lineage, fields: tuple[str, ...]) -> list[str]:
    """The inputs of these settings that are Hub ids: neither a run nor a file, and named like one."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    found = []
    for run in lineage.runs:
        for setting, entry in run.inputs():
            name = entry["path"].partition(":")[0]
            if setting not in fields or "run_id" in entry or "digest" in entry or name.count("/") != 1:
                continue
            try:
                validate_repo_id(name)
            except HFValidationError:
                continue
            found.append(name)
    return list(dict.fromkeys(found))


def data_set_ids(lineage: Lineage) -> list[str]:
    """The data sets of the Hub that the lineage read."""
    return hub_ids(lineage, _DATA_FIELDS)


def base_models(lineage: Lineage, settings: CardSettings, card: Record, ledger: Ledger) -> list[str]:
    """The Hub's models that the lineage began with; one from a folder without a record has to be declared."""
    if settings.base_model:
        return [settings.base_model]
    found = hub_ids(lineage, _MODEL_FIELDS)
    for run in lineage.runs:
        for setting, entry in run.inputs():
            if setting in _MODEL_FIELDS and "digest" in entry:
                ledger.miss(
                    card.name,
                    f"base_model (the stage '{run.stage}' began with {last_part(entry['path'])}, which has no "
                    "metrics.json to say how it was made: give its Hub id with --base-model)",
                )
    return found


def machines(lineage: Lineage, ledger: Ledger) -> list[str]:
    """What the stages ran on, each machine once, with its stages if there are several."""
    by_machine: dict[str, list[Run]] = {}
    for run in lineage.runs:
        told = run.report.get("environment", {})
        by_machine.setdefault(str([told.get(key) for key in ("cpu", "cores", "gpus", "torch")]), []).append(run)
    rows = []
    for runs in by_machine.values():
        record = runs[0].metrics
        gpus = runs[0].report.get("environment", {}).get("gpus", [])
        shown = [ledger.text(record, "environment", "gpus", index) for index in range(len(gpus))]
        rows.append(
            f"{ledger.number(record, 'environment', 'cores')} cores of {ledger.text(record, 'environment', 'cpu')}"
            + (f", {', '.join(shown)}" if shown else ", no GPU")
            + f"; torch {ledger.text(record, 'environment', 'torch')}, "
            f"transformers {ledger.text(record, 'environment', 'transformers')}"
            + (f" ({', '.join(ledger.name(run.name) for run in runs)})" if len(by_machine) > 1 else "")
        )
    return rows


def peak_memory(lineage: Lineage, ledger: Ledger) -> str:
    """The largest resident memory of any stage, in gigabytes."""
    sizes = [ledger.requires(run.metrics, "peak_rss_bytes") or 0 for run in lineage.runs]
    top = lineage.runs[sizes.index(max(sizes))]
    return ledger.number(top.metrics, "peak_rss_bytes", form="{:.1f}", rule="/ 1000000000")


def seconds_figure(runs: list[Run], ledger: Ledger, rule: str = "sum", form: str = "{:,.1f}") -> str:
    """The seconds (or minutes) that some stages took together."""
    return ledger.compute([(run.metrics, ("seconds",)) for run in runs], rule, form)


def energy_figure(runs: list[Run], ledger: Ledger) -> str:
    """The watt-hours that some stages took together."""
    for run in runs:
        reason = look_up(run.report, ("energy", "unmeasured"))
        if reason:
            ledger.miss(run.metrics.name, f"{key_text(_ENERGY)} ({reason[0]})")
            return ""
    return ledger.compute([(run.metrics, _ENERGY) for run in runs], "sum × 1000", "{:,.4g}")


def emission_origins(runs: list[Run], card: Record) -> list[Origin]:
    """What grams of CO2 follow from: the energy of each stage, and last the grid's intensity."""
    return [*((run.metrics, _ENERGY) for run in runs), (card, ("carbon_intensity",))]


EMISSION_RULE = "sum of all but the last × the last"


def energy_methods(runs: list[Run], ledger: Ledger) -> list[str]:
    """How the energy of each part of the machine was found, with its source; one line a way."""
    lines: dict[str, str] = {}
    for run in runs:
        for part, label in (("cpu", "Processor"), ("memory", "Memory"), ("gpu", "GPU")):
            told = look_up(run.report, ("energy", part))
            if not told or str((part, told[0].get("method"))) in lines:
                continue
            keys = ("energy", part)
            line = f"{label}: {ledger.text(run.metrics, *keys, 'method')}"
            estimated = str(told[0].get("method")).startswith("estimated")
            if estimated and part == "cpu":
                line += (
                    f", at {ledger.number(run.metrics, *keys, 'idle_watts')} W a core idle and "
                    f"{ledger.number(run.metrics, *keys, 'busy_watts')} W busy"
                )
            if estimated and part == "memory":
                line += f", at {ledger.number(run.metrics, *keys, 'watts_per_gigabyte')} W a gigabyte"
            lines[str((part, told[0].get("method")))] = f"{line} ({told[0]['source']})."
    return list(lines.values())


def read_config(run: Run) -> Record:
    """The model's `config.json`, for the ledger.

    Raises:
        FileNotFoundError: if the folder holds no model.
        ValueError: if it is damaged.
    """
    path = run.folder / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing; a card is of a model's folder, and {run.folder} holds none")
    return Record(f"{run.name}/config.json", read_json(path))
