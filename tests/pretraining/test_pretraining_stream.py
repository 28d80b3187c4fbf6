"""A run that trains from a stream: killed, spoilt, at its end, and with another stream behind the same name."""

import json
import random
import shutil

import pytest
import torch
from pretraining_tiny import StopAfter
from safetensors.torch import load_file

from hf_scratch_gpt.pretraining import pretrain
from hf_scratch_gpt.pretraining.loop import PretrainingLoop
from hf_scratch_gpt.pretraining.spike_guard import data_step
from hf_scratch_gpt.runs import Interrupted, read_metrics
from hf_scratch_gpt.runs.checkpoints import newest_checkpoint

SENTENCE = "the list of names and a function that returns each value in the file when it is given by the caller"
WORDS = SENTENCE.split()
STEPS = {"max_steps": 8, "checkpoint_steps": 3, "checkpoint_seconds": 0.0}


def lines(seed, count):
    draw = random.Random(seed)
    return [json.dumps({"text": " ".join(draw.choices(WORDS, k=draw.randint(5, 80)))}) for _ in range(count)]


def write(path, rows):
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")


@pytest.fixture
def stream(tmp_path):
    path = tmp_path / "stream.jsonl"
    write(path, lines(5, 60))
    return path


@pytest.fixture
def make_run(make_arguments, stream, tmp_path):
    def make(name, **changes):
        return make_arguments(output_dir=str(tmp_path / name), stream=[str(stream)], **{**STEPS, **changes})

    return make


@pytest.fixture
def interrupt(monkeypatch):
    """Runs with these settings until the loop has looked so many times for a signal."""

    def run(arguments, looks):
        with monkeypatch.context() as patch:
            patch.setattr("hf_scratch_gpt.pretraining.pretrain.StopRequest", lambda: StopAfter(looks))
            with pytest.raises(Interrupted):
                pretrain.run(arguments)

    return run


def assert_equal_weights(one, other):
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_an_interrupted_run_ends_with_the_same_weights(make_run, interrupt, stream):
    whole = pretrain.run(make_run("whole"))
    interrupt(make_run("parts"), 4)
    write(stream, [*stream.read_text().splitlines(), *lines(6, 5)])  # a log that grows is the same stream
    parts = pretrain.run(make_run("parts"))
    assert_equal_weights(whole, parts)
    report = read_metrics(parts)
    assert report["metrics"]["stream_tokens"] == 8 * 4 * 32 == report["metrics"]["tokens"]
    assert report["metrics"]["stream_removed"] == read_metrics(whole)["metrics"]["stream_removed"]
    assert report["inputs"]["stream"] == [{"path": str(stream)}]
    assert "epochs" not in report["metrics"]
    assert pretrain.run(make_run("parts")) == parts  # finished


def test_another_stream_of_the_same_name_is_refused_and_nothing_is_lost(make_run, interrupt, stream, tmp_path):
    rows = stream.read_text().splitlines()
    interrupt(make_run("parts"), 4)
    write(stream, [*lines(7, 1), *rows])
    with pytest.raises(ValueError, match=r"stream.jsonl: has changed: the first 640 tokens, .* are others now"):
        pretrain.run(make_run("parts"))
    assert newest_checkpoint(tmp_path / "parts/checkpoints").name == "checkpoint-5"
    write(stream, rows)
    assert_equal_weights(pretrain.run(make_run("parts")), pretrain.run(make_run("whole")))


def test_a_stream_that_ends_says_so_and_goes_on_when_there_is_more(make_run, stream, tmp_path):
    rows = stream.read_text().splitlines()
    whole = pretrain.run(make_run("whole"))
    write(stream, rows[:8])
    with pytest.raises(
        ValueError, match=r"stream.jsonl: ends after \d+ tokens, \d batches of 128, before the run does"
    ):
        pretrain.run(make_run("parts"))
    assert newest_checkpoint(tmp_path / "parts/checkpoints") is not None
    write(stream, rows)
    assert_equal_weights(pretrain.run(make_run("parts")), whole)


@pytest.mark.parametrize("interrupted", [False, True])
def test_after_going_back_from_a_spike_the_stream_is_taken_up_behind_it(
    make_run, interrupt, stream, monkeypatch, interrupted
):
    write(stream, lines(5, 400))
    original, seen, spoilt = PretrainingLoop._accumulate_gradients, {}, set(range(9, 14))

    def broken(self, batch):
        number = data_step(self.state.step, self.state.skipped_data)
        tokens = batch["input_ids"].clone()
        assert torch.equal(seen.setdefault(number, tokens), tokens), number
        loss = original(self, batch)
        if number in spoilt:
            next(self.module.parameters()).grad[0] = float("nan")
        return loss

    monkeypatch.setattr(PretrainingLoop, "_accumulate_gradients", broken)
    arguments = make_run("parts", max_steps=18, checkpoint_steps=6)
    if interrupted:
        interrupt(arguments, 15)
    metrics = read_metrics(pretrain.run(arguments))["metrics"]
    (record,) = metrics["rollbacks"]
    assert (record["back_to"], record["first_batch"], record["last_batch"]) == (6, 8, 13)
    assert sorted(seen) == list(range(18 + 6))
    assert metrics["stream_tokens"] == 24 * 4 * 32


def test_the_shards_of_the_prepared_folder_are_not_asked_for(make_run, prepared_folder, tmp_path):
    folder = tmp_path / "prepared"
    shutil.copytree(prepared_folder, folder)
    shutil.rmtree(folder / "train")
    pretrain.run(make_run("run", dataset_dir=str(folder), max_steps=1))


def test_what_does_not_go_with_a_stream_is_refused(make_run, make_arguments, tmp_path):
    with pytest.raises(ValueError, match="'mixture' weighs the sources of shards, but 'stream'"):
        pretrain.run(make_run("run", mixture={"words": 1.0}))
    with pytest.raises(ValueError, match="'packing' is best_fit, but a 'stream' is cut as it comes"):
        pretrain.run(make_run("run", packing="best_fit"))
    with pytest.raises(FileNotFoundError, match=r"no such file or folder: '\./nowhere\.txt'"):
        pretrain.run(make_arguments(stream=["./nowhere.txt"], **STEPS))
