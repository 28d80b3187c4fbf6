"""The reference's log-probabilities are computed once, kept whole, and change nothing in what is trained."""

import json
import logging
import re

import pytest
import torch
from alignment_tiny import make_model, write_preferences, write_recipe
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_scratch_gpt.alignment import dpo
from hf_scratch_gpt.alignment.reference_cache import COLUMNS, ReferenceCache, digest_model, digest_rows
from hf_scratch_gpt.evaluation.likelihood import answer_log_probabilities
from hf_scratch_gpt.finetuning.tokenise import load_examples, preference_encoder
from hf_scratch_gpt.runs import parse_arguments, read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "sft")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def align(folder, model, data, **settings):
    settings = {"logging_steps": 1, "kl_prompts": 0, **settings}
    return dpo.run(parse_arguments(dpo.Arguments, [write_recipe(folder, model, data, **settings)]))


def losses(folder):
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def first_run(model, data, tmp_path_factory):
    return align(tmp_path_factory.mktemp("runs") / "first", model, data)


def cache_file(run):
    (path,) = (run.parent / ".reference_log_probabilities").glob("*.safetensors")
    return path


def forbid_computing(monkeypatch):
    def refuse(*args):
        raise AssertionError("computed again")

    monkeypatch.setattr(dpo.PairDPOTrainer, "_reference_values", refuse)


def test_kept_values_are_those_of_each_answer_under_the_start(first_run, model):
    arguments = parse_arguments(dpo.Arguments, [str(first_run.with_suffix(".yaml"))])
    tokenizer = AutoTokenizer.from_pretrained(model)
    train = load_examples(arguments, "preferences", preference_encoder(tokenizer), 96).train
    start = AutoModelForCausalLM.from_pretrained(model)
    kept = load_file(cache_file(first_run))
    for column, answers in zip(COLUMNS, ("chosen_ids", "rejected_ids"), strict=True):
        pairs = list(zip(train["prompt_ids"], train[answers], strict=True))
        assert kept[column].tolist() == pytest.approx(answer_log_probabilities(start, pairs, 7), abs=1e-4)


def test_another_run_reads_them_and_trains_to_the_very_same_weights(first_run, model, data, monkeypatch):
    forbid_computing(monkeypatch)
    second = align(first_run.parent / "second", model, data)
    assert same(weights(first_run), weights(second))
    assert losses(first_run) == losses(second)
    told = [read_metrics(run)["metrics"]["reference_log_probabilities"] for run in (first_run, second)]
    assert told == ["computed", "from disk"]


@pytest.mark.parametrize("peft", ["lora", "none"])
def test_the_losses_are_those_of_scoring_the_reference_at_each_step(peft, model, data, tmp_path):
    settings = {"peft": peft, "learning_rate": 1e-3, "max_steps": 6}
    ours = align(tmp_path / "kept", model, data, **settings)
    each = align(tmp_path / "each", model, data, precompute_ref_log_probs=False, **settings)
    assert losses(ours) == pytest.approx(losses(each), rel=1e-5)
    assert len(losses(ours)) == 6
    assert losses(ours)[-1] < losses(ours)[0]


@pytest.mark.parametrize("length", [{"max_steps": 3}, {"max_steps": -1, "num_train_epochs": 0.4}])
def test_of_a_short_run_only_the_pairs_that_it_meets_are_scored(length, model, data, tmp_path, monkeypatch):
    each = align(tmp_path / "each", model, data, precompute_ref_log_probs=False, **length)
    scored = []
    compute = dpo.PairDPOTrainer._reference_values

    def count(self, rows, batch_size):
        scored.append(len(rows))
        return compute(self, rows, batch_size)

    monkeypatch.setattr(dpo.PairDPOTrainer, "_reference_values", count)
    short = align(tmp_path / "short", model, data, **length)
    steps = read_metrics(short)["metrics"]["steps"]
    assert scored == [4 * steps]  # of 30 pairs
    assert steps in (3, 4)
    assert losses(short) == pytest.approx(losses(each), rel=1e-5)


def test_a_run_that_broke_goes_on_with_what_it_has_computed(first_run, model, data, tmp_path, monkeypatch):
    step = dpo.PairDPOTrainer.training_step

    def break_at_8(self, *args, **kwargs):
        if self.state.global_step == 8:
            raise RuntimeError("planted")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(dpo.PairDPOTrainer, "training_step", break_at_8)
        with pytest.raises(RuntimeError, match="planted"):
            align(tmp_path / "broken", model, data)
    forbid_computing(monkeypatch)
    assert same(weights(align(tmp_path / "broken", model, data)), weights(first_run))


class Rows(dict):
    """Encoded pairs by column, as the cache reads them."""

    def __len__(self):
        return len(self["prompt_ids"])


ROWS = Rows(prompt_ids=[[1, 2], [3]], chosen_ids=[[4], [5, 6]], rejected_ids=[[7], [8]])
VALUES = {COLUMNS[0]: [-1.5, -2.25], COLUMNS[1]: [-3.0, -0.125]}


def make_cache(folder, reference="model", **method):
    return ReferenceCache(folder / "cache", reference, method)


def fail():
    raise AssertionError("computed again")


def test_what_was_written_is_read(tmp_path):
    assert make_cache(tmp_path).get(ROWS, lambda: VALUES) == VALUES
    again = make_cache(tmp_path)
    assert again.get(ROWS, fail) == VALUES
    assert (again.found, again.computed) == (1, 0)
    assert [path.name for path in again.folder.iterdir()] == [again.path_of(ROWS)[0].name]  # and nothing temporary


def test_who_finds_values_has_those_of_who_computed_them(tmp_path):
    fine = {COLUMNS[0]: [-1 / 3, -2 / 3], COLUMNS[1]: [-1e-9, -1 / 7]}  # not representable in the file's fp32
    computed = make_cache(tmp_path).get(ROWS, lambda: fine)
    assert computed == make_cache(tmp_path).get(ROWS, fail)
    assert computed[COLUMNS[0]] == pytest.approx(fine[COLUMNS[0]])


def test_other_rows_another_model_or_another_method_find_nothing(tmp_path):
    make_cache(tmp_path, precision="fp32").get(ROWS, lambda: VALUES)
    others = [
        (make_cache(tmp_path, precision="bf16"), ROWS),
        (make_cache(tmp_path, "other", precision="fp32"), ROWS),
        (make_cache(tmp_path, precision="fp32"), Rows(ROWS, chosen_ids=[[4], [5, 7]])),
        (make_cache(tmp_path, precision="fp32"), Rows(ROWS, prompt_ids=[[1], [3]], chosen_ids=[[2, 4], [5, 6]])),
        (make_cache(tmp_path, precision="fp32"), Rows({name: ids[::-1] for name, ids in ROWS.items()})),
    ]
    for cache, rows in others:
        with pytest.raises(AssertionError, match="computed again"):
            cache.get(rows, fail)


def test_the_model_is_known_by_its_weights_and_config_not_by_its_place(model, tmp_path):
    start = AutoModelForCausalLM.from_pretrained(model)
    start.save_pretrained(tmp_path / "copy")
    copy = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert digest_model(start) == digest_model(copy)
    with torch.no_grad():
        copy.model.layers[1].mlp.up_proj.weight[0, 0] += 1e-6
    assert digest_model(start) != digest_model(copy)
    copy.load_state_dict(start.state_dict())
    copy.config.final_logit_softcapping = 30.0
    assert digest_model(start) != digest_model(copy)


def test_row_boundaries_count_in_the_digest():
    moved = Rows(ROWS, prompt_ids=[[1], [2, 3]])
    assert digest_rows(ROWS) != digest_rows(moved)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-3])


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def of_another_run(path):
    save_file({name: torch.zeros(2) for name in COLUMNS}, path, {"key": "0" * 64, "checksum": "0" * 64})


def shorten(path):
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file({name: torch.zeros(1) for name in COLUMNS}, path, metadata)


def rename(path):
    from safetensors import safe_open

    with safe_open(path, framework="np") as file:
        metadata = file.metadata()
    save_file({"chosen": torch.zeros(2)}, path, metadata)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "damaged"),
        (flip, "damaged .its content does not match its checksum"),
        (empty, "damaged"),
        (of_another_run, "made of other rows or by another reference"),
        (shorten, "holds 1 and 1 values for 2 pairs"),
        (rename, "holds chosen, expected ref_chosen_logps, ref_rejected_logps"),
    ],
)
def test_a_damaged_file_is_named_computed_anew_and_replaced(damage, reason, tmp_path, caplog):
    cache = make_cache(tmp_path)
    cache.get(ROWS, lambda: VALUES)
    path, _ = cache.path_of(ROWS)
    damage(path)
    other = {name: [value - 1 for value in values] for name, values in VALUES.items()}
    with caplog.at_level(logging.WARNING):
        assert make_cache(tmp_path).get(ROWS, lambda: other) == other
    (record,) = caplog.records
    assert str(path) in record.getMessage()
    assert re.search(reason, record.getMessage())
    assert make_cache(tmp_path).get(ROWS, fail) == other


def test_a_folder_that_cannot_be_written_costs_a_warning_and_not_the_run(tmp_path, caplog):
    (tmp_path / "cache").write_text("a file in its place")
    with caplog.at_level(logging.WARNING):
        assert make_cache(tmp_path).get(ROWS, lambda: VALUES) == VALUES
    assert "not kept, so that the next run computes it again" in caplog.text
