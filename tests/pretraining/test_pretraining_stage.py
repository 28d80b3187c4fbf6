import json
import math
import shutil
import time

import pytest
import torch
from pretraining_tiny import TINY_MODEL, StopAfter
from safetensors.torch import load_file

import hf_scratch_gpt.pretraining.setup as setup
from hf_scratch_gpt.data.manifest import read_manifest, write_manifest
from hf_scratch_gpt.pretraining.loop import PretrainingLoop
from hf_scratch_gpt.pretraining.pretrain import run
from hf_scratch_gpt.runs import Interrupted, read_metrics


def read_curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def weights(folder):
    return load_file(folder / "model.safetensors")


def assert_equal_weights(one, other, **tolerance):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if tolerance:
            torch.testing.assert_close(value, other[name], **tolerance)
        else:
            assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def finished(prepared_folder, tmp_path_factory):
    """A run that is long enough to learn something."""
    from hf_scratch_gpt.pretraining.pretrain import Arguments

    arguments = Arguments(
        output_dir=str(tmp_path_factory.mktemp("run") / "pretrain"),
        dataset_dir=str(prepared_folder),
        model_overrides=TINY_MODEL,
        context_length=32,
        batch_size=8,
        max_steps=60,
        precision="fp32",
        compile="false",
    )
    return run(arguments)


def test_training_learns_and_says_what_it_measured(finished):
    metrics = read_metrics(finished)["metrics"]
    assert metrics["heldout_bits_per_byte"] < 0.6 * metrics["random_init_bits_per_byte"]
    low, high = metrics["heldout_bits_per_byte_interval"]
    assert low <= metrics["heldout_bits_per_byte"] <= high
    assert metrics["steps"] == 60
    assert metrics["tokens"] == 60 * 8 * 32
    assert metrics["tokens_per_second"] == pytest.approx(metrics["tokens"] / metrics["seconds"])
    assert metrics["skipped_updates"] == 0
    assert (metrics["precision"], metrics["compiled"], metrics["optimizer"]) == ("fp32", False, "muon")
    assert metrics["heldout_documents"] == 10


def test_the_curve_has_what_a_plot_needs(finished):
    rows = read_curve(finished)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    for row in rows:
        assert {"loss", "lr", "muon_lr", "tokens", "tokens_per_second", "grad_norm"} <= row.keys()
        assert row["tokens"] == row["step"] * 8 * 32
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["lr"] < rows[2]["lr"]


def test_the_output_is_a_complete_checkpoint(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(finished), AutoTokenizer.from_pretrained(finished)
    assert model.dtype == torch.float32
    assert model.config.max_position_embeddings == 32
    assert model.config.vocab_size == len(tokenizer)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")]
    assert model.generation_config.eos_token_id == ends
    assert model.generation_config.pad_token_id == tokenizer.convert_tokens_to_ids("<|pad|>")
    metrics = read_metrics(finished)["metrics"]
    assert sum(parameter.numel() for parameter in model.parameters()) == metrics["parameters"]
    assert not (finished / "checkpoints").exists()


def test_a_finished_run_is_not_repeated(finished, prepared_folder, make_arguments):
    first = run(make_arguments())
    before = read_metrics(first)
    assert run(make_arguments()) == first
    assert read_metrics(first) == before


def test_initial_loss_is_that_of_a_uniform_guess(prepared_folder, make_arguments):
    arguments = make_arguments()
    dataset = setup.load_dataset(prepared_folder, 32)
    model = setup.make_model(arguments, dataset)
    assert not any(
        layer.self_attn.o_proj.weight.any() or layer.mlp.down_proj.weight.any() for layer in model.model.layers
    )
    ids = torch.randint(0, 300, (2, 16))
    summed = setup.LanguageModelLoss(model, bf16=False)(ids)
    assert summed.item() / (2 * 15) == pytest.approx(math.log(model.config.vocab_size), rel=0.02)
    assert summed.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item() * 30, rel=1e-5)


def test_the_gpt2_preset_trains_too(make_arguments):
    overrides = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    folder = run(make_arguments(preset="gpt2-124m", model_overrides=overrides, separate_documents=False))
    config = json.loads((folder / "config.json").read_text())
    assert (config["max_position_embeddings"], config["position_embedding_type"]) == (32, "learned")
    assert config["eos_token_id"] != 50256


def test_a_foreign_tokenizer_is_refused(make_arguments, prepared_folder, tmp_path):
    copy = shutil.copytree(prepared_folder, tmp_path / "copy")
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    merges = tokenizer["model"]["merges"]
    merges[0], merges[1] = merges[1], merges[0]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"copy/tokenizer\.json: .*; run the stage 'prepare' again"):
        run(make_arguments(dataset_dir=str(copy)))
    manifest = read_manifest(copy)  # whoever lists the other tokenizer still has the shards of this one
    files = list(manifest.pop("files"))
    write_manifest(copy, {name: value for name, value in manifest.items() if name != "sha256"}, files)
    with pytest.raises(ValueError, match="its tokenizer is not the one that the shards were made with"):
        run(make_arguments(dataset_dir=str(copy)))


def test_one_batch_equals_its_accumulated_parts(make_arguments, tmp_path):
    whole = run(make_arguments(max_steps=3, output_dir=str(tmp_path / "whole"), optimizer="adamw"))
    parts = run(
        make_arguments(
            max_steps=3, output_dir=str(tmp_path / "parts"), optimizer="adamw", gradient_accumulation_steps=4
        )
    )
    for one, other in zip(read_curve(whole), read_curve(parts), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
    assert_equal_weights(whole, parts, atol=2e-5, rtol=1e-4)


def test_a_time_budget_bounds_the_stage(make_arguments):
    metrics = read_metrics(run(make_arguments(max_steps=0, max_minutes=0.15)))
    assert metrics["metrics"]["steps"] > 3
    assert metrics["seconds"] < 0.15 * 60 + 1


def test_an_interrupted_time_budget_still_ends_decayed(make_arguments, monkeypatch):
    arguments = {"max_steps": 0, "max_minutes": 0.1, "logging_steps": 1}
    with monkeypatch.context() as patch:
        patch.setattr("hf_scratch_gpt.pretraining.pretrain.StopRequest", lambda: StopAfter(20))
        with pytest.raises(Interrupted):
            run(make_arguments(**arguments))
    # Setting up again takes longer than what is left of the budget.
    original = setup.make_model
    monkeypatch.setattr(setup, "make_model", lambda *args: (time.sleep(4), original(*args))[1])
    # A row may tell of an update that was left out instead.
    rates = [row["lr"] for row in read_curve(run(make_arguments(**arguments))) if "lr" in row]
    assert len(rates) > 40
    assert rates[-1] < 0.1 * max(rates)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_run_resumes_bitwise(make_arguments, tmp_path, monkeypatch, optimizer):
    # Dropout too: its masks are a function of the step.
    overrides = [*make_arguments().model_overrides, "hidden_dropout=0.1", "attention_dropout=0.1"]
    settings = {"max_steps": 9, "optimizer": optimizer, "model_overrides": overrides}
    whole = run(make_arguments(output_dir=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        patch.setattr("hf_scratch_gpt.pretraining.pretrain.StopRequest", lambda: StopAfter(4))
        with pytest.raises(Interrupted, match=r"stopped by .* at step 5"):
            run(make_arguments(output_dir=str(tmp_path / "parts"), **settings))
    assert (tmp_path / "parts/checkpoints/checkpoint-5/manifest.json").is_file()
    parts = run(make_arguments(output_dir=str(tmp_path / "parts"), **settings))
    assert_equal_weights(whole, parts)
    timed = {"seconds", "tokens_per_second", "flops_per_second", "mfu", "data_share", "memory_bytes"}
    for one, other in zip(read_curve(whole), read_curve(parts), strict=True):
        assert {key: one[key] for key in one.keys() - timed} == {key: other[key] for key in other.keys() - timed}


def test_a_damaged_checkpoint_is_passed_over(make_arguments, tmp_path, monkeypatch, caplog):
    settings = {"max_steps": 8, "checkpoint_steps": 3}
    whole = run(make_arguments(output_dir=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        patch.setattr("hf_scratch_gpt.pretraining.pretrain.StopRequest", lambda: StopAfter(6))
        with pytest.raises(Interrupted):
            run(make_arguments(output_dir=str(tmp_path / "parts"), **settings))
    newest = tmp_path / "parts/checkpoints/checkpoint-7/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    parts = run(make_arguments(output_dir=str(tmp_path / "parts"), **settings))
    assert "content does not match its checksum" in caplog.text
    assert_equal_weights(whole, parts)


def break_gradients(monkeypatch, steps):
    original = PretrainingLoop._accumulate_gradients

    def broken(self, batch):
        loss = original(self, batch)
        if self.state.step in steps:
            next(self.module.parameters()).grad[0] = math.nan
        return loss

    monkeypatch.setattr(PretrainingLoop, "_accumulate_gradients", broken)


def test_a_non_finite_update_is_skipped_and_noted(make_arguments, monkeypatch):
    break_gradients(monkeypatch, {2})
    folder = run(make_arguments())
    assert read_metrics(folder)["metrics"]["skipped_updates"] == 1
    assert all(value.isfinite().all() for value in weights(folder).values())
    (skipped,) = [row for row in read_curve(folder) if "skipped_update" in row]
    assert skipped["step"] == 3
    assert "gradient norm nan" in skipped["skipped_update"]


def test_non_finite_updates_in_a_row_end_the_run(make_arguments, monkeypatch):
    break_gradients(monkeypatch, set(range(100)))
    with pytest.raises(ValueError, match="5 updates in a row were skipped up to step 5"):
        run(make_arguments(max_steps=20))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_minutes": 1}, "both 'max_steps' .6. and 'max_minutes' .1. are given"),
        ({"max_steps": 0}, "neither 'max_steps' nor 'max_minutes' is given"),
        ({"dataset_dir": ""}, "'dataset_dir' is missing"),
        ({"schedule": "wsb"}, "'schedule' is 'wsb', expected one of wsd, cosine, linear"),
        ({"compile": "yes"}, "'compile' is 'yes'"),
        ({"warmup_steps": -1}, "'warmup_steps' is -1, expected at least 0"),
        ({"momentum": 1.5}, "'momentum' is 1.5, expected 0 to 1"),
        ({"batch_size": 3, "gradient_accumulation_steps": 2}, "'batch_size' 3 does not divide by 1 processes x 2"),
        ({"context_length": 10**6}, "fewer than one window of 1000000"),
        ({"model_overrides": ["hidden_size"]}, "'hidden_size' is not of the form key=value"),
        ({"model_overrides": ["hidden_sise=3"]}, "hidden_sise.*hidden_size"),
        ({"model_overrides": {"vocab_size": 100}}, "vocab_size is 100, the tokenizer in .* has 300 tokens"),
        (
            {"model_overrides": {"max_position_embeddings": 16}},
            "'context_length' 32 is larger than the model's max_position_embeddings 16",
        ),
        ({"report_to": "trackio"}, "'trackio', which is not installed"),
        ({"max_steps": 0, "max_minutes": 0.01}, "leaves no time to train"),
    ],
)
def test_a_users_mistake_is_named(make_arguments, monkeypatch, changes, message):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=message):
        run(make_arguments(**changes))


def test_a_folder_that_was_not_prepared_is_named(make_arguments, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"has no manifest.json; expected a folder that `scratch-gpt prepare`"):
        run(make_arguments(dataset_dir=str(tmp_path)))


def test_a_recipe_and_the_command_line_give_the_settings(prepared_folder, tmp_path):
    from hf_scratch_gpt.pretraining.pretrain import Arguments
    from hf_scratch_gpt.runs import parse_arguments

    recipe = tmp_path / "pretrain.yaml"
    recipe.write_text("output_dir: out\nmax_minutes: 5\ncompile: 'true'\nmodel_overrides: {hidden_size: 64}\n")
    arguments = parse_arguments(Arguments, [str(recipe), "--momentum", "0.9"])
    assert (arguments.compile, arguments.momentum, arguments.max_minutes) == ("true", 0.9, 5)
    assert setup.parse_overrides(arguments.model_overrides) == {"hidden_size": 64}
    arguments = parse_arguments(Arguments, [str(recipe), "--model_overrides", "hidden_size=32,num_hidden_layers=3"])
    assert setup.parse_overrides(arguments.model_overrides) == {"hidden_size": 32, "num_hidden_layers": 3}


def test_compile_is_tried_only_where_it_can_pay(make_arguments, monkeypatch, caplog):
    long, short = make_arguments(max_steps=0, max_minutes=5), make_arguments(max_steps=0, max_minutes=1)
    for arguments in (long, short):
        arguments.compile = "auto"
    monkeypatch.setattr(setup.shutil, "which", lambda name: "/usr/bin/g++")
    assert setup.wants_compile(long, 4_000_000, "cpu")
    assert not setup.wants_compile(short, 4_000_000, "cpu")
    assert setup.wants_compile(short, 4_000_000, "cuda")
    monkeypatch.setattr(setup.shutil, "which", lambda name: None)
    assert not setup.wants_compile(long, 4_000_000, "cpu")
    assert "no C++ compiler was found" in caplog.text


def test_a_failing_compiler_is_an_error_only_if_it_was_demanded(monkeypatch, caplog):
    class Broken(setup.LanguageModelLoss):
        def compile(self):
            def fail(*args, **kwargs):
                raise RuntimeError("no Python.h")

            self._compiled_call_impl = fail

    module = Broken(torch.nn.Linear(1, 1), bf16=False)
    with pytest.raises(ValueError, match=r"torch.compile failed: no Python.h"):
        setup.try_compile(module, {"input_ids": torch.zeros(1, 2)}, required=True)
    assert not setup.try_compile(module, {"input_ids": torch.zeros(1, 2)}, required=False)
    assert module._compiled_call_impl is None
    assert "torch.compile failed, so training runs uncompiled" in caplog.text
