"""`scratch-gpt card DIR`: the model card of a model's folder, from what its runs recorded and from nothing else.

    scratch-gpt card runs/mine/sft --license apache-2.0 [--source-license my_texts=cc-by-4.0] [--output FILE]
    scratch-gpt card runs/mine/sft --check       whether README.md is what the runs' files say; writes nothing

The runs that led to the model are followed back to the tokenizer and the text, and the evaluation that measured it is
looked for beside it. A missing file or figure is an error that names it. Licences that no run knows, the language and
the grid's carbon intensity are declared by flags or in a `card.yaml` (see `card_settings`), which stays with the card.

Card format: https://huggingface.co/docs/hub/model-cards (Mitchell et al. 2019, https://arxiv.org/abs/1810.03993).
"""

import argparse
import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_scratch_gpt.reporting import card_making, card_measures
from hf_scratch_gpt.reporting.card_measures import Evaluated
from hf_scratch_gpt.reporting.card_metadata import TASKS, check_card, make_metadata
from hf_scratch_gpt.reporting.card_settings import CARD_SETTINGS, CardSettings, load_settings, read_settings
from hf_scratch_gpt.reporting.ledger import Ledger, Record
from hf_scratch_gpt.reporting.lineage import Lineage, Run, check_unchanged
from hf_scratch_gpt.runs import write_text
from hf_scratch_gpt.runs.command_line import CommandParser
from hf_scratch_gpt.runs.files import shipped_folder
from hf_scratch_gpt.runs.identity import METRICS

CARD = "README.md"
_WHAT = {
    "pretrain": "A base language model, trained from scratch. It continues text; it was not taught to answer.",
    "masked": "A masked language model, trained from scratch, which fills in tokens and writes no text.",
    "sft": "An instruction-tuned language model.",
    "classify": "A text classifier: it gives one label to a text, or to a pair of texts.",
    "reward": "A reward model: it gives one score to a conversation, higher for answers like the preferred ones.",
    "dpo": "A language model aligned by direct preference optimisation.",
    "ppo": "A language model aligned by PPO against a learnt reward model, and a checker where one has a weight.",
    "kto": "A language model aligned by KTO, from answers that are each good or bad.",
    "grpo": "A language model aligned by GRPO: each sampled answer is judged beside the others to its question.",
    "rloo": "A language model aligned by RLOO: each sampled answer is judged beside the others to its question.",
    "best_of_n": "A language model tuned on the best of several answers of its own.",
}


def _find_evaluation(lineage: Lineage, given: str | Path | None) -> Run | None:
    if given is not None:
        evaluation = lineage.open_run(Path(given))
        if all(lineage.run.run_id != entry.get("run_id") for _, entry in evaluation.inputs()):
            raise ValueError(f"{given}: did not measure the model in {lineage.run.folder}; name its evaluation")
        return evaluation
    found = lineage.find_evaluation()
    if found is None and card_measures.required_evaluation(lineage.run.stage):
        place = lineage.run.folder.parent / "evaluate" / METRICS
        raise FileNotFoundError(
            f"{place}: missing, and no other run beside {lineage.run.folder} measured this model; run the stage "
            "'evaluate', or name its folder with --evaluation"
        )
    return found


@functools.cache
def _template() -> Any:
    import jinja2

    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        keep_trailing_newline=True,
        autoescape=False,  # the ledger escapes what comes from files
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.from_string((shipped_folder("model_cards") / "template.md.jinja").read_text("utf-8"))


def _sections(
    lineage: Lineage, evaluated: Evaluated | None, settings: CardSettings, card: Record, ledger: Ledger
) -> dict[str, Any]:
    """What the template shows, with the ledger's marks for figures."""
    run, runs = lineage.run, lineage.runs
    kind = card_measures.own_kind(run)
    measured = evaluated if evaluated is not None and evaluated.name is not None else None
    config = card_making.read_config(run)
    return {
        "what": _WHAT[kind],
        "kind": kind,
        "auto_class": TASKS[kind][1],
        "version": ledger.text(run.metrics, "environment", "hf_scratch_gpt"),
        "parameters": ledger.number(run.metrics, "metrics", "parameters"),
        "context": ledger.number(config, "max_position_embeddings"),
        "shape": {
            name: ledger.number(config, name)
            for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
            if name in config.content
        },
        "vocabulary": ledger.number(config, "vocab_size"),
        "stages": card_making.stage_rows(lineage, ledger),
        "settings": card_making.setting_rows(lineage, ledger),
        "data": card_making.data_rows(lineage, settings, card, ledger),
        "tasks": card_making.task_figures(lineage, ledger),
        "shares": card_making.share_rows(lineage, ledger),
        "reading": card_making.reading_figures(lineage, ledger),
        "languages": card_making.languages(lineage, settings),
        "machines": card_making.machines(lineage, ledger),
        "memory": card_making.peak_memory(lineage, ledger),
        "total_seconds": card_making.seconds_figure(runs, ledger),
        "total_minutes": card_making.seconds_figure(runs, ledger, "sum / 60"),
        "total_energy": card_making.energy_figure(runs, ledger),
        "grams": ledger.compute(card_making.emission_origins(runs, card), card_making.EMISSION_RULE, "{:,.3g}"),
        "intensity": ledger.number(card, "carbon_intensity", form="{:g}"),
        "intensity_source": ledger.text(card, "carbon_intensity_source"),
        "location": ledger.text(card, "location") if settings.location else "",
        "methods": card_making.energy_methods(runs, ledger),
        "evaluation_energy": card_making.energy_figure([evaluated.run], ledger) if evaluated else "",
        "evaluation_seconds": card_making.seconds_figure([evaluated.run], ledger) if evaluated else "",
        "own": card_measures.own_rows(run, ledger),
        "own_remarks": card_measures.own_remarks(lineage, ledger),
        "evaluated": measured,
        "teaching": card_measures.teaching_remarks(lineage, ledger),
        "license": ledger.text(card, "license_name" if settings.license_name else "license")
        if settings.license
        else "",
    }


def make_card(folder: str | Path, settings: CardSettings, evaluation: str | Path | None = None) -> str:
    """The card of the model in `folder` as text: metadata, Markdown, and where each figure comes from.

    Args:
        folder (`str` or `Path`): A stage's folder with a model.
        settings (`CardSettings`): What is declared.
        evaluation (`str` or `Path`, *optional*): Folder of the evaluation; unset: the newest beside `folder` that
            measured the model.

    Raises:
        FileNotFoundError: if a file of a run of the lineage is missing, naming it.
        ValueError: if a figure is missing, naming file and key; if the model's files are not those that were measured;
            if the stage makes no model; or if a file is damaged.
    """
    lineage = Lineage(folder)
    if lineage.run.stage not in TASKS:
        models = ", ".join(name for name in TASKS if name != "masked")
        if lineage.run.stage == "iterate":
            raise ValueError(
                f"{folder}: holds a copy of its last round's model; a card is of that round's own folder, round-N/ppo"
            )
        raise ValueError(f"{folder}: of the stage '{lineage.run.stage}', which makes no model; a card is of {models}")
    check_unchanged(lineage.run)
    found = _find_evaluation(lineage, evaluation)
    ledger, card = Ledger(), settings.as_record(lineage.run.name)
    if not isinstance(lineage.run.report.get("files"), dict):
        ledger.miss(lineage.run.metrics.name, ".files")
    if not settings.license:
        ledger.miss(
            card.name,
            f"license (the model's: set it in {CARD_SETTINGS} of the model or the recipe folder, or with --license; "
            "'other' with a license_name for one of your own or a private model)",
        )
    evaluated = Evaluated(found, lineage, ledger) if found is not None else None
    name = f"{lineage.root.name}-{lineage.run.name}"
    metadata = make_metadata(name, lineage, evaluated, settings, card, ledger)
    sections = _sections(lineage, evaluated, settings, card, ledger)
    text = _template().render(name=ledger.name(name), **sections)
    _refuse_missing(ledger, lineage)
    body = re.sub(r"\n{3,}", "\n\n", ledger.fill(text))
    card_text = f"---\n{metadata.to_yaml()}\n---\n\n{body}{_origins(ledger)}"
    check_card(card_text)
    return card_text


def _refuse_missing(ledger: Ledger, lineage: Lineage) -> None:
    try:
        ledger.check()
    except ValueError as error:
        hint = "; a stage that lacks a figure has to run again with this version" if METRICS in str(error) else ""
        raise ValueError(f"{lineage.run.folder}: no card, since nothing is made up: {error}{hint}") from None


def _origins(ledger: Ledger) -> str:
    rows = []
    for figure, places in ledger.origins():
        places_text = ", ".join(f"`{file}` `{key}`" for file, key in places)
        rows.append(f"| {figure.text} | {places_text} | {figure.rule} |\n")
    return "".join(rows) + "\n</details>\n"


def write_card(
    folder: str | Path,
    settings: CardSettings,
    output: str | Path | None = None,
    evaluation: str | Path | None = None,
) -> Path:
    """Write the card of the model in `folder`, and `card.yaml` beside the model; returns the card's file.

    Arguments and errors are those of `make_card`; `output` is the file to write, by default `README.md` in `folder`.
    """
    text = make_card(folder, settings, evaluation)
    settings.save(folder)
    return write_text(Path(output) if output else Path(folder) / CARD, text)


def write_cards(root: str | Path, recipes: str | Path) -> list[str]:
    """Write the card of every model below `root`, with the recipe folder's `card.yaml`; returns why some have none.

    A road whose cards cannot be written is finished all the same: what is missing is told in a line for each model.
    """
    from hf_scratch_gpt.reporting.summary import find_stages

    told = []
    for run in find_stages(root).values():
        if run.report.get("stage") not in TASKS:
            continue
        try:
            write_card(run.folder, load_settings(read_settings(run.folder), read_settings(recipes)))
        except (ValueError, FileNotFoundError) as error:
            told.append(str(error))
    return told


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = CommandParser(prog="scratch-gpt card", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("folder", help="a stage's folder with a model")
    parser.add_argument("--output", help="file to write (default: README.md in the folder)")
    parser.add_argument("--evaluation", help="folder of the evaluation (default: the newest beside the model)")
    parser.add_argument("--check", action="store_true", help="say whether the card is up to date, and write nothing")
    parser.add_argument("--license", help="the model's licence: an identifier of the Hub, or other")
    parser.add_argument("--license-name", help="name of a licence that is 'other', such as private")
    parser.add_argument("--license-link", help="where that licence can be read: LICENSE or a URL")
    parser.add_argument(
        "--source-license", action="append", default=[], metavar="SOURCE=LICENSE", help="licence of a source of data"
    )
    parser.add_argument("--language", nargs="+", help="languages of the text: ISO 639 codes, code or multilingual")
    parser.add_argument("--base-model", help="Hub id of the model that this one derives from")
    parser.add_argument("--carbon-intensity", type=float, help="grams of CO2 a kWh (default: the world's average)")
    parser.add_argument("--carbon-intensity-source", help="where that figure is from")
    parser.add_argument("--location", help="where the machine stood, such as 'Quebec, Canada'")
    return parser.parse_args(arguments)


def _given(parsed: argparse.Namespace) -> dict[str, Any]:
    names = [field.name for field in dataclasses.fields(CardSettings) if field.name != "source_licenses"]
    given = {name: getattr(parsed, name) for name in names if getattr(parsed, name) is not None}
    licences = {}
    for entry in parsed.source_license:
        source, equals, licence = entry.partition("=")
        if not (source and equals and licence):
            raise ValueError(f"command line: --source-license is '{entry}', expected SOURCE=LICENSE")
        licences[source] = licence
    return given | ({"source_licenses": licences} if licences else {})


def main(arguments: Sequence[str]) -> int:
    """Entry point of `scratch-gpt card`; 0 when written or up to date, 1 when `--check` finds another card."""
    parsed = _parse(arguments)
    settings = load_settings(read_settings(parsed.folder), (_given(parsed), "command line"))
    if not parsed.check:
        print(f"card: {write_card(parsed.folder, settings, parsed.output, parsed.evaluation)}")
        return 0
    path = Path(parsed.output) if parsed.output else Path(parsed.folder) / CARD
    text = make_card(parsed.folder, settings, parsed.evaluation)
    is_same = path.is_file() and path.read_text(encoding="utf-8") == text
    print(f"{path}: {'up to date' if is_same else 'not what the runs recorded; `scratch-gpt card` writes it anew'}")
    return 0 if is_same else 1
