"""Splits names, words and operand pairs between tuning and held-out questions, for all families at once.

A held-out name occurs in no tuning row at all, not even as a parameter or inside a docstring: names that are words
of many other texts stay in tuning, and tuning questions that show a held-out name are dropped when rows are made.
"""

import builtins
import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from itertools import combinations_with_replacement

from hf_scratch_gpt.data.tasks.families import LARGEST_OPERAND, Pool
from hf_scratch_gpt.data.tasks.functions import Definition
from hf_scratch_gpt.data.tasks.phrasings import WORDINGS

HELDOUT_SHARE = 0.16
# A name found in more other definitions than this is a common word: holding it out would cost many tuning questions.
MOST_OTHER_USES = 3
MOST_DEFINITIONS_OF_ONE_NAME = 3


def words_of(text: str) -> set[str]:
    """The words (letters, digits, underscores) of a text."""
    return set(re.findall(r"\w+", text))


def is_heldout(key: str, seed: int) -> bool:
    """Whether a hash of seed and key falls into the held-out share: the same for every family and every run."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELDOUT_SHARE


def heldout_names(definitions: Iterable[Definition], seed: int) -> set[str]:
    """Names that only held-out questions may show."""
    definitions = list(definitions)
    uses: Counter[str] = Counter()
    for definition in definitions:
        uses.update(words_of(definition.text) - {definition.name})
    wording_words = {
        word for split in WORDINGS.values() for texts in split.values() for word in words_of(" ".join(texts))
    }
    return {
        name
        for name in {definition.name for definition in definitions} - wording_words
        if uses[name] <= MOST_OTHER_USES and is_heldout(name, seed)
    }


def make_pools(definitions: Iterable[Definition], seed: int) -> dict[str, Pool]:
    """The pool of each split: `train` and `heldout`."""
    definitions = list(definitions)
    heldout = heldout_names(definitions, seed)
    pairs = list(combinations_with_replacement(range(1, LARGEST_OPERAND + 1), 2))
    pools = {}
    for split in ("train", "heldout"):
        chosen = _bounded([d for d in definitions if (d.name in heldout) == (split == "heldout")])
        pools[split] = Pool(
            definitions=tuple(chosen),
            words=tuple(sorted({d.name for d in chosen if re.fullmatch(r"[a-z]{3,10}", d.name)})),
            pairs=tuple(pair for pair in pairs if is_heldout(f"operands {pair}", seed) == (split == "heldout")),
            closed_book=tuple(_known_by_name(definitions) & set(chosen)),
        )
        pools[split] = _sorted_closed_book(pools[split])
    return pools


def _bounded(definitions: list[Definition]) -> list[Definition]:
    """At most a few definitions of one name (`close` has dozens), those with the most to ask about first."""
    by_name: defaultdict[str, list[Definition]] = defaultdict(list)
    for definition in definitions:
        by_name[definition.name].append(definition)
    kept = []
    for same in by_name.values():
        same.sort(
            key=lambda d: (
                -bool(d.summary) - bool(d.header) - bool(d.returned),
                d.module.count("."),
                d.module,
                d.owner,
            )
        )
        kept.extend(same[:MOST_DEFINITIONS_OF_ONE_NAME])
    return sorted(kept, key=lambda d: (d.module, d.owner, d.name, d.header))


def _known_by_name(definitions: Iterable[Definition]) -> set[Definition]:
    """Functions and classes of top-level modules whose name exists once only (and is no builtin)."""
    modules: defaultdict[str, set[str]] = defaultdict(set)
    for definition in definitions:
        modules[definition.name].add(definition.module)
    return {
        d
        for d in definitions
        if not d.owner and "." not in d.module and len(modules[d.name]) == 1 and not hasattr(builtins, d.name)
    }


def _sorted_closed_book(pool: Pool) -> Pool:
    ordered = tuple(sorted(pool.closed_book, key=lambda d: (d.module, d.name, d.text)))
    return Pool(pool.definitions, pool.words, pool.pairs, ordered)
