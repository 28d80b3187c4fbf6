"""What every model is measured on, read from the stage `prepare` or from a user's own data."""

import dataclasses
from pathlib import Path
from typing import Any

from hf_scratch_gpt.data.manifest import find_file
from hf_scratch_gpt.evaluation.arguments import EvaluateArguments
from hf_scratch_gpt.evaluation.questions import pick, pick_texts, read_required, with_answers


@dataclasses.dataclass
class Material:
    """What every model is measured on: held-out texts, questions, few-shot examples, preference pairs."""

    texts: list[str]
    rows: list[dict[str, Any]]
    examples: list[dict[str, Any]]
    pairs: list[dict[str, Any]]


def load_material(arguments: EvaluateArguments) -> Material:
    """Read the held-out material of the stage `prepare`, or a user's own questions.

    Raises:
        FileNotFoundError: if a file that is needed is missing.
        ValueError: if a row or a file of `prepare` is damaged; names the file and line.
    """
    folder = Path(arguments.dataset_dir) if arguments.dataset_dir else None
    seed = arguments.seed
    texts: list[str] = []
    if folder is not None:
        documents = [row["text"] for row in read_required(_prepared_file(folder, "heldout.jsonl"), ["text"])]
        texts = pick_texts(documents, arguments.text_bytes, seed)
    rows = _conversations(arguments.questions_source, folder, "heldout")
    examples = _conversations(arguments.examples_source, folder, "train") if arguments.few_shot else []
    pairs: list[dict[str, Any]] = []
    preferences = find_file(folder, "tasks/preferences_heldout.jsonl") if folder is not None else None
    if preferences is not None:
        pairs = read_required(preferences, ["prompt", "chosen", "rejected"])
    return Material(
        texts,
        with_answers(pick(rows, arguments.questions, seed)),
        with_answers(examples),
        pick(pairs, arguments.pairs, seed),
    )


def _prepared_file(folder: Path, name: str) -> Path:
    return find_file(folder, name) or folder / name  # what is not there is named where it is read


def _conversations(source: str, folder: Path | None, split: str) -> list[dict[str, Any]]:
    """Rows of the user's own data, or of the tasks of the stage `prepare`; examples may be missing, questions not."""
    if source:
        from hf_scratch_gpt.data.conversations import load_conversations

        return [dict(row) for row in load_conversations(source)]
    if folder is None:
        return []
    path = _prepared_file(folder, f"tasks/{split}.jsonl")
    if split == "train" and not path.is_file():
        return []
    return read_required(path, ["prompt", "completion"])
