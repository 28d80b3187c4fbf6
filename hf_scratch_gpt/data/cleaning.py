"""Cleaning: small named filters, each of which counts what it removed."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from hf_scratch_gpt.data.documents import Document

# Everything that no writer means to write: C0 but tab and newline, DEL, C1, byte order marks, lone surrogates.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
_LEGAL = re.compile(
    r"copyright\b.{0,40}?(\(c\)|©|\d{4}|holder)|\(c\) (copyright|\d{4})|spdx-license|all rights reserved"
    r"|licensed (to|under)|permission (is hereby granted|to use, copy)|\b(under|see|of) .{0,60}?\blicen[cs]e\b",
    re.IGNORECASE | re.DOTALL,
)
# One block of comment at the start of a text: of lines after # or //, or between /* */ or <!-- -->.
_LINE_COMMENT = re.compile(r"\s*?((?:[ \t]*(?:#|//)[^\n]*(?:\n|\Z))+)")
_BLOCK_COMMENT = re.compile(r"\s*(/\*.*?\*/|<!--.*?-->)\n?", re.DOTALL)


def remove_control_characters(text: str) -> tuple[str, int]:
    """The text with `\\n` line ends and without control characters and lone surrogates, and how many it had."""
    return _CONTROL.subn("", text.replace("\r\n", "\n").replace("\r", "\n"))


def remove_licence_headers(text: str, markdown: bool = False) -> tuple[str, int]:
    """Drop the comment blocks at the start of `text` that state a copyright or a licence; other comments stay.

    Args:
        text (`str`): Source code, or any text.
        markdown (`bool`, *optional*, defaults to `False`): `#` begins a heading and not a comment.
    """
    kept, removed, position = [], 0, 0
    while True:
        match = _BLOCK_COMMENT.match(text, position)
        if match is None and not markdown:
            match = _LINE_COMMENT.match(text, position)
        if match is None:
            break
        if _LEGAL.search(re.sub(r"\s+(#+|//+|\*)?\s*", " ", match[1])):
            removed += 1
            shebang = re.match(r"#![^\n]*\n", match[1])
            kept.append(shebang[0] if shebang else "")
        else:
            kept.append(match[0])
        position = match.end()
    return ("".join(kept) + text[position:], removed) if removed else (text, 0)


def content_hash(text: str) -> bytes:
    """Hash of the text with its whitespace made uniform; equal for texts that differ in nothing a reader sees."""
    return hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()


class Cleaner:
    """Applies all filters to a stream of documents.

    Attributes:
        removed (`Counter`): What was removed so far: `control_characters` and `licence_headers` count places in
            documents that were kept, `empty_documents` and `duplicate_documents` whole documents.
    """

    def __init__(self) -> None:
        self.removed: Counter[str] = Counter(
            control_characters=0, licence_headers=0, empty_documents=0, duplicate_documents=0
        )
        self._seen: set[bytes] = set()

    def _clean_text(self, document: Document) -> str:
        text, controls = remove_control_characters(document.text)
        text, headers = remove_licence_headers(text, markdown=document.id.partition("#")[0].endswith(".md"))
        self.removed["control_characters"] += controls
        self.removed["licence_headers"] += headers
        return text.strip("\n").rstrip()

    def clean(self, documents: Iterable[Document]) -> Iterator[Document]:
        """Yield the documents that remain, cleaned."""
        for document in documents:
            text = self._clean_text(document)
            if not text.strip():
                self.removed["empty_documents"] += 1
                continue
            digest = content_hash(text)
            if digest in self._seen:
                self.removed["duplicate_documents"] += 1
                continue
            self._seen.add(digest)
            yield replace(document, text=text)
