"""Every kind of source gives its documents, and every mistake in one is told by file and place."""

import bz2
import gzip
import json
import lzma
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_scratch_gpt.data.rows import first_bad_byte, read_rows
from hf_scratch_gpt.data.sources import MAX_DOCUMENT_CHARACTERS, read_documents, split_paragraphs


def texts(source, **settings) -> list[str]:
    return [document.text for document in read_documents(str(source), **settings)]


class Lines:
    """A file of given text: `readline` is all that splitting needs."""

    def __init__(self, text: str):
        self.text, self.position = text, 0

    def readline(self, limit: int) -> str:
        end = self.text.find("\n", self.position) + 1 or len(self.text)
        start, self.position = self.position, min(end, self.position + limit)
        return self.text[start : self.position]


@given(st.text(alphabet="ab \n", max_size=300), st.integers(1, 40))
def test_pieces_join_to_the_text_and_respect_the_limit(text, limit):
    pieces = list(split_paragraphs(Lines(text), limit))
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit for piece in pieces)


def test_pieces_end_where_paragraphs_end():
    text = "one\n\ntwo\ntwo\n\nthree\n\nfour\n"
    assert list(split_paragraphs(Lines(text), 16)) == ["one\n\ntwo\ntwo\n\n", "three\n\nfour\n"]


def test_a_paragraph_above_the_limit_is_split_at_line_ends():
    assert list(split_paragraphs(Lines("a\n\nbbbb\ncccc\ndddd\n"), 10)) == ["a\n\n", "bbbb\ncccc\n", "dddd\n"]


def test_a_large_single_file_becomes_about_200_documents_of_bounded_size(tmp_path):
    path = tmp_path / "long.txt"
    path.write_text("".join(f"Paragraph {number} says something of its own.\n\n" for number in range(10_000)))
    documents = list(read_documents(str(path)))
    assert 190 <= len(documents) <= 230
    assert "".join(document.text for document in documents) == path.read_text()
    assert len({document.id for document in documents}) == len(documents)
    assert max(len(document.text) for document in documents) <= MAX_DOCUMENT_CHARACTERS


def test_a_folder_is_read_recursively_in_the_order_of_names(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "second.md").write_text("second")
    (tmp_path / "a.py").write_text("first")
    (tmp_path / "c.jsonl").write_text('{"text": "third"}\n\n{"text": null}\n')
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    (tmp_path / ".hidden.txt").write_text("hidden")
    assert texts(tmp_path) == ["first", "second", "third", ""]
    assert "ignoring 1 files" in caplog.text
    assert "1 of .png" in caplog.text


def test_tables_of_all_kinds_hold_the_same_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"n": 1, "body": "first, with a comma"}, {"n": 2, "body": "second é 漢"}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "t.csv").write_text('n,body\n1,"first, with a comma"\n2,second é 漢\n', encoding="utf-8")
    (tmp_path / "t.tsv").write_text("n\tbody\n1\tfirst, with a comma\n2\tsecond é 漢\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "t.parquet")
    for suffix in ("jsonl", "json", "csv", "tsv", "parquet"):
        assert texts(tmp_path / f"t.{suffix}", text_column="body") == [row["body"] for row in rows], suffix


def test_a_table_without_header_takes_a_column_number(tmp_path):
    (tmp_path / "spam.tsv").write_text('ham\t"quoted at the start\nspam\twin\n')
    assert texts(tmp_path / "spam.tsv", text_column="2") == ['"quoted at the start', "win"]


def compress(content: bytes, suffix: str) -> bytes:
    if suffix == ".zst":
        import pyarrow

        return pyarrow.compress(content, codec="zstd", asbytes=True)
    return {".gz": gzip, ".bz2": bz2, ".xz": lzma}[suffix].compress(content)


COMPRESSIONS = [".gz", ".bz2", ".xz", ".zst"]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_compressed_file_holds_what_the_plain_one_does(tmp_path, suffix):
    contents = {
        "a.txt": b"\xef\xbb\xbfone \xc3\xa9\n",
        "b.jsonl": b'{"text": "two"}\n{"text": "three"}\n',
        "c.csv": b'n,text\n1,"four\nlines"\n',
    }
    for name, content in contents.items():
        (tmp_path / f"{name}{suffix}").write_bytes(compress(content, suffix))
    (tmp_path / "d.md").write_text("five")
    (tmp_path / "e.parquet.gz").write_bytes(b"no kind that is read")
    assert texts(tmp_path) == ["one é\n", "two", "three", "four\nlines", "five"]
    assert texts(tmp_path / f"b.jsonl{suffix}") == ["two", "three"]


@pytest.mark.parametrize("suffix", COMPRESSIONS)
def test_a_compressed_file_that_is_cut_short_or_of_another_kind_is_named(tmp_path, suffix):
    path = tmp_path / f"t.txt{suffix}"
    whole = compress(bytes(range(32, 127)) * 2000, suffix)
    for content in (whole[: len(whole) // 2], b"plain text, no more"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"t\.txt{suffix}: not a whole {suffix} file"):
            texts(path)
    path.write_bytes(compress(b"caf\xe9", suffix))
    with pytest.raises(ValueError, match="not UTF-8 at byte 3"):
        texts(path)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        texts(path)


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts(tmp_path / "t.txt") == ["hello"]


@given(st.binary(max_size=50))
def test_the_first_bad_byte_is_where_python_finds_it(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.bin"
    path.write_bytes(content)
    try:
        content.decode("utf-8")
        expected = None
    except UnicodeDecodeError as error:
        expected = error.start
    assert first_bad_byte(path) == expected


def test_the_first_bad_byte_is_counted_across_blocks(tmp_path):
    path = tmp_path / "t.txt"
    path.write_bytes(b"a" * (2**20 - 1) + "é".encode() + b"ab\xff")
    assert first_bad_byte(path) == 2**20 + 3


MISTAKES = {
    "latin1.txt": (b"caf\xe9", "not UTF-8 at byte 3"),
    "empty.txt": (b" \n", "holds no text"),
    "bad.jsonl": (b'{"text": "a"}\n{"text": \n', "line 2: not valid JSON"),
    "list.jsonl": (b"[1]\n", "line 1: expected an object"),
    "number.jsonl": (b'{"text": 3}\n', "line 1: column 'text' holds int"),
    "column.jsonl": (b'{"texts": "a"}\n', "no column 'text'; did you mean 'texts'"),
    "object.json": (b'{"text": "a"}', "expected a list of objects, found dict"),
    "ragged.csv": (b"n,text\n1,a\n2\n", "line 3: 1 columns, expected 2"),
    "headless.csv": (b"hello,world\n1,2\n", "a file without a header line takes a column number"),
    "nonsense.parquet": (b"no parquet", "not a readable parquet file"),
    "picture.png": (b"\x89PNG", "cannot read '.png' files; supported are .txt"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_names_the_file_and_the_place(tmp_path, name):
    content, message = MISTAKES[name]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        texts(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_source_is_told_apart_from_a_data_set(tmp_path):
    for source in (str(tmp_path / "nothing"), "nothing.txt", "./nothing", ""):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            texts(source)
    with pytest.raises(ValueError, match="did you mean 'python-docs'"):
        texts("python-doc")
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_rows(tmp_path / "nothing.jsonl")


def test_a_folder_without_a_readable_file_says_what_it_found(tmp_path):
    with pytest.raises(ValueError, match="it is empty"):
        texts(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match=re.escape("found 1 of .png); supported are .txt")):
        texts(tmp_path)


def test_a_data_set_id_is_streamed(monkeypatch):
    import datasets

    def load_dataset(name, configuration, split, streaming):
        assert (name, configuration, split, streaming) == ("owner/name", "small", "validation", True)
        return datasets.IterableDataset.from_generator(lambda: ({"body": f"row {number}"} for number in range(3)))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = list(read_documents("owner/name:small", text_column="body", dataset_split="validation"))
    assert [document.text for document in documents] == ["row 0", "row 1", "row 2"]
    assert documents[2].id == "owner/name:small:2"
    with pytest.raises(ValueError, match="data set owner/name:small, row 0: no column 'text'"):
        texts("owner/name:small", dataset_split="validation")


def test_a_data_set_that_cannot_be_had_is_one_clear_error():
    with pytest.raises(OSError, match="'nobody/nothing' is no local file or folder"):
        texts("nobody/nothing")


def test_a_relative_path_does_not_show_in_the_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("t.txt").write_text("hello")
    assert [document.id for document in read_documents("t.txt")] == ["t.txt"]


def test_a_group_column_names_the_group_of_a_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(
        '{"text": "one", "project": "a"}\n{"text": "two", "project": "a"}\n{"text": "six", "project": null}\n'
    )
    documents = list(read_documents(str(path), group_column="project"))
    assert [document.split_group for document in documents] == ["a", "a", documents[2].id]
    with pytest.raises(ValueError, match=r"line 1.*'owner'.*group_column"):
        texts(path, group_column="owner")
