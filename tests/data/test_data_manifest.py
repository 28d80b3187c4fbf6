"""A manifest is read only as it was written to the byte, and each file that it lists only whole; the rest is named."""

import json
import random

import pytest

from hf_scratch_gpt.data.manifest import check_file, check_files, find_file, read_manifest, write_manifest

CONTENT = {
    "separator_id": 0,
    "dtype": "uint16",
    "splits": {"train": {"tokens": 1234, "shards": [{"name": "shard-00000.bin", "sha256": "ab" * 32}]}},
    "mixture": {"schön": 0.25, "b": 0.75},
}
FILES = {"heldout.jsonl": b'{"text": "a"}\n', "tokenizer.json": b"{}", "tasks/train.jsonl": b"rows\n", "empty": b""}


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    write_manifest(tmp_path, CONTENT, FILES)
    return tmp_path


def test_what_was_written_is_read(folder):
    manifest = read_manifest(folder)
    assert {name: manifest[name] for name in CONTENT} == CONTENT
    assert {name: entry["size"] for name, entry in manifest["files"].items()} == {
        name: len(content) for name, content in FILES.items()
    }
    check_files(folder, manifest)


def test_no_flipped_bit_of_the_manifest_is_let_through(folder):
    path = folder / "manifest.json"
    whole, still_json = path.read_bytes(), 0
    for place in range(0, 8 * len(whole), 3):  # every third: each byte two or three times
        content = bytearray(whole)
        content[place // 8] ^= 1 << place % 8
        path.write_bytes(content)
        try:
            json.loads(content)
            still_json += 1
        except ValueError:
            pass
        with pytest.raises(ValueError, match=r"manifest\.json.*run the stage 'prepare' again") as caught:
            read_manifest(folder)
        assert "\n" not in str(caught.value)
    assert still_json > len(whole) / 4  # those that a parser alone would have taken


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"separator_id": 0', b'"separator_id": 7'),
        (b'"tokens": 1234', b'"tokens": 12340'),
        (b'"separator_id": 0', b'"separator_id": 0, "separator_id": 0'),
        (b"0.25", b"0.250"),
        (b"0.25", b"NaN"),
        (b'"format": 2', b'"format": 3'),
        (b"}\n", b"}"),
        (b"\xc3\xb6", b"\\u00f6"),
        (b"\xc3\xb6", b"\\udcff"),
    ],
)
def test_a_changed_field_of_the_manifest_is_not_let_through(folder, old, new):
    path = folder / "manifest.json"
    content = path.read_bytes()
    assert old in content
    path.write_bytes(new.join(content.rsplit(old, 1)))
    with pytest.raises(ValueError, match=r"manifest\.json: content does not match its checksum; run the stage"):
        read_manifest(folder)


def test_other_formats_are_refused_as_such(folder):
    path = folder / "manifest.json"
    path.write_text(json.dumps(CONTENT))
    with pytest.raises(ValueError, match=r"manifest\.json: of an earlier version, .*; run the stage 'prepare' again"):
        read_manifest(folder)
    write_manifest(folder, {**CONTENT, "format": 9}, FILES)
    with pytest.raises(ValueError, match=r"manifest\.json: of format 9, expected 2: made by another version"):
        read_manifest(folder)
    for text in ("[]", "7", '{"splits": []'):
        path.write_text(text)
        with pytest.raises(ValueError, match=r"manifest\.json.*run the stage 'prepare' again"):
            read_manifest(folder)


def test_a_damaged_file_is_named(folder):
    manifest = read_manifest(folder)
    for name, content in FILES.items():
        damaged = [b"", content[:-1], content + b"\0"]
        for place in range(8 * len(content)):
            flipped = bytearray(content)
            flipped[place // 8] ^= 1 << place % 8
            damaged.append(bytes(flipped))
        for instead in damaged:
            if instead != content:
                (folder / name).write_bytes(instead)
                with pytest.raises(ValueError, match=f"{name}: .*; run the stage 'prepare' again"):
                    check_files(folder, manifest)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name}: missing; run the stage 'prepare' again"):
            check_files(folder, manifest)
        (folder / name).write_bytes(content)
    check_files(folder, manifest)


def test_a_file_that_the_manifest_does_not_list_is_of_another_try(folder):
    (folder / "tasks" / "heldout.jsonl").write_bytes(b"more")
    for read in (check_file, lambda place, manifest, name: find_file(place, name)):
        with pytest.raises(ValueError, match=r"tasks/heldout\.jsonl: not listed in manifest\.json"):
            read(folder, read_manifest(folder), "tasks/heldout.jsonl")


def test_files_are_checked_only_in_a_folder_of_prepare(folder):
    assert find_file(folder, "tokenizer.json") == folder / "tokenizer.json"
    assert find_file(folder, "config.json") is None
    (folder / "heldout.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match=r"heldout\.jsonl: missing"):
        find_file(folder, "heldout.jsonl")
    (folder / "manifest.json").unlink()  # a folder that somebody made by hand
    assert find_file(folder, "heldout.jsonl") is None
    assert find_file(folder, "tasks/train.jsonl") == folder / "tasks/train.jsonl"
    (folder / "metrics.json").write_text(json.dumps({"run_id": "a", "stage": "prepare"}))
    with pytest.raises(FileNotFoundError, match=r"no manifest\.json"):
        find_file(folder, "tasks/train.jsonl")


def test_the_readers_of_a_prepared_folder_refuse_damaged_tasks(folder):
    from hf_scratch_gpt.data.conversations import load_conversations
    from hf_scratch_gpt.evaluation.arguments import EvaluateArguments
    from hf_scratch_gpt.evaluation.material import load_material

    row = {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}
    pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": row["prompt"]}
    rows = {"tasks/train.jsonl": row, "tasks/heldout.jsonl": row, "tasks/preferences_heldout.jsonl": pair}
    rows["heldout.jsonl"] = {"text": "a text"}
    contents = {name: (json.dumps(value) + "\n").encode() * 4 for name, value in rows.items()}
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    write_manifest(folder, CONTENT, contents)
    names = {"models": ["unused"], "model_names": ["a"], "reference": "a"}
    arguments = EvaluateArguments(output_dir="unused", dataset_dir=str(folder), few_shot=1, **names)
    assert len(load_material(arguments).pairs) == len(load_conversations(folder)) == 4
    draw = random.Random(0)
    for name, content in contents.items():
        cut = content[: content.index(b"\n") + 1]  # whole rows: nothing else would tell
        flipped = bytearray(content)
        flipped[draw.randrange(len(content))] ^= 1
        for instead in (None, b"", cut, bytes(flipped)):
            (folder / name).unlink()
            if instead is not None:
                (folder / name).write_bytes(instead)
            with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: .*; run the stage 'prepare' again"):
                load_material(arguments)
            if name == "tasks/train.jsonl":
                with pytest.raises((ValueError, FileNotFoundError), match=f"{name}: .*; run the stage 'prepare'"):
                    load_conversations(folder)
            (folder / name).write_bytes(content)
