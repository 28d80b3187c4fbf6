"""`classify` gives a complete classifier that answers by itself; its figures are what they say; it survives a kill."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from classify_tiny import make_bert, make_gpt2, make_llama, make_texts, write_recipe, write_texts
from finetuning_tiny import digest, make_base
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_scratch_gpt.data.labelled import load_labelled, split_rows
from hf_scratch_gpt.finetuning import classify
from hf_scratch_gpt.runs import parse_arguments, read_metrics

# Classifies the lines of standard input where this package cannot be imported.
STRANGER = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_scratch_gpt":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
import json
from transformers import pipeline

answer = pipeline("text-classification", model=sys.argv[1], trust_remote_code=True, device="cpu")
print(json.dumps([answer(text)[0]["label"] for text in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_texts(tmp_path_factory.mktemp("data") / "texts.tsv", make_texts(80))


def train(base, data, folder, **settings):
    return classify.run(parse_arguments(classify.Arguments, [write_recipe(folder, base, data, **settings)]))


@pytest.fixture(scope="module")
def trained(base, data, tmp_path_factory):
    before = digest(base)
    folder = train(base, data, tmp_path_factory.mktemp("runs") / "classify", max_steps=60, save_steps=100)
    assert digest(base) == before
    return folder


def weights(folder):
    return load_file(folder / "model.safetensors")


def heldout_of(data, fraction=0.2, seed=42):
    rows = load_labelled(data)
    return rows.select(split_rows(rows.labels, fraction, seed, False)[1])


def test_the_output_is_a_complete_classifier_that_answers_where_the_package_is_not_installed(trained, data, tmp_path):
    names = {path.name for path in trained.iterdir()}
    expected = {
        "config.json",
        "tokenizer.json",
        "generation_config.json",
        "recipe.yaml",
        "metrics.json",
        "curve.jsonl",
    }
    assert expected | {"modeling_scratch_gpt.py", "model.safetensors"} <= names
    assert not {"checkpoints", "adapter", "rejected.jsonl", "chat_template.jinja"} & names
    config = AutoModelForSequenceClassification.from_pretrained(trained).config
    assert (config.id2label, config.label2id) == ({0: "cold", 1: "warm"}, {"cold": 0, "warm": 1})
    assert config.pad_token_id == AutoTokenizer.from_pretrained(trained).pad_token_id
    heldout = heldout_of(data)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = subprocess.run(
        [sys.executable, "-c", STRANGER, str(trained)],
        input=json.dumps(heldout.texts),
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)
    metrics = read_metrics(trained)["metrics"]
    labels = ["cold", "warm"]
    pairs = list(zip(heldout.labels, answers, strict=True))
    counts = [[pairs.count((truth, answer)) for answer in labels] for truth in labels]
    assert metrics["confusion_matrix"] == {"labels": labels, "true_by_predicted": counts}
    assert metrics["heldout_accuracy"] == sum(truth == answer for truth, answer in pairs) / len(pairs)
    assert metrics["heldout_accuracy"] >= 0.9  # "red" is easy to see
    assert metrics["f1_of"] == "warm"


def test_metrics_say_what_was_done(trained):
    metrics = read_metrics(trained)["metrics"]
    assert (metrics["examples"], metrics["heldout_examples"], metrics["steps"]) == (64, 16, 60)
    assert metrics["columns"] == {"label": "1", "text": "2"}
    assert sum(metrics["labels"].values()) == 64
    assert metrics["labels"]["cold"] > metrics["labels"]["warm"]
    assert (metrics["majority_label"], metrics["rejected_rows"], metrics["max_length"]) == ("cold", 0, 96)
    assert metrics["truncated_texts"] == {"train": 0, "heldout": 0}
    assert metrics["trainable_parameters"] == metrics["parameters"]
    assert (metrics["heldout_duplicates"], metrics["removed_duplicates"]) == (0, 0)


def test_held_out_texts_are_taken_out_of_training_or_told_apart(base, tmp_path):
    rows = make_texts(40)
    copies = [(label, text.upper() + " ") for label, text in rows[:20]]
    data = write_texts(tmp_path / "a.tsv", rows + copies)
    heldout = heldout_of(data)
    out = {" ".join(text.casefold().split()) for text in heldout.texts}
    within = [" ".join(text.casefold().split()) in out for _, text in rows + copies]
    clean = read_metrics(train(base, data, tmp_path / "clean", max_steps=1))["metrics"]
    kept = read_metrics(train(base, data, tmp_path / "kept", max_steps=1, deduplicate=False))["metrics"]
    assert clean["removed_duplicates"] == sum(within) - len(heldout) > 0
    assert clean["examples"] == 48 - clean["removed_duplicates"]
    assert (kept["examples"], kept["removed_duplicates"]) == (48, 0)
    assert kept["heldout_duplicates"] == clean["heldout_duplicates"] > 0
    assert kept["never_seen_examples"] == 12 - kept["heldout_duplicates"]
    assert "never_seen_accuracy" not in clean


@pytest.mark.parametrize(("make", "settings"), [(make_base, {"peft": "lora", "lora_dropout": 0.1}), (make_llama, {})])
def test_a_run_that_broke_in_its_second_epoch_resumes_to_the_very_same_weights(
    data, tmp_path, monkeypatch, make, settings
):
    base = make(tmp_path / "base")
    settings = {"max_steps": 20, "save_steps": 6, "aux_lm_weight": 0.5, **settings}  # an epoch has 16 steps
    whole = train(base, data, tmp_path / "whole", **settings)
    step = classify.ClassificationTrainer.training_step

    def break_at_19(self, *args, **kwargs):
        if self.state.global_step == 19:
            raise RuntimeError("planted")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(classify.ClassificationTrainer, "training_step", break_at_19)
    with pytest.raises(RuntimeError, match="planted"):
        train(base, data, tmp_path / "broken", **settings)
    monkeypatch.setattr(classify.ClassificationTrainer, "training_step", step)
    resumed = train(base, data, tmp_path / "broken", **settings)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    measured = [read_metrics(folder)["metrics"] for folder in (whole, resumed)]
    for metrics in measured:
        del metrics["last_train_loss"]  # a mean since the last line of the curve, or since the checkpoint
    assert measured[0] == measured[1]


def test_killed_for_real_and_run_again_it_gives_the_very_same_weights(base, data, tmp_path):
    settings = {"max_steps": 40, "save_steps": 6, "aux_lm_weight": 0.5}
    whole = train(base, data, tmp_path / "whole", **settings)
    folder = tmp_path / "killed"
    recipe = write_recipe(folder, base, data, **settings)
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_scratch_gpt", "classify", recipe], stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    deadline = time.monotonic() + 270
    while not list(folder.glob("checkpoints/checkpoint-*/manifest.json")) and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    resumed = classify.run(parse_arguments(classify.Arguments, [recipe]))
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_adapters_are_merged_with_their_head(base, data, tmp_path):
    folder = train(base, data, tmp_path / "lora", peft="lora", lora_r=4, max_steps=8)
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    (head,) = [value for name, value in adapter.items() if name.endswith("score.weight")]
    assert torch.equal(weights(folder)["score.weight"], head)
    assert torch.equal(weights(folder)["model.embed_tokens.weight"], weights(base)["model.embed_tokens.weight"])


@pytest.mark.parametrize(("make", "peft"), [(make_bert, "lora"), (make_gpt2, "none")])
def test_other_peoples_models_become_classifiers_of_one_text_and_of_two(data, tmp_path, make, peft):
    rows = [
        json.dumps({"label": number % 3, "text": text, "b": label})
        for number, (label, text) in enumerate(make_texts(30))
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(rows))
    base = make(tmp_path / "base")
    settings = {"text_pair_column": "b", "max_steps": 2, "peft": peft}
    folder = train(base, tmp_path / "pairs.jsonl", tmp_path / "pairs", **settings)
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert list(model.config.id2label.values()) == ["0", "1", "2"]
    metrics = read_metrics(folder)["metrics"]
    assert metrics["f1_of"] == "macro"
    saved = AutoTokenizer.from_pretrained(folder)
    assert model.config.pad_token_id == saved.pad_token_id < model.get_input_embeddings().weight.shape[0]
    single = train(base, data, tmp_path / "single", max_steps=1, peft="none" if peft == "lora" else "lora")
    assert read_metrics(single)["metrics"]["heldout_examples"] == 16


def test_a_masked_model_of_ours_is_classified_reading_both_ways(data, tmp_path):
    base = make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    config |= {"is_causal": False, "architectures": ["ScratchGPTForMaskedLM"]}
    (base / "config.json").write_text(json.dumps(config))
    folder = train(base, data, tmp_path / "run", max_steps=1)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert model.config.is_causal is False
    with pytest.raises(ValueError, match="aux_lm_weight needs a causal language model"):
        train(base, data, tmp_path / "aux", aux_lm_weight=0.5)


def test_settings_are_chosen_by_a_validation_part_that_is_neither_trained_on_nor_held_out(base, data, tmp_path):
    settings = {"max_steps": 10, "validation_fraction": 0.25, "eval_strategy": "steps", "eval_steps": 5}
    folder = train(base, data, tmp_path / "run", **settings)
    metrics = read_metrics(folder)["metrics"]
    sizes = [metrics[name] for name in ("examples", "validation_examples", "heldout_examples")]
    assert sizes == [48, 16, 16]
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    seen = [row["eval_accuracy"] for row in curve if "eval_accuracy" in row]
    assert seen[-1] == pytest.approx(metrics["validation_accuracy"])
    with pytest.raises(ValueError, match="'eval_strategy' needs a validation_fraction"):
        train(base, data, tmp_path / "none", eval_strategy="epoch")
    arguments = parse_arguments(classify.Arguments, [str(folder.with_suffix(".yaml"))])
    parts = classify.load_parts(arguments)
    texts = [set(part.texts) for part in (parts.train, parts.validation, parts.heldout)]
    assert sum(map(len, texts)) == len(set.union(*texts)) == 80


def test_given_held_out_rows_are_what_is_measured_and_unusable_rows_are_listed(base, data, tmp_path):
    rows = make_texts(120)[80:]
    path = tmp_path / "heldout.csv"
    lines = [f'{label},"{text}"' for label, text in rows] + ["warm,"]
    path.write_text("\n".join(["label,text", *lines]))
    folder = train(
        base, data, tmp_path / "run", eval_dataset=str(path), max_steps=1, allow_dropped_rows=True, max_length=8
    )
    metrics = read_metrics(folder)["metrics"]
    assert (metrics["examples"], metrics["heldout_examples"], metrics["rejected_rows"]) == (80, 40, 1)
    assert metrics["truncated_texts"]["heldout"] > 0
    (told,) = [json.loads(line) for line in (folder / "rejected.jsonl").read_text().splitlines()]
    assert told == {"file": str(path), "place": "line 42", "reason": "'text' is empty"}


def test_labels_that_cannot_be_learnt_are_told_with_file_and_row(base, data, tmp_path):
    one = write_texts(tmp_path / "one.tsv", [("warm", f"red {number}") for number in range(20)])
    with pytest.raises(ValueError, match=r"one.tsv: all 20 rows have the label 'warm'.*needs two labels"):
        train(base, one, tmp_path / "a")
    other = write_texts(tmp_path / "other.tsv", [*make_texts(20), ("hot", "red red"), ("hot", "red blue")])
    with pytest.raises(ValueError, match=r"other.tsv, line 21: the label 'hot' is not one of .*: '(warm|cold)', "):
        train(base, data, tmp_path / "b", eval_dataset=other)
    rare = write_texts(tmp_path / "rare.tsv", [*make_texts(20), ("hot", "red red")])
    out = next(seed for seed in range(99) if "hot" in heldout_of(rare, seed=seed).labels)
    with pytest.raises(ValueError, match=r"rare.tsv, line 21: no row with the label 'hot' is left.*set stratify"):
        train(base, rare, tmp_path / "c", seed=out)
    train(base, rare, tmp_path / "d", seed=out, stratify=True, max_steps=1)
    many = write_texts(tmp_path / "many.tsv", [(f"l{number}", f"red {number // 2}") for number in range(20)])
    with pytest.raises(ValueError, match=r"many.tsv: 20 different labels in 20 rows of column '1'"):
        train(base, many, tmp_path / "e", label_column="1", text_column="2")
    with pytest.raises(ValueError, match=r"'positive_label' is 'wram'; did you mean 'warm'\?"):
        train(base, data, tmp_path / "f", positive_label="wram")
    with pytest.raises(ValueError, match=r"'max_length' is 500, but .*base has a context of 96 tokens"):
        train(base, data, tmp_path / "g", max_length=500)
    with pytest.raises(ValueError, match="'aux_lm_weight' is -1"):
        train(base, data, tmp_path / "h", aux_lm_weight=-1)
