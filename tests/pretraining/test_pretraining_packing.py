"""Training on packed windows: padding is no target and counts nowhere, and a run stays exact to resume."""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch
from pretraining_tiny import StopAfter
from safetensors.torch import load_file

import hf_scratch_gpt.pretraining.setup as setup
from hf_scratch_gpt.data.manifest import read_manifest, write_manifest
from hf_scratch_gpt.data.packed_windows import pack_windows
from hf_scratch_gpt.data.shards import ShardWriter, TokenShards
from hf_scratch_gpt.pretraining import pretrain
from hf_scratch_gpt.pretraining.loop import PretrainingLoop
from hf_scratch_gpt.pretraining.objectives import make_objective
from hf_scratch_gpt.pretraining.pretrain import run
from hf_scratch_gpt.runs import Interrupted, read_metrics


def read_curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def assert_equal_weights(one, other, **tolerance):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **(tolerance or {"atol": 0, "rtol": 0}))


@pytest.fixture(scope="module")
def uneven_folder(masked_folder, tmp_path_factory):
    """A prepared folder whose documents fit windows of 48 badly: a fifth of them is padding."""
    folder = shutil.copytree(masked_folder, tmp_path_factory.mktemp("data") / "uneven")
    shards = TokenShards(masked_folder)
    documents = np.split(np.array(shards.read(0, len(shards))), shards.document_starts()[1:])
    lengths = itertools.cycle([30, 40, 35, 6, 44, 70, 28, 33])
    shutil.rmtree(folder / "train")
    writer = ShardWriter(folder / "train", np.dtype("<u2"), shards.separator_id, shard_tokens=3000)
    for document, length in zip(documents, lengths, strict=False):
        writer.add(document[:-1][:length], length)
    manifest = read_manifest(folder)
    manifest["splits"]["train"] = writer.close()
    write_manifest(folder, manifest, manifest["files"])
    return folder


@pytest.fixture
def packed_arguments(make_arguments, uneven_folder):
    settings = {"packing": "best_fit", "context_length": 48, "dataset_dir": str(uneven_folder)}
    return lambda **changes: make_arguments(**{**settings, **changes})


def test_the_loss_of_packed_documents_is_that_of_each_alone(packed_arguments, uneven_folder):
    model = setup.make_model(packed_arguments(), setup.load_dataset(uneven_folder, 48))
    torch.nn.init.normal_(model.lm_head.weight, std=0.2)  # zero projections would give one loss to all
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.3)
    packed = pack_windows(TokenShards(uneven_folder), 48, None)
    loss, batch = setup.LanguageModelLoss(model, bf16=False), packed.batch(6, 0, 0)
    rows, padding = zip(batch["input_ids"], batch["position_ids"], batch["labels"], strict=True), 0
    alone, documents = 0.0, 0
    with torch.no_grad():
        for ids, positions, labels in rows:
            for start, end in itertools.pairwise([*(positions == 0).nonzero().flatten().tolist(), len(ids)]):
                if labels[start] == -100:
                    padding += end - start
                else:
                    alone += loss(torch.cat([ids[start:end], labels[end - 1 : end]])[None]).item()
                    documents += 1
        assert loss(**batch).item() == pytest.approx(alone, rel=1e-5)
    assert documents > 6
    assert 0 < padding == packed.count_padding(6, 0, 0)


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_an_interrupted_run_resumes_bitwise(packed_arguments, tmp_path, monkeypatch, objective):
    settings = {"max_steps": 9, "objective": objective}
    whole = run(packed_arguments(output_dir=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        patch.setattr("hf_scratch_gpt.pretraining.pretrain.StopRequest", lambda: StopAfter(4))
        with pytest.raises(Interrupted, match=r"stopped by .* at step 5"):
            run(packed_arguments(output_dir=str(tmp_path / "parts"), **settings))
    parts = run(packed_arguments(output_dir=str(tmp_path / "parts"), **settings))
    assert_equal_weights(whole, parts)
    told = [
        {name: read_metrics(folder)["metrics"][name] for name in ("tokens", "padding_share", "epochs")}
        for folder in (whole, parts)
    ]
    assert told[0] == told[1]


def test_a_run_tells_tokens_without_padding(packed_arguments, uneven_folder):
    arguments = packed_arguments()
    folder = run(arguments)
    windows = pack_windows(TokenShards(uneven_folder), 48, None)
    valid = [int((windows.batch(4, arguments.seed, step)["labels"] != -100).sum()) for step in range(6)]
    metrics = read_metrics(folder)["metrics"]
    assert metrics["tokens"] == sum(valid) < 6 * 4 * 48
    assert [row["tokens"] for row in read_curve(folder)] == [sum(valid[:steps]) for steps in (2, 4, 6)]
    assert metrics["padding_share"] == pytest.approx(1 - sum(valid) / (6 * 4 * 48))
    assert metrics["epochs"] == sum(valid) / len(TokenShards(uneven_folder))
    assert metrics["tokens_per_second"] == pytest.approx(sum(valid) / metrics["seconds"])
    (plan,) = windows.plans
    assert metrics["documents_cut_share"] == plan.documents_cut / 200
    assert metrics["packing"] == "best_fit"
    contiguous = read_metrics(
        run(packed_arguments(output_dir=f"{arguments.output_dir}-contiguous", packing="contiguous"))
    )["metrics"]
    assert (contiguous["packing"], contiguous["padding_share"]) == ("contiguous", 0.0)


def test_one_batch_equals_its_accumulated_parts(packed_arguments, tmp_path):
    """The parts have unequal padding, so that a mean of their means would be another number."""
    settings = {"max_steps": 3, "optimizer": "adamw", "logging_steps": 1}
    whole = run(packed_arguments(output_dir=str(tmp_path / "whole"), **settings))
    parts = run(packed_arguments(output_dir=str(tmp_path / "parts"), gradient_accumulation_steps=4, **settings))
    losses = [[row["loss"] for row in read_curve(folder)] for folder in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_equal_weights(whole, parts, atol=1e-4, rtol=1e-4)


def test_data_that_is_passed_over_is_not_counted_as_trained_on(packed_arguments, monkeypatch):
    original, read = PretrainingLoop._accumulate_gradients, pretrain._Pretraining._read_batch
    left, valid = set(range(12, 17)), {}

    def broken(self, batch):
        loss = original(self, batch)
        if self.state.step in left:
            left.remove(self.state.step)
            next(self.module.parameters()).grad[0] = math.nan
        return loss

    def watched(self, number):
        batch = read(self, number)
        valid[self.state.step] = (number, int((batch["labels"] != -100).sum()))
        return batch

    monkeypatch.setattr(PretrainingLoop, "_accumulate_gradients", broken)
    monkeypatch.setattr(pretrain._Pretraining, "_read_batch", watched)
    settings = {"max_steps": 20, "checkpoint_steps": 10, "checkpoint_seconds": 0.0}
    metrics = read_metrics(run(packed_arguments(**settings)))["metrics"]
    assert [record["back_to"] for record in metrics["rollbacks"]] == [10]
    skipped = metrics["skipped_batches"]
    assert skipped >= 5
    assert valid[19][0] == 19 + skipped
    assert metrics["tokens"] == sum(tokens for _, tokens in valid.values())


def test_padding_does_not_reach_a_masked_model(packed_arguments, uneven_folder):
    dataset = setup.load_dataset(uneven_folder, 48)
    padding = dataset.tokenizer.pad_token_id
    windows = pack_windows(TokenShards(uneven_folder), 48, None, padding)
    batch = make_objective("masked", dataset).make_batch(windows.batch(6, 0, 0), 0, range(6))
    is_padding = windows.batch(6, 0, 0)["labels"] == -100
    assert is_padding.any()
    assert (batch["input_ids"][is_padding] == padding).all()
    assert (batch["labels"][is_padding] == -100).all()
    settings = {"objective": "masked", "zero_init_output_projections": False}
    model = setup.make_model(packed_arguments(**settings), dataset)
    loss = setup.LanguageModelLoss(model, bf16=False)
    with torch.no_grad():
        expected = loss(**batch).item()
        batch["input_ids"][is_padding] = 17
        assert loss(**batch).item() == pytest.approx(expected, rel=1e-6)
        del batch["position_ids"]
        assert loss(**batch).item() != pytest.approx(expected, rel=1e-6)  # why that setting is refused


def test_a_masked_model_that_would_read_padding_is_refused(packed_arguments):
    arguments = packed_arguments(objective="masked", separate_documents=False)
    with pytest.raises(ValueError, match="'packing' is best_fit, whose padding a masked model without 'separate_"):
        run(arguments)
    with pytest.raises(ValueError, match="'packing' is 'best', expected one of contiguous, best_fit"):
        run(packed_arguments(packing="best"))


def test_documents_may_share_a_window_unseparated(packed_arguments, monkeypatch):
    read, seen = pretrain._Pretraining._read_batch, []

    def watched(self, number):
        seen.append(read(self, number))
        return seen[-1]

    monkeypatch.setattr(pretrain._Pretraining, "_read_batch", watched)
    metrics = read_metrics(run(packed_arguments(separate_documents=False)))["metrics"]
    assert all(batch.keys() == {"input_ids", "labels"} for batch in seen)
    assert metrics["tokens"] == sum(int((batch["labels"] != -100).sum()) for batch in seen)
    assert 0.1 < metrics["padding_share"] < 0.4
