"""Labels and texts are found in whatever two-column file or named columns there are; what is unusable is told."""

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_scratch_gpt.data.labelled import load_labelled, split_rows

ROWS = [(["ham", "spam"][number % 3 == 0], f"message {number} says “hi”, 5") for number in range(12)]


def write(path, rows, separator="\t", header=None):
    lines = [separator.join(row) for row in ([header] if header else []) + rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def swapped(rows):
    return [(text, label) for label, text in rows]


@pytest.mark.parametrize("order", [list, swapped])
@pytest.mark.parametrize("header", [None, ("label", "text"), ("v1", "Message")])
def test_label_and_text_of_two_columns_are_told_apart_in_either_order(tmp_path, order, header):
    if header:
        header = tuple(reversed(header)) if order is swapped else header
    rows = load_labelled(write(tmp_path / "a.tsv", order(ROWS), header=header))
    assert rows.labels == [label for label, _ in ROWS]
    assert rows.texts == [text for _, text in ROWS]
    assert rows.places[0] == ("line 2" if header else "line 1")
    assert rows.pairs is None


def test_the_spam_collection_is_read_whole(shared_data):
    rows = load_labelled(shared_data / "sms_spam.tsv")
    assert (len(rows), rows.rejected, rows.columns) == (5574, [], {"label": "1", "text": "2"})
    assert (rows.labels.count("spam"), rows.labels.count("ham")) == (747, 4827)
    assert rows.texts[1] == "Ok lar... Joking wif u oni..."


def test_named_columns_are_found_in_every_kind_of_file_or_taken_as_asked(tmp_path):
    frame = datasets.Dataset.from_list(
        [
            {"id": number, "sentence": text, "label": label, "topic": f"t{number % 2}"}
            for number, (label, text) in enumerate(ROWS)
        ]
    )
    frame.to_csv(tmp_path / "a.csv")
    frame.to_json(tmp_path / "a.jsonl")
    frame.to_parquet(tmp_path / "a.parquet")
    for suffix in ("csv", "jsonl", "parquet"):
        rows = load_labelled(tmp_path / f"a.{suffix}")
        assert (rows.texts, rows.labels) == ([text for _, text in ROWS], [label for label, _ in ROWS])
        rows = load_labelled(tmp_path / f"a.{suffix}", label_column="topic", text_pair_column="label")
        assert rows.labels[:2] == ["t0", "t1"]
        assert rows.pairs == [label for label, _ in ROWS]


def test_integer_labels_of_a_data_set_get_their_names_and_unlabelled_rows_are_rejected(tmp_path, monkeypatch):
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    numbers = [0, 1] * 60 + [-1]
    data = datasets.Dataset.from_dict({"text": [f"t{n}" for n in range(121)], "label": numbers}, features=features)
    asked = {}

    def load_dataset(name, configuration, split):
        asked.update(name=name, configuration=configuration, split=split)
        return data

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = load_labelled("owner/name:sub", "validation")
    assert asked == {"name": "owner/name", "configuration": "sub", "split": "validation"}
    assert rows.labels == ["no", "yes"] * 60
    assert rows.rejected == [{"place": "row 121", "reason": "'label' holds -1, which marks rows without a label"}]


def test_a_folder_that_datasets_reads_is_a_data_set(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    for split in ("train", "test"):
        write(
            tmp_path / "folder" / f"{split}.csv",
            [(label, f"{split} {text[:9]}") for label, text in ROWS],
            ",",
            ("label", "text"),
        )
    rows = load_labelled(tmp_path / "folder", "test")
    assert rows.texts[0] == "test message 0"
    (tmp_path / "empty").mkdir()
    with pytest.raises(OSError, match="empty' is a folder with no data"):
        load_labelled(tmp_path / "empty")


UNUSABLE = {
    "no_file.tsv": (None, {}, "no such file or folder: .*no_file.tsv"),
    "empty.tsv": ("", {}, "no rows; found an empty file"),
    "latin.tsv": (b"caf\xe9\tx\n", {}, "not UTF-8 at byte 3"),
    "ragged.tsv": ("a\tone\nb\ttwo\textra\n", {}, "line 2: 3 columns, expected 2"),
    "kind.docx": ("a\tone\n", {}, "cannot read rows of '.docx' files"),
    "unclear.tsv": ("a\tone\nb\ttwo\nc\tthree\n", {}, "cannot tell which column is the label.*3 in '1' and 3 in '2'"),
    "three.tsv": ("a\tone\tx\nb\ttwo\ty\n", {}, "cannot tell label and text among the columns '1', '2', '3'"),
    "names.csv": ("foo,bar,baz\n1,a,b\n", {}, "cannot tell label and text"),
    "typo.csv": ("label,text\nx,a\n", {"label_column": "lable"}, "no column 'lable'; did you mean 'label'"),
    "number.tsv": ("a\tone\nb\ttwo\n", {"text_column": "3"}, "no column '3'.*name one with text_column"),
    "same.csv": ("label,text\nx,a\n", {"label_column": "text", "text_column": "text"}, "read from one column"),
    "header.tsv": (
        "mood\tsaying\n" + "".join(f"{n % 2}\tis {n}\n" for n in range(12)),
        {},
        "line 1: 'mood' looks like the name of a column",
    ),
    "blank.csv": ("label,text\nx,\n,b\n", {}, "none of 2 rows can be used .line 2: 'text' is empty"),
    "many.csv": ("label,text\n" + "x,a\n" * 90 + ",b\n", {}, "1 of 91 rows cannot be used .line 92: 'label' is empty"),
    "nan.csv": (
        "label,text\n" + "x,a\n" * 9 + "nan,b\n",
        {},
        "1 of 10 rows cannot be used .line 11: 'label' is empty",
    ),
    "list.jsonl": ('{"label": ["a", "b"], "text": "x"}\n', {}, "'label' holds list, expected one label"),
    "type.jsonl": ('{"label": "a", "text": 7}\n', {}, "'text' holds int, expected text"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_an_unusable_file_is_told_in_one_line_with_its_name_and_place(tmp_path, name):
    content, settings, told = UNUSABLE[name]
    if content is not None:
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises((ValueError, OSError), match=told) as caught:
        load_labelled(tmp_path / name, **settings)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_few_unusable_rows_are_left_out_and_listed_and_more_if_allowed(tmp_path, caplog):
    rows = [("x", f"a{n}") for n in range(300)] + [("y", " ")]
    path = write(tmp_path / "a.tsv", rows, header=("label", "text"))
    read = load_labelled(path)
    assert (len(read), read.rejected) == (300, [{"place": "line 302", "reason": "'text' is empty"}])
    assert "leaving out 1 of 301 rows (line 302: 'text' is empty)" in caplog.text
    write(path, [("x", f"a{n}") for n in range(3)] + [("y", " ")], header=("label", "text"))
    assert len(load_labelled(path, allow_rejected=True)) == 3


@given(
    st.lists(st.sampled_from("abc"), min_size=2, max_size=60), st.floats(0.01, 0.99), st.integers(0, 99), st.booleans()
)
def test_a_split_is_a_partition_and_a_function_of_its_seed(labels, fraction, seed, stratify):
    train, heldout = split_rows(labels, fraction, seed, stratify)
    assert sorted(train + heldout) == list(range(len(labels)))
    assert (train, heldout) == split_rows(labels, fraction, seed, stratify)
    assert train
    if stratify:
        for label in set(labels):
            count = labels.count(label)
            out = sum(labels[index] == label for index in heldout)
            assert out == min(round(fraction * count), count - 1)
    else:
        assert len(heldout) == min(max(round(fraction * len(labels)), 1), len(labels) - 1)


def test_other_seeds_give_other_splits():
    assert split_rows(["a"] * 50, 0.2, 0, False) != split_rows(["a"] * 50, 0.2, 1, False)


def test_rows_are_the_same_text_whatever_their_case_and_spaces(tmp_path):
    rows = load_labelled(
        write(tmp_path / "a.tsv", [("x", "Free  entry"), ("y", "free entry "), ("x", "free"), ("y", "b")])
    )
    first, second, third, _ = rows.keys()
    assert first == second != third
