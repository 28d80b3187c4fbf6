"""The stage `prepare`: what it writes is the text, split as the tokenizer's, and a kill leaves all or nothing."""

import gzip
import json
import lzma
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from transformers import AutoTokenizer

from hf_scratch_gpt.data import prepare, tokenised, tokenizer_stage, workers
from hf_scratch_gpt.data.corpus import Corpus
from hf_scratch_gpt.data.manifest import read_manifest
from hf_scratch_gpt.data.shards import TokenShards, tokenizer_fingerprint
from hf_scratch_gpt.runs import read_metrics

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "<|endoftext|>", "tags", "é", "漢"]


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    chance = random.Random(0)
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = ({"text": " ".join(chance.choices(WORDS, k=chance.randint(5, 60)))} for _ in range(200))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def tokenizer_folder(text, tmp_path_factory):
    settings = {"sources": [str(text)], "vocab_size": 320, "heldout_fraction": 0.1}
    return tokenizer_stage.run(
        tokenizer_stage.Arguments(output_dir=str(tmp_path_factory.mktemp("run") / "tokenizer"), **settings)
    )


def arguments(folder, text, tokenizer_folder, **settings):
    defaults = {"heldout_fraction": 0.1, "shard_tokens": 500, "tokenizer_dir": str(tokenizer_folder)}
    return prepare.Arguments(output_dir=str(folder), sources=[str(text)], **(defaults | settings))


@pytest.fixture(scope="module")
def prepared(text, tokenizer_folder, tmp_path_factory):
    return prepare.run(arguments(tmp_path_factory.mktemp("run") / "prepare", text, tokenizer_folder))


def documents_in(folder, split):
    """The documents of a split, decoded from its shards."""
    shards = TokenShards(folder, split)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    documents, ids = [], []
    for token in shards.read(0, len(shards)).tolist():
        if token == shards.separator_id:
            documents.append(tokenizer.decode(ids))
            ids = []
        else:
            ids.append(token)
    assert not ids, "the last document has no separator"
    return documents


def test_the_shards_hold_each_document_exactly_and_in_its_split(prepared, text, tokenizer_folder):
    expected: dict[str, list[str]] = {"train": [], "heldout": []}
    for split, document in Corpus(arguments("unused", text, tokenizer_folder)):
        expected[split].append(document.text)
    assert len(expected["heldout"]) > 5
    assert any("<|endoftext|>" in document for document in expected["heldout"])
    for split in expected:
        assert documents_in(prepared, split) == expected[split]


def test_the_held_out_file_is_the_held_out_split(prepared):
    rows = [json.loads(line) for line in (prepared / "heldout.jsonl").read_text().splitlines()]
    assert [row["text"] for row in rows] == documents_in(prepared, "heldout")
    assert set(rows[0]) == {"text", "source", "id"}
    entry = read_manifest(prepared)["splits"]["heldout"]
    assert entry["bytes"] == sum(len(row["text"].encode()) for row in rows)
    assert entry["documents"] == len(rows)


def test_the_manifest_describes_the_tokenizer_and_the_shards(prepared, tokenizer_folder):
    manifest = read_manifest(prepared)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    assert manifest["tokenizer_fingerprint"] == tokenizer_fingerprint(tokenizer)
    assert (manifest["vocab_size"], manifest["dtype"]) == (len(tokenizer), "uint16")
    assert len(manifest["splits"]["train"]["shards"]) > 3


def test_the_compressors_are_measured_on_exactly_the_held_out_text(prepared):
    heldout = "".join(documents_in(prepared, "heldout")).encode()
    measured = read_metrics(prepared)["metrics"]["heldout_compression"]
    assert measured["bytes"] == len(heldout)
    assert measured["gzip_bits_per_byte"] == pytest.approx(8 * len(gzip.compress(heldout, 9)) / len(heldout))
    # The command-line tool's own dictionary size gives the same stream but for a byte of header.
    assert measured["xz_bits_per_byte"] == pytest.approx(
        8 * len(lzma.compress(heldout, preset=9)) / len(heldout), rel=0.01
    )


def test_a_text_of_one_byte_has_its_compression_too():
    assert prepare.compression(b"a")["bytes"] == 1


def test_a_group_is_held_out_or_trained_on_as_a_whole(tmp_path, tokenizer_folder):
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"fox {row} of project {row % 20}", "project": f"p{row % 20}"} for row in range(100)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"group_column": "project", "heldout_fraction": 0.3}
    folder = prepare.run(arguments(tmp_path / "prepare", path, tokenizer_folder, **settings))
    groups = {split: {text.split()[-1] for text in documents_in(folder, split)} for split in ("train", "heldout")}
    assert groups["train"] | groups["heldout"] == {str(number) for number in range(20)}
    assert len(groups["heldout"]) > 1
    assert not groups["train"] & groups["heldout"]


def test_another_split_than_the_tokenizers_is_refused(tmp_path, text, tokenizer_folder):
    for changed in ({"seed": 1}, {"heldout_fraction": 0.2}, {"group_column": "text"}):
        with pytest.raises(ValueError, match="held-out text would have trained the tokenizer"):
            prepare.run(arguments(tmp_path / "prepare", text, tokenizer_folder, **changed))
    other = tmp_path / "other.jsonl"
    other.write_bytes(text.read_bytes())
    prepare.run(arguments(tmp_path / "prepare", other, tokenizer_folder, seed=1))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_dir": ""}, "'tokenizer_dir' is missing"),
        ({"tokenizer_dir": "nowhere"}, "nowhere: no tokenizer here"),
        ({"tasks": "chess"}, "'tasks' is 'chess'"),
        ({"shard_tokens": 0}, "'shard_tokens' is 0"),
    ],
)
def test_a_wrong_setting_is_one_clear_error(tmp_path, text, tokenizer_folder, settings, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare.run(arguments(tmp_path / "prepare", text, tokenizer_folder, **settings))


def test_tasks_are_written_when_asked_for(tmp_path, text, tokenizer_folder, monkeypatch):
    from hf_scratch_gpt.data import tasks

    def write_tasks(folder, seed):
        folder.mkdir()
        (folder / "train.jsonl").write_text(f"{seed}")
        return {"train": {"arithmetic": 1}}

    monkeypatch.setattr(tasks, "write_tasks", write_tasks)
    folder = prepare.run(arguments(tmp_path / "prepare", text, tokenizer_folder, tasks="python-docs"))
    assert (folder / "tasks" / "train.jsonl").read_text() == "42"
    assert read_metrics(folder)["metrics"]["tasks"] == {"train": {"arithmetic": 1}}


def test_an_error_half_way_leaves_nothing_that_looks_finished(tmp_path, text, tokenizer_folder):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(text.read_text() + "{")
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 201: not valid JSON"):
        prepare.run(arguments(tmp_path / "prepare", broken, tokenizer_folder))
    with pytest.raises(FileNotFoundError):
        TokenShards(tmp_path / "prepare")
    broken.write_text(text.read_text())
    assert len(documents_in(prepare.run(arguments(tmp_path / "prepare", broken, tokenizer_folder)), "train")) > 100


@pytest.mark.parametrize(
    "name", ["manifest.json", "heldout.jsonl", "data_report.json", "tokenizer.json", "train/shard-00001.starts.npy"]
)
def test_a_finished_folder_that_is_damaged_is_made_anew(tmp_path, text, tokenizer_folder, prepared, caplog, name):
    folder = tmp_path / "prepare"
    shutil.copytree(prepared, folder)
    settings = arguments(folder, text, tokenizer_folder, num_workers=1)
    run_id = read_metrics(prepare.run(settings))["run_id"]
    assert run_id == read_metrics(prepared)["run_id"], "a whole folder is left as it is"
    content = bytearray((folder / name).read_bytes())
    content[-3] ^= 1
    (folder / name).write_bytes(content)
    assert read_metrics(prepare.run(settings))["run_id"] != run_id
    assert f"{folder}: made anew, since it is damaged: {folder}/{name}" in caplog.text
    assert files_in(folder) == files_in(prepared)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of a few documents, so that a small corpus has many, and workers from the first one on."""
    monkeypatch.setattr(prepare, "_CHUNK_CHARACTERS", 1000)
    monkeypatch.setattr(workers, "CHUNKS_BEFORE_WORKERS", 0)


def files_in(folder):
    """Every file that a reader of the folder looks at, but for those that tell the time."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name not in ("metrics.json", "recipe.yaml")
    }


class Stopped(Exception):
    """The end of a try."""


@pytest.mark.parametrize("chunks", [0, 1, 7, 20, 28])
def test_what_was_stopped_goes_on_from_there_and_ends_equal(
    tmp_path, text, tokenizer_folder, prepared, small_chunks, monkeypatch, chunks
):
    monkeypatch.setattr(tokenised, "_SECONDS_BETWEEN_NOTES", 1e9)  # finished shards alone are noted
    add, count = tokenised.TokenisedFolder.add, iter(range(10**9))

    def stop_after(self, chunk, position):
        if next(count) == chunks:
            self._writers["train"].extend(np.array([7, 8, 0], "<u2"), 1, 2)  # of a chunk that is not noted
            raise Stopped
        add(self, chunk, position)

    settings = arguments(tmp_path / "prepare", text, tokenizer_folder, num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(tokenised.TokenisedFolder, "add", stop_after)
        with pytest.raises(Stopped):
            prepare.run(settings)
    written = {
        path: path.stat().st_mtime_ns
        for path in (tmp_path / "prepare" / "train").glob("*.starts.npy")  # written with the end of its shard
    }
    assert bool(written) == (chunks > 5)
    folder = prepare.run(settings)
    assert files_in(folder) == files_in(prepared)
    kept = [path for path, written_at in written.items() if path.stat().st_mtime_ns == written_at]
    assert len(kept) >= len(written) - 1
    assert read_metrics(folder)["metrics"] == read_metrics(prepared)["metrics"]


def test_a_damaged_shard_of_an_interrupted_try_is_named_and_all_made_anew(
    tmp_path, text, tokenizer_folder, prepared, small_chunks, monkeypatch, caplog
):
    settings = arguments(tmp_path / "prepare", text, tokenizer_folder, num_workers=1)
    with monkeypatch.context() as patch:
        patch.setattr(tokenised.TokenisedFolder, "close", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare.run(settings)
    shard = tmp_path / "prepare" / "train" / "shard-00001.bin"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    folder = prepare.run(settings)
    assert "shard-00001.bin: content does not match its checksum" in caplog.text
    assert files_in(folder) == files_in(prepared)


@pytest.mark.parametrize("num_workers", [1, 2, 3])
def test_the_shards_do_not_depend_on_the_workers(
    tmp_path, text, tokenizer_folder, prepared, small_chunks, num_workers
):
    folder = prepare.run(arguments(tmp_path / "prepare", text, tokenizer_folder, num_workers=num_workers))
    assert files_in(folder) == files_in(prepared)


SECOND = "my card is 4111 1111 1111 1111 and my address someone@example.org, "


@pytest.fixture(scope="module")
def dirty_text(tmp_path_factory):
    """A text in which each of `MANY_FILTERS` finds something, nearly everywhere."""
    chance = random.Random(1)
    path = tmp_path_factory.mktemp("text") / "dirty.jsonl"
    texts: list[str] = []
    for number in range(200):
        words = chance.choices([f"{word}{suffix}" for word in WORDS for suffix in ("", "ing", "er")], k=60)
        text = "that of the rest, " + " ".join(words) + "\x00" * (number % 3 == 0) + SECOND * (number % 5 == 0)
        copied = texts[6 * chance.randrange(number // 6)] if number >= 6 else text
        texts.append([text, text, copied, f"{copied} indeed", "# " * 30, "too short"][number % 6])
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


MANY_FILTERS = ["control_characters", "licence_headers", "empty", {"gopher_quality": {"min_words": 20}}]
MANY_FILTERS += ["personal_data", "exact_duplicates", {"minhash_duplicates": {"ngram": 3, "hashes": 64}}]


def many_filters(folder, text, tokenizer_folder, **settings):
    return arguments(folder, text, tokenizer_folder, **({"filters": MANY_FILTERS, "num_workers": 1} | settings))


@pytest.fixture(scope="module")
def cleaned(dirty_text, tokenizer_folder, tmp_path_factory):
    return prepare.run(many_filters(tmp_path_factory.mktemp("run") / "prepare", dirty_text, tokenizer_folder))


def test_what_many_filters_leave_is_what_one_process_leaves(cleaned, dirty_text, tokenizer_folder):
    corpus = Corpus(many_filters("unused", dirty_text, tokenizer_folder))
    expected: dict[str, list[str]] = {"train": [], "heldout": []}
    for split, document in corpus:
        expected[split].append(document.text)
    assert {split: documents_in(cleaned, split) for split in expected} == expected
    removed = read_manifest(cleaned)["removed"]
    assert removed == dict(corpus.removed)
    names = ("control_characters", "gopher_quality_documents", "personal_data", "duplicate_documents")
    assert all(removed[name] > 5 for name in (*names, "near_duplicate_documents")), removed
    report = json.loads((cleaned / "data_report.json").read_text())
    assert report["kept"]["documents"] == sum(map(len, expected.values()))
    assert report["kept"]["sizes"]["characters"]["mean"] * report["kept"]["documents"] == pytest.approx(
        sum(len(text) for texts in expected.values() for text in texts)
    )


@pytest.mark.parametrize("num_workers", [2, 3])
def test_the_data_report_does_not_depend_on_the_workers(
    tmp_path, dirty_text, tokenizer_folder, cleaned, small_chunks, num_workers
):
    folder = prepare.run(many_filters(tmp_path / "prepare", dirty_text, tokenizer_folder, num_workers=num_workers))
    assert "data_report.json" in files_in(folder)
    assert files_in(folder) == files_in(cleaned)
    assert read_metrics(folder)["metrics"] == read_metrics(cleaned)["metrics"]


@pytest.mark.parametrize("chunks", [1, 8, 15])
def test_the_data_report_of_what_was_stopped_is_the_same(
    tmp_path, dirty_text, tokenizer_folder, cleaned, small_chunks, monkeypatch, chunks
):
    monkeypatch.setattr(tokenised, "_SECONDS_BETWEEN_NOTES", -1.0)  # each chunk is noted
    monkeypatch.setattr(tokenised, "_GREATEST_SHARE_OF_NOTES", 1e9)
    add, count = tokenised.TokenisedFolder.add, iter(range(10**9))

    def stop_after(self, chunk, position):
        if next(count) == chunks:
            self.cleaning.add(chunk)  # not noted
            raise Stopped
        add(self, chunk, position)

    settings = many_filters(tmp_path / "prepare", dirty_text, tokenizer_folder)
    with monkeypatch.context() as patch:
        patch.setattr(tokenised.TokenisedFolder, "add", stop_after)
        with pytest.raises(Stopped):
            prepare.run(settings)
    noted = json.loads((tmp_path / "prepare" / ".journal.json").read_text())["cleaning"]
    assert noted["duplicates"]["minhash_duplicates"]["tally"]["documents"] > 0
    monkeypatch.setattr(tokenised.TokenisedFolder, "_begin", lambda self: 1 / 0)
    folder = prepare.run(settings)
    assert files_in(folder) == files_in(cleaned)
    assert read_metrics(folder)["metrics"] == read_metrics(cleaned)["metrics"]


def test_a_file_name_that_is_not_utf8_is_written_with_escapes(tmp_path, tokenizer_folder):
    sources = tmp_path / "sources"
    sources.mkdir()
    for number in range(20):
        try:
            path = os.fsencode(sources) + b"/\xff%d.txt" % number
            Path(os.fsdecode(path)).write_text(f"text with \x01 number {number}")
        except OSError:
            pytest.skip("the file system takes only UTF-8")
    settings = arguments(tmp_path / "prepare", sources, tokenizer_folder, heldout_fraction=0.3)
    folder = prepare.run(settings)
    rows = [json.loads(line) for line in (folder / "heldout.jsonl").read_text().splitlines()]
    assert rows
    assert all("\\udcff" in row["id"] for row in rows), rows[0]
    assert [row["text"] for row in rows] == [d.text for split, d in Corpus(settings) if split == "heldout"]


def test_a_worker_that_dies_names_its_documents(tmp_path, text, tokenizer_folder, small_chunks, monkeypatch):
    def die(connection, settings):
        connection.recv()
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(workers, "_METHOD", "fork")  # to take the patched function along
    monkeypatch.setattr(workers, "_serve", die)
    with pytest.raises(OSError, match=r"worker process \d+ died \(exit status -9\) at documents text.jsonl:1 of"):
        prepare.run(arguments(tmp_path / "prepare", text, tokenizer_folder, num_workers=2))


def test_an_error_in_a_worker_is_the_error(tmp_path, text, tokenizer_folder, small_chunks):
    broken = tmp_path / "broken.jsonl"
    broken.write_text(text.read_text() + '{"text": "' + "control \\ud800" * 3 + '"}\n{"words": "none"}\n')
    with pytest.raises(ValueError, match=r"broken.jsonl, line 202: no column 'text'"):
        prepare.run(arguments(tmp_path / "prepare", broken, tokenizer_folder, num_workers=2))


SLOWED = """
import json, sys, time
from hf_scratch_gpt.data import prepare, tokenised, workers
prepare._CHUNK_CHARACTERS, workers.CHUNKS_BEFORE_WORKERS = 1000, 0
add = tokenised.TokenisedFolder.add
def slow_add(self, chunk, position):
    add(self, chunk, position)
    print(position.documents, flush=True)
    time.sleep(0.01)
tokenised.TokenisedFolder.add = slow_add
prepare.run(prepare.Arguments(**json.loads(sys.argv[1])))
"""


def test_after_a_kill_the_same_command_gives_the_same_shards(tmp_path, text, tokenizer_folder, prepared):
    folder = tmp_path / "prepare"
    settings = vars(arguments(folder, text, tokenizer_folder, num_workers=2))
    process = subprocess.Popen(
        [sys.executable, "-c", SLOWED, json.dumps(settings)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) > 50:
            break
    workers_of_it = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    with pytest.raises(FileNotFoundError, match="run the stage 'prepare' first"):
        TokenShards(folder)
    kept = (folder / "train" / "shard-00000.bin").stat().st_mtime_ns
    prepare.run(arguments(folder, text, tokenizer_folder))
    assert (folder / "train" / "shard-00000.bin").stat().st_mtime_ns == kept
    assert files_in(folder) == files_in(prepared)
    assert len(workers_of_it) >= 2
    _, alive = psutil.wait_procs(workers_of_it, 100)
    assert not alive, "workers outlive the process that they work for"


def test_tinyshakespeare_goes_through_both_stages(tmp_path):
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    source = Path(os.environ.get("SCRATCH_GPT_TEST_DATA", default)) / "tinyshakespeare.txt"
    if not source.is_file():
        pytest.skip("no tinyshakespeare.txt; set SCRATCH_GPT_TEST_DATA to the folder of the test data")
    began = time.monotonic()
    tokenizer_folder = tokenizer_stage.run(
        tokenizer_stage.Arguments(output_dir=str(tmp_path / "tokenizer"), sources=[str(source)], vocab_size=1024)
    )
    folder = prepare.run(
        prepare.Arguments(
            output_dir=str(tmp_path / "prepare"), sources=[str(source)], tokenizer_dir=str(tokenizer_folder)
        )
    )
    assert time.monotonic() - began < 60
    text = source.read_text(encoding="utf-8")
    pieces = [*documents_in(folder, "train"), *documents_in(folder, "heldout")]
    assert all(piece in text for piece in pieces)
    assert sum(len(piece.split()) for piece in pieces) == pytest.approx(len(text.split()), abs=len(pieces))
