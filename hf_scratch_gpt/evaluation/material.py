"""What every model is measured on, read from the stage `prepare` or from a user's own data."""

import dataclasses
from pathlib import Path
from typing import Any

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
        ValueError: if a row is damaged; names the file and line.
    """
    folder = Path(arguments.dataset_dir) if arguments.dataset_dir else None
    seed = arguments.seed
    texts: list[str] = []
    if folder is not None:
        documents = [row["text"] for row in read_required(folder / "heldout.jsonl", ["text"])]
        texts = pick_texts(documents, arguments.text_bytes, seed)
    rows = _conversations(arguments.questions_source, folder, "heldout")
    examples = _conversations(arguments.examples_source, folder, "train") if arguments.few_shot else []
    pairs: list[dict[str, Any]] = []
    if folder is not None and (folder / "tasks" / "preferences_heldout.jsonl").is_file():
        pairs = read_required(folder / "tasks" / "preferences_heldout.jsonl", ["prompt", "chosen", "rejected"])
    return Material(
        texts,
        with_answers(pick(rows, arguments.questions, seed)),
        with_answers(examples),
        pick(pairs, arguments.pairs, seed),
    )


def _conversations(source: str, folder: Path | None, split: str) -> list[dict[str, Any]]:
    """Rows of the user's own data, or of the tasks of the stage `prepare`; examples may be missing, questions not."""
    if source:
        from hf_scratch_gpt.data.conversations import load_conversations

        return [dict(row) for row in load_conversations(source)]
    path = folder / "tasks" / f"{split}.jsonl" if folder is not None else None
    if path is None or (split == "train" and not path.is_file()):
        return []
    return read_required(path, ["prompt", "completion"])
