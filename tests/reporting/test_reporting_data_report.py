"""What is planted in a real text is found by `prepare`, each with its exact count, and the data report tells it."""

import json
import shutil
from pydoc_data import topics

import pytest

from hf_scratch_gpt import cli
from hf_scratch_gpt.data import tokenizer_stage
from hf_scratch_gpt.data.cleaning import Cleaner
from hf_scratch_gpt.data.documents import Document
from hf_scratch_gpt.data.filters import CleaningSettings
from hf_scratch_gpt.data.manifest import read_manifest
from hf_scratch_gpt.reporting.data_report import binary_number, cluster_bins, write_data_report
from hf_scratch_gpt.runs import read_json, read_metrics

FILTERS = ["control_characters", "licence_headers", "empty", "gopher_quality", "gopher_repetition", "personal_data"]
FILTERS += ["decontamination", "exact_duplicates", "minhash_duplicates"]
QUESTIONS = [
    f"Question {number}: if {name} has {number + 3} baskets with {number + 7} apples in each and gives half of all "
    f"the apples to a friend called {friend}, how many apples does {name} still have in the end?"
    for number, (name, friend) in enumerate(
        (name, friend) for name in ("Ada", "Bo", "Cy", "Di", "Ed") for friend in ("Flo", "Gus", "Hal", "Ivy")
    )
]
PLANTED = {"exact": 7, "near": 5, "email": 11, "phone": 4, "ip": 3, "key": 2, "card": 2, "questions": 6}
PERSONAL = [f"Write to person{number}@mail{number}.org." for number in range(PLANTED["email"])]
PERSONAL += [f"Call +44 20 7946 0{number}58." for number in range(PLANTED["phone"])]
PERSONAL += [f"It runs on 8.8.{number}.4 today." for number in range(PLANTED["ip"])]
# Keys are put together here, so that no scanner takes this file for a leak.
PERSONAL += ["The token is " + "gh" + "p_" + "a1B2" * 9 + ".", "Use " + "AK" + "IA" + "ABCDEFGH12345678."]
PERSONAL += ["Paid with 4111 1111 1111 1111.", "Paid with 378282246310005."]
LOW_QUALITY = [
    "Click here",
    "# # # " * 40,
    "- buy\n" * 80,
    "<script>alert('planted')</script> " * 5,
]


def write_rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


@pytest.fixture(scope="module")
def real_texts():
    """Python's own reference, a text a topic, of those that are neither short nor near to another."""
    documents = [Document(name, text.strip(), "topics") for name, text in sorted(topics.topics.items())]
    filters = (
        "empty",
        "gopher_quality",
        "gopher_repetition",
        "exact_duplicates",
        {"minhash_duplicates": {"threshold": 0.4}},
    )
    cleaned = Cleaner(CleaningSettings(filters=filters)).clean(documents)
    return [document.text for document in cleaned if len(document.text.split()) > 200][:40]


@pytest.fixture(scope="module")
def folders(real_texts, tmp_path_factory):
    """Runs of `prepare` on the real text as it is and with what was planted in it."""
    root = tmp_path_factory.mktemp("planted")
    assert len(real_texts) >= 26
    texts, hosts = list(real_texts), iter(range(len(real_texts)))
    copies = [texts[next(hosts)] for _ in range(PLANTED["exact"])]
    near = [texts[next(hosts)].split(" ") for _ in range(PLANTED["near"])]
    for sentence_number in range(0, len(PERSONAL), 3):
        texts[next(hosts)] += "\n\n" + "\n".join(PERSONAL[sentence_number : sentence_number + 3])
    for number in range(PLANTED["questions"]):
        host = next(hosts)
        middle = texts[host].index("\n\n", len(texts[host]) // 2)
        texts[host] = f"{texts[host][:middle]}\n\n{QUESTIONS[3 * number].upper()}\n\n{texts[host][middle:]}"
    texts += [copy.replace(" ", "  ") for copy in copies]
    texts += [" ".join([*words[:40], "planted", *words[41:]]) for words in near]
    texts += LOW_QUALITY
    write_rows(root / "plain.jsonl", real_texts)
    write_rows(root / "planted.jsonl", texts)
    questions = root / "questions.jsonl"
    questions.write_text("".join(json.dumps({"question": text, "answer": "17"}) + "\n" for text in QUESTIONS))
    tokenizer_stage.run(
        tokenizer_stage.Arguments(
            output_dir=str(root / "tokenizer"),
            sources=[str(root / "plain.jsonl")],
            vocab_size=300,
            heldout_fraction=0.1,
        )
    )
    for name in ("plain", "planted"):
        flags = [
            "--output_dir",
            root / name,
            "--tokenizer_dir",
            root / "tokenizer",
            "--sources",
            root / f"{name}.jsonl",
        ]
        flags += ["--heldout_fraction", "0.1", "--evaluation_sets", questions, "--filters", *FILTERS]
        assert cli.main(["prepare", *map(str, flags)]) == 0
    return {"plain": root / "plain", "planted": root / "planted", "questions": str(questions)}


def test_bins_are_named_by_their_first_size():
    assert [binary_number(1 << power) for power in (0, 9, 10, 15, 20, 23)] == ["1", "512", "1k", "32k", "1M", "8M"]
    sizes = {"2": 5, "7": 1, "8": 2, "15": 3, "16": 1}
    assert cluster_bins(sizes) == [("2", 5), ("7", 1), ("8–15", 5), ("16–31", 1)]


def filter_counts(folder):
    metrics = read_metrics(folder)["metrics"]
    assert read_manifest(folder)["filters"] == metrics["filters"]
    return {entry["name"]: entry for entry in metrics["filters"]}


def test_a_real_text_loses_nothing(folders, real_texts):
    counts = filter_counts(folders["plain"])
    assert {name: entry["removed"] for name, entry in counts.items()} == dict.fromkeys(FILTERS, 0)
    assert counts["personal_data"]["places"] == counts["decontamination"]["places"] == 0
    metrics = read_metrics(folders["plain"])["metrics"]
    assert metrics["train_documents"] + metrics["heldout_documents"] == len(real_texts)


def test_all_that_was_planted_is_found_and_nothing_else(folders, real_texts):
    counts = filter_counts(folders["planted"])
    assert list(counts) == FILTERS
    removed = {name: entry["removed"] for name, entry in counts.items() if entry["removed"]}
    assert removed == {
        "gopher_quality": len(LOW_QUALITY),
        "exact_duplicates": PLANTED["exact"],
        "minhash_duplicates": PLANTED["near"],
    }
    kinds = ("email", "phone", "ip", "key", "card")
    assert counts["personal_data"]["kinds"] == {kind: PLANTED[kind] for kind in kinds}
    assert counts["personal_data"]["places"] == sum(PLANTED[kind] for kind in kinds)
    decontamination = counts["decontamination"]
    assert decontamination["changed"] == PLANTED["questions"]
    assert decontamination["evaluation_sets"] == {
        folders["questions"]: {"questions": len(QUESTIONS), "too_short": 0, "found": PLANTED["questions"]}
    }
    metrics = read_metrics(folders["planted"])["metrics"]
    assert metrics["train_documents"] + metrics["heldout_documents"] == len(real_texts)
    assert metrics["removed"]["near_duplicate_documents"] == PLANTED["near"]


def test_nothing_planted_is_left_in_the_shards(folders):
    from transformers import AutoTokenizer

    from hf_scratch_gpt.data.shards import TokenShards

    tokenizer = AutoTokenizer.from_pretrained(folders["planted"])
    shards = [TokenShards(folders["planted"], split) for split in ("train", "heldout")]
    text = "".join(tokenizer.decode(shard.read(0, len(shard)).tolist()) for shard in shards)
    for sentence in PERSONAL:
        assert sentence not in text
    assert text.count("[EMAIL]") == PLANTED["email"]
    assert "APPLES" not in text
    assert "alert('planted')" not in text


def test_the_page_tells_the_counts_and_runs_nothing_that_was_planted(folders):
    folder = folders["planted"]
    page = (folder / "data_report.html").read_text()  # written by the command
    assert "<script" not in page
    assert "built-in" not in page
    assert "&lt;script&gt;alert(" in page
    for needle in (
        "email 11",
        "phone 4",
        "ip 3",
        "key 2",
        "card 2",
        "exact_duplicates: 7 clusters",
        "minhash_duplicates: 5",
    ):
        assert needle in page
    assert "http" not in page.replace("http-equiv", "").partition("<h2>Samples")[0]
    for sentence in PERSONAL:
        assert sentence not in page
    report = read_json(folder / "data_report.json")
    assert report["kept"]["documents"] == sum(count for _, count in report["kept"]["sizes"]["tokens"]["histogram"])
    assert report["kept"]["personal_data_left"] == {}
    assert report["kept"]["words"]["groups"]["gender"]["they"] > 5


def test_the_command_writes_the_page_again_and_refuses_what_is_no_data(folders, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(folders["planted"], copy)
    page = (copy / "data_report.html").read_text()
    (copy / "data_report.html").unlink()
    assert cli.main(["data-report", str(copy)]) == 0
    assert (copy / "data_report.html").read_text() == page.replace(f"{folders['planted']}<", f"{copy}<")
    (copy / "data_report.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_report\.json: missing"):
        write_data_report(copy)
    with pytest.raises(ValueError, match="of the stage 'tokenizer', expected one of 'prepare'"):
        write_data_report(folders["planted"].parent / "tokenizer")
