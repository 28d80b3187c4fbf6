"""A document, and the rule that says whether it is held out."""

import hashlib
from dataclasses import dataclass

DERIVED = "derived"  # the "split" of a page that repeats held-out text: it goes nowhere


@dataclass(frozen=True)
class Document:
    """A piece of text that stands by itself.

    Args:
        id (`str`): Name that finds the document again in its source: a relative path, a line, a module.
        text (`str`): The text.
        source (`str`): The source as the user named it.
        group (`str`, *optional*): Documents of one group go to the same split. Defaults to the id.
        derived (`bool`, *optional*, defaults to `False`): The text repeats parts of another document of its group,
            such as a page made from the docstrings of a source file. Derived documents are trained on but never
            measured on: held-out text would otherwise count twice.
    """

    id: str
    text: str
    source: str
    group: str = ""
    derived: bool = False

    @property
    def split_group(self) -> str:
        """What the split looks at."""
        return self.group or self.id


def is_heldout(group: str, seed: int, fraction: float) -> bool:
    """Whether the documents of `group` are held out: a hash of seed and group, so it needs no state and no order."""
    digest = hashlib.blake2b(f"{seed}\0{group}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def split_of(document: Document, seed: int, fraction: float) -> str:
    """`"train"`, `"heldout"`, or `DERIVED` for a page that repeats a held-out document."""
    if not is_heldout(document.split_group, seed, fraction):
        return "train"
    return DERIVED if document.derived else "heldout"
