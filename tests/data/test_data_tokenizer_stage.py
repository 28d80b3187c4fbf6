"""The stage `tokenizer` learns from the training part only, and measures on the held-out part."""

import pytest
from transformers import AutoTokenizer

from hf_scratch_gpt.data import tokenizer_stage
from hf_scratch_gpt.data.corpus import Corpus
from hf_scratch_gpt.data.shards import encode_documents, tokenizer_fingerprint
from hf_scratch_gpt.runs import read_metrics


def arguments(tmp_path, **settings):
    path = tmp_path / "text.jsonl"
    if not path.exists():
        lines = (
            f'{{"text": "document{number} speaks of subject{number % 7} at some length"}}\n' for number in range(99)
        )
        path.write_text("".join(lines))
    defaults = {"vocab_size": 280, "heldout_fraction": 0.2}
    return tokenizer_stage.Arguments(
        output_dir=str(tmp_path / "tokenizer"), sources=[str(path)], **(defaults | settings)
    )


def test_the_folder_loads_with_auto_tokenizer_and_the_metrics_are_true(tmp_path):
    settings = arguments(tmp_path)
    folder = tokenizer_stage.run(settings)
    metrics = read_metrics(folder)["metrics"]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = [document.text for split, document in Corpus(settings) if split == "heldout"]
    tokens = sum(len(ids) for ids in encode_documents(tokenizer, heldout))
    assert metrics["bytes_per_token"] == sum(map(len, heldout)) / tokens
    assert metrics["vocab_size"] == len(tokenizer) == 280
    assert metrics["tokenizer_fingerprint"] == tokenizer_fingerprint(tokenizer)
    assert sum(metrics["token_bytes_histogram"].values()) == 280 - 6
    assert metrics["token_bytes_histogram"]["1"] == 256
    assert len(max(metrics["longest_tokens"], key=len)) == max(map(int, metrics["token_bytes_histogram"]))


def test_a_text_too_small_for_the_vocabulary_is_told(tmp_path, caplog):
    folder = tokenizer_stage.run(arguments(tmp_path, vocab_size=4096))
    assert read_metrics(folder)["metrics"]["vocab_size"] < 4096
    assert "fewer than the 4096 asked for" in caplog.text


def test_it_learns_nothing_from_held_out_text(tmp_path):
    trained = tokenizer_stage._TrainingTexts(Corpus(arguments(tmp_path)), 10**9)
    seen = list(trained)
    assert seen
    assert trained.heldout
    assert not set(seen) & set(trained.heldout)


def test_reading_stops_at_the_asked_size(tmp_path):
    trained = tokenizer_stage._TrainingTexts(Corpus(arguments(tmp_path)), 200)
    sizes = [len(text) for text in trained]
    assert trained.heldout
    assert len(sizes) < 60
    assert trained.bytes == sum(sizes) >= 200


def test_a_finished_run_is_not_done_again(tmp_path, monkeypatch):
    folder = tokenizer_stage.run(arguments(tmp_path))
    run_id = read_metrics(folder)["run_id"]
    monkeypatch.setattr(tokenizer_stage, "Corpus", None)  # would fail if anything were read
    assert tokenizer_stage.run(arguments(tmp_path)) == folder
    assert read_metrics(folder)["run_id"] == run_id


def test_a_mistake_leaves_no_finished_run(tmp_path):
    with pytest.raises(ValueError, match="vocab_size"):
        tokenizer_stage.run(arguments(tmp_path, vocab_size=100))
    with pytest.raises(FileNotFoundError):
        read_metrics(tmp_path / "tokenizer")
    tokenizer_stage.run(arguments(tmp_path))
