"""A stream gives the windows of the shards read in order, whoever reads how much of it, or says that it is another."""

import json
import random

import numpy as np
import pytest
import torch

from hf_scratch_gpt.data import prepare, streaming
from hf_scratch_gpt.data.loader import _read_windows
from hf_scratch_gpt.data.shards import TokenShards
from hf_scratch_gpt.data.streaming import StreamWindows, stream_cleaning
from hf_scratch_gpt.model import ScratchGPTTokenizer

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "<|endoftext|>", "tags", "é", "漢"]
LENGTH, BATCH = 16, 4


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts), encoding="utf-8")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of two files; some documents are to be cleaned, and some to be removed."""
    chance = random.Random(0)
    texts = [f"{number} " + " ".join(chance.choices(WORDS, k=chance.randint(5, 60))) for number in range(200)]
    texts[3] += " \x01\x02 and someone@mail.com"
    texts[7:7] = ["", "   "]
    folder = tmp_path_factory.mktemp("source")
    write_rows(folder / "a.jsonl", texts[:90])
    write_rows(folder / "b.jsonl", texts[90:])
    return folder


@pytest.fixture(scope="module")
def prepared(source, tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    ScratchGPTTokenizer.train([" ".join(WORDS) * 20], 300).save_pretrained(root / "tokenizer")
    return prepare.run(
        prepare.Arguments(
            output_dir=str(root / "prepare"),
            sources=[str(source)],
            text_column="body",
            tokenizer_dir=str(root / "tokenizer"),
            heldout_fraction=0.1,
            filters=["control_characters", "empty", "personal_data", "exact_duplicates"],
            shard_tokens=1000,
            num_workers=1,
        )
    )


@pytest.fixture(scope="module")
def tokenizer(prepared):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(prepared)


@pytest.fixture(scope="module")
def heldout(prepared):
    return [json.loads(line)["text"] for line in (prepared / "heldout.jsonl").read_text().splitlines()]


@pytest.fixture
def make_stream(prepared, source, tokenizer, heldout):
    def make(sources=None, **changes):
        settings = {"context_length": LENGTH, "batch_size": BATCH, "text_column": "body", **changes}
        cleaning = stream_cleaning(TokenShards(prepared).manifest, prepared)
        return StreamWindows(sources or [str(source)], tokenizer, cleaning, heldout, **settings)

    return make


def test_a_stream_gives_the_windows_of_the_shards_in_order(make_stream, prepared, monkeypatch):
    monkeypatch.setattr(streaming, "_CHUNK_CHARACTERS", 500)
    shards, stream = TokenShards(prepared, "train"), make_stream()
    batches = len(shards) // (LENGTH * BATCH)
    assert batches > 40
    for number in range(batches):
        starts = (number * BATCH + np.arange(BATCH)) * LENGTH
        expected = _read_windows(shards, starts, LENGTH, respect_documents=True)
        windows = stream.batch(number)
        assert windows.keys() == expected.keys()
        assert all(torch.equal(windows[name], expected[name]) for name in expected), number
    with pytest.raises(ValueError, match=rf"ends after {len(shards)} tokens, {batches} batches of 64, before the run"):
        stream.batch(batches)
    assert stream.removed["heldout_documents"] == shards.manifest["splits"]["heldout"]["documents"] > 10
    removed = {name: count for name, count in shards.manifest["removed"].items() if count}
    assert removed == {name: count for name, count in stream.removed.items() if name != "heldout_documents"}
    assert sorted(removed.values()) == [1, 2, 2]


@pytest.mark.parametrize("characters", [1, 3000, 10**9])
def test_the_windows_do_not_depend_on_the_pieces_that_are_encoded(make_stream, monkeypatch, characters):
    expected = [make_stream().batch(number)["input_ids"] for number in (0, 20)]
    monkeypatch.setattr(streaming, "_CHUNK_CHARACTERS", characters)
    assert all(map(torch.equal, expected, [make_stream().batch(number)["input_ids"] for number in (0, 20)]))


def test_processes_share_a_batch(make_stream):
    for number in (0, 5):
        whole = make_stream().batch(number)
        parts = [make_stream().batch(number, rank, 2) for rank in (0, 1)]
        for name, tensor in whole.items():
            assert torch.equal(torch.cat([part[name] for part in parts]), tensor)


def test_any_order_of_asking_gives_the_same_batches(make_stream):
    expected = {number: make_stream().batch(number)["input_ids"] for number in (0, 3, 9)}
    stream = make_stream()
    for number in (3, 3, 9, 0, 0, 9, 3):
        assert torch.equal(stream.batch(number)["input_ids"], expected[number])


def test_several_sources_follow_each_other(make_stream, source):
    files = [str(source / name) for name in ("a.jsonl", "b.jsonl")]
    stream, expected = make_stream(files), make_stream()
    assert all(
        torch.equal(stream.batch(number)["input_ids"], expected.batch(number)["input_ids"]) for number in (2, 40)
    )


def test_a_stream_that_has_changed_is_refused_and_one_that_has_grown_is_not(make_stream, source, tmp_path):
    stream = make_stream()
    stream.batch(30)
    known = stream.position
    assert known[0] == 31
    following = stream.batch(31)["input_ids"]
    rows = [line for name in ("a", "b") for line in (source / f"{name}.jsonl").read_text().splitlines()]

    def again(rows):
        (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
        return make_stream([str(tmp_path / "rows.jsonl")]).batch(31, known=known)["input_ids"]

    assert torch.equal(again(rows), following)
    assert torch.equal(again([*rows, '{"body": "more of it"}']), following)
    swapped = [rows[1], rows[0], *rows[2:]]
    with pytest.raises(ValueError, match=r"rows.jsonl: has changed: the first 1984 tokens, .* are others now"):
        again(swapped)
    with pytest.raises(ValueError, match=r"rows.jsonl: has changed: the first 1984 tokens, .* are fewer now"):
        again(rows[:20])


def test_a_page_that_repeats_others_is_left_out(make_stream, monkeypatch):
    from hf_scratch_gpt.data.documents import Document

    documents = [Document(str(n), f"document {n} of several", "s", derived=n % 2 == 1) for n in range(100)]
    monkeypatch.setattr(streaming, "read_documents", lambda *_: iter(documents))
    stream = make_stream(["s"])
    text = stream._encoder.encode([f"document {n} of several" for n in range(0, 100, 2)])
    ids = np.concatenate([part for ids in text for part in (ids, stream._separator)])
    assert stream.batch(3)["input_ids"].flatten().tolist() == ids[192:256].tolist()
    assert stream.removed["derived_documents"] >= 1


def test_a_folder_that_does_not_tell_its_filters_is_refused():
    with pytest.raises(ValueError, match=r"old: does not tell its filters"):
        stream_cleaning({"splits": {}}, "old")
