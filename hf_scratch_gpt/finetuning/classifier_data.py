"""The rows that a classifier is trained on, chosen by and measured on: three parts, of which no text is in two."""

import dataclasses
import logging
from collections import Counter
from pathlib import Path
from typing import Any

from hf_scratch_gpt.data.labelled import Labelled, load_labelled, split_rows

logger = logging.getLogger(__name__)

_SEED_OF_VALIDATION = 1_000_003  # the validation part is drawn apart from the held-out one


@dataclasses.dataclass
class Parts:
    """A classifier's rows.

    Args:
        train (`Labelled`): What is trained on.
        validation (`Labelled`, *optional*): A part of the training rows that is left out of training, to choose by.
        heldout (`Labelled`, *optional*): What is measured at the end, and nothing else.
        names (`list[str]`): The labels, in the order of their numbers.
        rejected (`list[dict]`): Rows without a text or label: `file`, `place` and `reason`.
        repeated (`list[bool]`): For each held-out row whether a training row had the same text (before any went).
        removed (`int`): Training rows that went for it.
    """

    train: Labelled
    validation: Labelled | None
    heldout: Labelled | None
    names: list[str]
    rejected: list[dict[str, str]]
    repeated: list[bool]
    removed: int

    def numbers(self, part: Labelled) -> list[int]:
        """The labels of a part as numbers."""
        index = {name: number for number, name in enumerate(self.names)}
        return [index[label] for label in part.labels]


def load_parts(arguments: Any) -> Parts:
    """Load and split a classifier's rows as its settings say.

    Raises:
        OSError, ValueError: if a source cannot be read, and for labels that cannot be learnt: a single one, one that
            no training row has, or as many as there are rows.
    """
    rows = _load(arguments, arguments.dataset, arguments.dataset_split)
    rejected = _told(rows)
    heldout = None
    if arguments.eval_dataset:
        split = arguments.eval_split or (None if Path(arguments.eval_dataset).is_file() else "test")
        heldout = _load(arguments, arguments.eval_dataset, split)
        rejected += _told(heldout)
        train = rows
    elif arguments.heldout_fraction > 0 and len(rows) > 1:
        kept, out = split_rows(rows.labels, arguments.heldout_fraction, arguments.seed, arguments.stratify)
        train, heldout = rows.select(kept), rows.select(out)
    else:
        train = rows
    names = _label_names(rows)
    train, repeated, removed = _without_heldout_texts(train, heldout, arguments.deduplicate)
    validation = None
    if arguments.validation_fraction > 0:
        seed = arguments.seed + _SEED_OF_VALIDATION
        kept, out = split_rows(train.labels, arguments.validation_fraction, seed, arguments.stratify)
        validation = train.select(out)
        train, _, _ = _without_heldout_texts(train.select(kept), validation, arguments.deduplicate)
    for part in (heldout, validation):
        if part is not None:
            _check_known(part, train, names)
    return Parts(train, validation, heldout, names, rejected, repeated, removed)


def _load(arguments: Any, source: str, split: str | None) -> Labelled:
    split = None if Path(source).is_file() and split == "train" else split
    columns = (arguments.label_column, arguments.text_column, arguments.text_pair_column)
    return load_labelled(source, split, *columns, allow_rejected=arguments.allow_dropped_rows)


def _told(rows: Labelled) -> list[dict[str, str]]:
    return [{"file": rows.source, **entry} for entry in rows.rejected]


def _label_names(rows: Labelled) -> list[str]:
    """The labels in order: by size if all are whole numbers, else by name."""
    names = set(rows.labels)
    column = rows.columns["label"]
    if len(names) == 1:
        raise ValueError(
            f"{rows.source}: all {len(rows)} rows have the label '{names.pop()}' in column '{column}'; a classifier "
            "needs two labels to tell apart"
        )
    if 2 * len(names) > len(rows) and len(rows) > 4:
        raise ValueError(
            f"{rows.source}: {len(names)} different labels in {len(rows)} rows of column '{column}'; name the column "
            "that holds the labels with label_column"
        )
    is_number = all(name.removeprefix("-").isdecimal() for name in names)
    return sorted(names, key=(lambda name: (int(name), name)) if is_number else None)


def _without_heldout_texts(
    train: Labelled, heldout: Labelled | None, remove: bool
) -> tuple[Labelled, list[bool], int]:
    """The training rows, without held-out texts if asked; which held-out rows were among them; how many went."""
    if heldout is None:
        return train, [], 0
    train_keys, heldout_keys = train.keys(), heldout.keys()
    known, out = set(train_keys), set(heldout_keys)
    repeated = [key in known for key in heldout_keys]
    kept = [index for index, key in enumerate(train_keys) if key not in out]
    if not remove or len(kept) == len(train):
        return train, repeated, 0
    return train.select(kept), repeated, len(train) - len(kept)


def _check_known(part: Labelled, train: Labelled, names: list[str]) -> None:
    """Refuse labels that no training row has: the classifier could never give them."""
    known = Counter(train.labels)
    listed = ", ".join(f"'{name}'" for name in list(known)[:12])
    for label, place in zip(part.labels, part.places, strict=True):
        if label not in known and label in names:
            raise ValueError(
                f"{part.source}, {place}: no row with the label '{label}' is left to train on; set stratify, hold "
                "out less, or add rows of it"
            )
        if label not in known:
            raise ValueError(f"{part.source}, {place}: the label '{label}' is not one of the training rows': {listed}")
