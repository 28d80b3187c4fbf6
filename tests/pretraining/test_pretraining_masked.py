"""The masked objective: learns, resumes bitwise, divides by all masked tokens, and its model fills masks in."""

import json
import math

import pytest
import torch
from pretraining_tiny import TINY_MODEL
from safetensors.torch import load_file

import hf_scratch_gpt.pretraining.setup as setup
from hf_scratch_gpt.pretraining.loop import PretrainingLoop
from hf_scratch_gpt.pretraining.pretrain import Arguments, run
from hf_scratch_gpt.runs import Interrupted, read_metrics


@pytest.fixture
def masked_arguments(make_arguments, masked_folder):
    return lambda **changes: make_arguments(**{"objective": "masked", "dataset_dir": str(masked_folder), **changes})


@pytest.fixture(scope="module")
def finished(masked_folder, tmp_path_factory):
    """A run that is long enough to learn something."""
    arguments = Arguments(
        output_dir=str(tmp_path_factory.mktemp("run") / "pretrain"),
        dataset_dir=str(masked_folder),
        objective="masked",
        model_overrides=TINY_MODEL,
        context_length=32,
        batch_size=16,
        max_steps=150,
        precision="fp32",
        compile="false",
    )
    return run(arguments)


def assert_equal_weights(one, other, **tolerance):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], **(tolerance or {"atol": 0, "rtol": 0}))


def read_curve(folder):
    return [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]


def test_training_learns_more_than_the_most_frequent_token(finished):
    metrics = read_metrics(finished)["metrics"]
    assert metrics["objective"] == "masked"
    low, high = metrics["heldout_masked_accuracy_interval"]
    assert low <= metrics["heldout_masked_accuracy"] <= high
    assert low > metrics["unigram_masked_accuracy_interval"][1] > 0
    assert metrics["heldout_masked_loss"] < 0.8 * metrics["random_init_masked_loss"]
    assert metrics["random_init_masked_loss"] == pytest.approx(math.log(300), rel=0.05)
    assert metrics["heldout_masked_perplexity"] == pytest.approx(math.exp(metrics["heldout_masked_loss"]))
    assert metrics["heldout_masked_tokens"] > 30
    assert not [name for name in metrics if "bits_per_byte" in name]


def test_the_output_fills_masks_in(finished):
    from transformers import AutoModelForMaskedLM, pipeline

    model = AutoModelForMaskedLM.from_pretrained(finished)
    assert (model.config.is_causal, model.config.architectures) == (False, ["ScratchGPTForMaskedLM"])
    assert not (finished / "generation_config.json").exists()
    guesses = pipeline("fill-mask", model=str(finished))("a function that <|mask|> each value", top_k=300)
    assert sum(guess["score"] for guess in guesses) == pytest.approx(1, abs=1e-4)
    assert guesses[0]["score"] > 3 / 300


def test_the_loss_is_the_models_own(masked_arguments, masked_folder):
    """Another way to the same number: transformers' loss of the masked model."""
    from hf_scratch_gpt.pretraining.objectives import make_objective

    dataset = setup.load_dataset(masked_folder, 32)
    model = setup.make_model(masked_arguments(), dataset)
    windows = {"input_ids": torch.randint(7, 300, (4, 32))}
    batch = make_objective("masked", dataset).make_batch(windows, 0, range(4))
    count = (batch["labels"] >= 0).sum()
    assert count == 4 * 5
    summed = setup.LanguageModelLoss(model, bf16=False)(**batch)
    assert summed.item() == pytest.approx(model(**batch).loss.item() * count.item(), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_run_resumes_bitwise(masked_arguments, tmp_path, monkeypatch, optimizer):
    class StopAfterFour:
        looks, requested = 4, property(lambda self: self.look())
        __enter__, __exit__ = lambda self: self, lambda self, *exception: None

        def look(self):
            self.looks -= 1
            return "SIGTERM" if self.looks < 0 else None

    settings = {"max_steps": 9, "optimizer": optimizer}
    whole = run(masked_arguments(output_dir=str(tmp_path / "whole"), **settings))
    with monkeypatch.context() as patch:
        patch.setattr("hf_scratch_gpt.pretraining.pretrain.StopRequest", StopAfterFour)
        with pytest.raises(Interrupted, match=r"stopped by .* at step 5"):
            run(masked_arguments(output_dir=str(tmp_path / "parts"), **settings))
    parts = run(masked_arguments(output_dir=str(tmp_path / "parts"), **settings))
    assert_equal_weights(whole, parts)
    one, other = (read_metrics(folder)["metrics"] for folder in (whole, parts))
    assert one["heldout_masked_loss"] == other["heldout_masked_loss"]


def run_whole_and_in_parts(masked_arguments, tmp_path):
    settings = {"max_steps": 3, "optimizer": "adamw", "model_overrides": TINY_MODEL}
    whole = run(masked_arguments(output_dir=str(tmp_path / "whole"), **settings))
    parts = run(masked_arguments(output_dir=str(tmp_path / "parts"), gradient_accumulation_steps=4, **settings))
    return [[row["loss"] for row in read_curve(folder)] for folder in (whole, parts)], whole, parts


@pytest.fixture
def uneven(monkeypatch):
    """Row r of a step has r targets fewer, so that a mean of the parts' means is another number."""
    original = setup.LanguageModelLoss.forward
    from hf_scratch_gpt.pretraining.objectives import MaskedObjective

    make_batch = MaskedObjective.make_batch

    def uneven_batch(self, *arguments):
        batch = make_batch(self, *arguments)
        for row in range(len(batch["labels"])):
            chosen = (batch["labels"][row] >= 0).nonzero().flatten()
            batch["labels"][row, chosen[: len(chosen) - 1 - row]] = -100
        return batch

    monkeypatch.setattr(MaskedObjective, "make_batch", uneven_batch)
    return original


def test_one_batch_equals_its_accumulated_parts(masked_arguments, tmp_path, uneven):
    losses, whole, parts = run_whole_and_in_parts(masked_arguments, tmp_path)
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert_equal_weights(whole, parts, atol=2e-5, rtol=1e-4)


def test_the_accumulation_test_notices_a_mean_of_means(masked_arguments, tmp_path, uneven, monkeypatch):
    def mean_of_a_part(self, input_ids, position_ids=None, labels=None):
        return uneven(self, input_ids, position_ids, labels) / (labels >= 0).sum() * len(labels)

    monkeypatch.setattr(setup.LanguageModelLoss, "forward", mean_of_a_part)
    monkeypatch.setattr(PretrainingLoop, "_count_targets", lambda self, batch: 4)  # rows of a batch
    losses, _, _ = run_whole_and_in_parts(masked_arguments, tmp_path)
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_bf16_and_one_graph_train_too(masked_arguments, monkeypatch):
    """`backend="eager"` traces as the compiler would; the trial step runs before the first real one."""
    monkeypatch.setattr(
        setup.LanguageModelLoss,
        "compile",
        lambda self: torch.nn.Module.compile(self, backend="eager", fullgraph=True),
    )
    metrics = read_metrics(run(masked_arguments(precision="bf16", compile="true", max_steps=3)))["metrics"]
    assert (metrics["precision"], metrics["compiled"], metrics["skipped_updates"]) == ("bf16", True, 0)
    assert math.isfinite(metrics["heldout_masked_loss"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "mask"}, "'objective' is 'mask', expected one of causal, masked"),
        ({"model_overrides": ["is_causal=true"]}, "is_causal True contradicts the objective 'masked'"),
        ({"objective": "causal", "model_overrides": {"is_causal": False}}, "contradicts the objective 'causal'"),
    ],
)
def test_a_users_mistake_is_named(masked_arguments, changes, message):
    with pytest.raises(ValueError, match=message):
        run(masked_arguments(**changes))


def test_a_tokenizer_without_a_mask_token_is_named(masked_arguments, prepared_folder):
    with pytest.raises(ValueError, match=rf"{prepared_folder}: the masked objective needs a tokenizer with a mask"):
        run(masked_arguments(dataset_dir=str(prepared_folder)))
