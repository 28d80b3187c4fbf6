"""Each filter removes what its name says, counts it, and leaves the rest alone; the split is fair and stable."""

import pytest

from hf_scratch_gpt.data.cleaning import Cleaner, remove_control_characters, remove_licence_headers
from hf_scratch_gpt.data.corpus import Corpus, CorpusArguments
from hf_scratch_gpt.data.documents import Document, is_heldout


def clean(*texts: str, suffix: str = ""):
    cleaner = Cleaner()
    documents = [Document(f"{number}{suffix}", text, "test") for number, text in enumerate(texts)]
    return [document.text for document in cleaner.clean(documents)], cleaner.removed


def test_what_is_clean_stays_as_it_is():
    texts = ("def f():\n\treturn 'é 漢 😀'", "# A comment\n\nimport os", "# License to think\n\nA text.")
    kept, removed = clean(*texts)
    assert kept == list(texts)
    assert not removed.total()


def test_each_filter_counts_what_it_removed():
    kept, removed = clean("one\x00\x0c\ufeff\n", " \n\t", "two", " two \n", "# Copyright (c) 2001 X\n\nthree", "two")
    assert kept == ["one", "two", "three"]
    assert removed == {
        "control_characters": 3,
        "licence_headers": 1,
        "empty_documents": 1,
        "duplicate_documents": 2,
    }


def test_control_characters_go_and_line_ends_become_one():
    assert remove_control_characters("a\r\nb\rc\td\x1b\x7f\x85\ud800") == ("a\nb\nc\td", 4)


HEADER = "# module.py\n#\n# Copyright 2001-2022 by Somebody.\n# Permission to use, copy, is granted.\n"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEADER + "\nimport os\n", "\nimport os\n"),
        ("#!/usr/bin/python\n" + HEADER + "code", "#!/usr/bin/python\ncode"),
        ("# What it does.\n\n" + HEADER + "\n# Note\ncode", "# What it does.\n\n# Note\ncode"),
        ("/* Copyright (C) 1999 X\n * line */\nint x;", "int x;"),
        ("// SPDX-License-Identifier: MIT\nfn main() {}", "fn main() {}"),
        ("<!-- Licensed to X under Y -->\n<p>", "<p>"),
        ("# Released under the\n# terms of the MIT license.\nx", "x"),
    ],
)
def test_a_licence_header_goes_and_other_comments_stay(text, expected):
    cleaned, removed = remove_licence_headers(text)
    assert cleaned.strip("\n") == expected.strip("\n")
    assert removed == 1


@pytest.mark.parametrize(
    "text", ["x = 1\n" + HEADER, "# Author: me\ncode", '"""Copyright (c) 2001 stays in a docstring."""']
)
def test_what_is_no_header_stays(text):
    assert remove_licence_headers(text) == (text, 0)


def test_a_markdown_heading_is_no_comment():
    text = "# Copyright (c) 2001 and all that\n\nProse."
    assert clean(text, suffix=".md#3")[0] == [text]
    assert clean(text)[0] == ["Prose."]


def test_the_split_has_its_fraction_and_depends_on_seed_and_group_alone():
    groups = [f"group {number}" for number in range(20_000)]
    for seed in (0, 42):
        share = sum(is_heldout(group, seed, 0.03) for group in groups) / len(groups)
        assert abs(share - 0.03) < 0.006
    assert [is_heldout(group, 0, 0.03) for group in groups] != [is_heldout(group, 1, 0.03) for group in groups]
    # A larger fraction only adds to what is held out.
    assert all(is_heldout(group, 0, 0.1) for group in groups if is_heldout(group, 0, 0.03))


def corpus(tmp_path, texts, **settings):
    (tmp_path / "t.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return Corpus(CorpusArguments(sources=[str(tmp_path / "t.jsonl")], **settings))


def test_the_splits_of_a_corpus_share_nothing(tmp_path):
    found = corpus(tmp_path, [f"text {number % 150}" for number in range(200)], heldout_fraction=0.2)
    splits: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for split, document in found:
        splits[split].add(document.text)
    assert len(splits["train"]) + len(splits["heldout"]) == found.documents.total() == 150
    assert not splits["train"] & splits["heldout"]
    assert found.removed["duplicate_documents"] == 50


@pytest.mark.parametrize(("fraction", "empty"), [(1e-9, "heldout"), (1 - 1e-9, "train")])
def test_an_empty_split_is_an_error_that_says_what_to_do(tmp_path, fraction, empty):
    with pytest.raises(ValueError, match=f"none of 3 documents fell into the {empty} part"):
        list(corpus(tmp_path, "abc", heldout_fraction=fraction))


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="'heldout_fraction' is 0"):
        Corpus(CorpusArguments(heldout_fraction=0.0))
    with pytest.raises(ValueError, match="'sources' is empty"):
        Corpus(CorpusArguments(sources=[]))


def test_a_corpus_of_control_characters_is_empty(tmp_path):
    with pytest.raises(ValueError, match="no document is left"):
        list(corpus(tmp_path, ["\\u0001"]))
