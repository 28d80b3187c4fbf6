"""SFT gives a complete, loadable, changed model; its loss is what it says; it survives being killed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from finetuning_tiny import digest, make_base, make_rows, write_rows
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from trl.trainer.utils import add_fused_lm_head

from hf_scratch_gpt.finetuning import _compat, sft
from hf_scratch_gpt.finetuning.merge import main as merge_main
from hf_scratch_gpt.finetuning.scoring import score_answers
from hf_scratch_gpt.runs import parse_arguments, read_metrics


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(40))


def recipe_lines(base, data, folder, **settings):
    values = {
        "model_name_or_path": str(base),
        "dataset": data,
        "output_dir": str(folder),
        "bf16": False,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lora_r": 4,
        "save_steps": 4,
        "heldout_fraction": 0.2,
        **settings,
    }
    return "".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items())


def tune(base, data, folder, **settings):
    recipe = folder.with_suffix(".yaml")
    recipe.write_text(recipe_lines(base, data, folder, **settings))
    return sft.run(parse_arguments(sft.Arguments, [str(recipe)]))


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory):
    before = digest(base)
    folder = tune(base, data, tmp_path_factory.mktemp("runs") / "tuned")
    assert digest(base) == before
    return folder


def weights(folder):
    return load_file(Path(folder) / "model.safetensors")


def test_the_output_is_a_complete_plain_model_whose_linear_weights_changed(base, tuned):
    old, new = weights(base), weights(tuned)
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    # Frozen are norms and, in the embedding (which is the head too), all rows but those of the control tokens.
    assert changed == {name for name in old if "_proj" in name} | {"model.embed_tokens.weight"}
    rows = (old["model.embed_tokens.weight"] != new["model.embed_tokens.weight"]).any(1).nonzero()[:, 0].tolist()
    assert AutoTokenizer.from_pretrained(tuned).convert_ids_to_tokens(rows) == ["<|im_start|>", "<|im_end|>"]
    names = {path.name for path in tuned.iterdir()}
    expected = {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json", "recipe.yaml"}
    assert expected | {"metrics.json", "curve.jsonl", "adapter", "modeling_scratch_gpt.py"} <= names
    assert "checkpoints" not in names
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    ends = GenerationConfig.from_pretrained(tuned)
    assert ends.eos_token_id == tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert ends.pad_token_id == tokenizer.pad_token_id
    config = AutoModelForCausalLM.from_pretrained(tuned).config
    assert config.pad_token_id == tokenizer.pad_token_id
    assert config.use_cache  # which the Trainer switches off


def test_metrics_say_what_was_done(base, tuned):
    metrics = read_metrics(tuned)["metrics"]
    assert (metrics["examples"], metrics["heldout_examples"], metrics["steps"]) == (32, 8, 12)
    assert metrics["dropped_rows"] == 0
    assert metrics["tokens"] > 12 * 4 * 10
    # q, k, v, o, gate, up, down of two layers: rank 4 x (inputs + outputs)
    sizes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    control_tokens = 2 * 32  # the rows of <|im_start|> and <|im_end|>
    assert metrics["trainable_parameters"] == 2 * sum(4 * (rows + columns) for rows, columns in sizes) + control_tokens
    curve = [json.loads(line) for line in (tuned / "curve.jsonl").read_text().splitlines()]
    assert any("loss" in row and "tokens_per_second" in row for row in curve)


def test_an_end_token_that_the_base_model_never_read_becomes_likely(base, data, tmp_path):
    """Pretraining moves all unread rows alike; while they are equal none of n has more than 1/n of the probability."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    unread = sorted(tokenizer.added_tokens_decoder)
    with torch.no_grad():
        model.get_input_embeddings().weight[unread] = model.get_input_embeddings().weight[unread[0]].clone()
    for saved in (model, tokenizer):
        saved.save_pretrained(tmp_path / "base")
    folder = tune(tmp_path / "base", data, tmp_path / "tuned", max_steps=60)
    (tmp_path / "tuned.yaml").unlink()
    row = sft.conversation_encoder(tokenizer)(make_rows(1)[0])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(folder)(torch.tensor([row["input_ids"]])).logits
    assert logits[0, -2].softmax(-1)[tokenizer.eos_token_id] > 0.5 > 1 / len(unread)


def test_heldout_loss_is_the_models_own_loss_and_fell(base, tuned, data):
    metrics = read_metrics(tuned)["metrics"]
    arguments = parse_arguments(sft.Arguments, [str(tuned.with_suffix(".yaml"))])
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    encode = sft.conversation_encoder(tokenizer)
    heldout = sft.load_examples(arguments, "conversations", encode, 96).heldout
    model = AutoModelForCausalLM.from_pretrained(tuned).eval()
    total = count = hits = 0.0
    for row in heldout:  # one by one, unpadded, by the model's own loss
        labels = torch.tensor([row["labels"]])
        with torch.no_grad():
            output = model(input_ids=torch.tensor([row["input_ids"]]), labels=labels)
        trained = labels[0, 1:] != -100
        total += output.loss.item() * trained.sum().item()
        hits += (output.logits[0, :-1].argmax(-1) == labels[0, 1:])[trained].sum().item()
        count += trained.sum().item()
    assert metrics["heldout_tokens"] == count
    assert metrics["heldout_loss"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["heldout_token_accuracy"] == pytest.approx(hits / count)
    untuned = AutoModelForCausalLM.from_pretrained(base)
    scores = score_answers(untuned, heldout["input_ids"], heldout["labels"], tokenizer.pad_token_id, 3)
    assert metrics["heldout_loss"] < 0.99 * -sum(score.log_probability for score in scores) / count


def test_merged_logits_are_those_of_the_adapter_on_its_base(base, tuned):
    from peft import PeftModel

    ids = torch.randint(300, (3, 20), generator=torch.Generator().manual_seed(1))
    unmerged = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tuned / "adapter").eval()
    merged = AutoModelForCausalLM.from_pretrained(tuned).eval()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, unmerged(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


def test_merge_command_makes_the_same_model_and_refuses_what_it_cannot_merge(base, tuned, tmp_path):
    assert merge_main([str(tuned / "adapter"), str(tmp_path / "merged"), "--base", str(base)]) == 0
    again, first = weights(tmp_path / "merged"), weights(tuned)
    assert again.keys() == first.keys()
    for name in first:
        torch.testing.assert_close(again[name], first[name], rtol=0, atol=1e-6)
    assert merge_main([str(tuned / "adapter"), str(tmp_path / "by_config")]) == 0  # the base that the adapter names
    with pytest.raises(ValueError, match=r"already a plain model.*adapter is in"):
        merge_main([str(tuned), str(tmp_path / "twice")])
    with pytest.raises(ValueError, match="exists already"):
        merge_main([str(tuned / "adapter"), str(tmp_path / "merged")])
    with pytest.raises(ValueError, match="not an adapter folder"):
        merge_main([str(tmp_path), str(tmp_path / "new")])
    with pytest.raises(FileNotFoundError, match="no such adapter folder"):
        merge_main([str(tmp_path / "missing"), str(tmp_path / "new")])
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        merge_main([str(tuned / "adapter"), str(tmp_path / "new"), "--base", str(tmp_path / "missing")])
    other = make_base(tmp_path / "other", seed=3)
    config = json.loads((other / "config.json").read_text())
    config["hidden_size"] = 64
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"."):
        merge_main([str(tuned / "adapter"), str(tmp_path / "new"), "--base", str(other)])
    assert not (tmp_path / "new").exists()


def test_full_tuning_changes_all_weights_and_leaves_no_adapter(base, data, tmp_path):
    folder = tune(base, data, tmp_path / "full", peft="none", max_steps=2, heldout_fraction=0)
    old, new = weights(base), weights(folder)
    assert old.keys() == new.keys()
    assert not any(torch.equal(old[name], new[name]) for name in old)
    assert not (folder / "adapter").exists()
    assert "heldout_loss" not in read_metrics(folder)["metrics"]


def test_merging_is_exact_after_training_in_bf16_autocast(base, data, tmp_path):
    folder = tune(
        base, data, tmp_path / "bf16", bf16=True, max_steps=3, eval_strategy="epoch"
    )  # raises if a merge moves logits
    assert weights(folder)["model.embed_tokens.weight"].dtype == torch.float32


def test_a_finished_run_is_not_done_again(tuned):
    run_id = read_metrics(tuned)["run_id"]
    assert sft.run(parse_arguments(sft.Arguments, [str(tuned.with_suffix(".yaml"))])) == tuned
    assert read_metrics(tuned)["run_id"] == run_id


def test_a_run_that_broke_in_its_second_epoch_resumes_to_the_very_same_weights(base, data, tmp_path, monkeypatch):
    settings = {"max_steps": 14, "save_steps": 5, "lora_dropout": 0.1}  # an epoch has 8 steps
    whole = tune(base, data, tmp_path / "whole", **settings)
    step = sft.ConversationTrainer.training_step

    def break_at_12(self, *args, **kwargs):
        if self.state.global_step == 12:
            raise RuntimeError("planted")
        return step(self, *args, **kwargs)

    monkeypatch.setattr(sft.ConversationTrainer, "training_step", break_at_12)
    with pytest.raises(RuntimeError, match="planted"):
        tune(base, data, tmp_path / "broken", **settings)
    monkeypatch.setattr(sft.ConversationTrainer, "training_step", step)
    resumed = tune(base, data, tmp_path / "broken", **settings)
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert read_metrics(resumed)["metrics"]["tokens"] == read_metrics(whole)["metrics"]["tokens"]


def test_killed_for_real_and_run_again_it_gives_the_very_same_weights(base, data, tmp_path):
    settings = {"max_steps": 40, "save_steps": 6}
    whole = tune(base, data, tmp_path / "whole", **settings)
    folder = tmp_path / "killed"
    recipe = tmp_path / "killed.yaml"
    recipe.write_text(recipe_lines(base, data, folder, **settings))
    process = subprocess.Popen(
        [sys.executable, "-m", "hf_scratch_gpt", "sft", str(recipe)], stderr=subprocess.DEVNULL, cwd=tmp_path
    )
    deadline = time.monotonic() + 270
    while not list(folder.glob("checkpoints/checkpoint-*/manifest.json")) and time.monotonic() < deadline:
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (folder / "metrics.json").exists()
    resumed = sft.run(parse_arguments(sft.Arguments, [str(recipe)]))
    expected, found = weights(whole), weights(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    steps = [json.loads(line)["step"] for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert steps == sorted(steps)
    assert steps[-1] == 40


def test_scoring_only_trained_positions_gives_the_same_scores_and_gradients(base, monkeypatch):
    ids = torch.randint(4, 300, (3, 12), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[:, :7] = -100
    results = []
    for compact in (False, True):
        monkeypatch.setattr("trl.trainer.utils._use_triton", lambda device, compact=compact: compact)
        if compact:
            _compat.score_only_trained_positions()
        model = AutoModelForCausalLM.from_pretrained(base)
        add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        output.loss.backward()
        results.append((output, model.model.layers[0].mlp.up_proj.weight.grad))
    (plain, plain_gradient), (compacted, compacted_gradient) = results
    for name in ("loss", "log_probs", "entropy"):
        torch.testing.assert_close(plain[name], compacted[name])
    assert torch.equal(plain.is_top1, compacted.is_top1)
    torch.testing.assert_close(plain_gradient, compacted_gradient)


def test_unusable_models_and_data_are_named(base, data, tmp_path):
    with pytest.raises(ValueError, match=r"'max_length' is 500.*context of 96"):
        tune(base, data, tmp_path / "a", max_length=500)
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        tune(tmp_path / "missing", data, tmp_path / "b")
    with pytest.raises((ValueError, OSError), match=r"missing\.jsonl"):
        tune(base, str(tmp_path / "missing.jsonl"), tmp_path / "c")
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"empty\.jsonl"):
        tune(base, str(tmp_path / "empty.jsonl"), tmp_path / "d")
    tokenizer = AutoTokenizer.from_pretrained(base)
    for name, change in (("chat template", {"chat_template": None}), ("pad token", {"pad_token": "<|im_end|>"})):
        folder = make_base(tmp_path / name.replace(" ", "_"))
        for attribute, value in change.items():
            setattr(tokenizer, attribute, value)
        (folder / "chat_template.jinja").unlink()
        tokenizer.save_pretrained(folder)
        with pytest.raises(ValueError, match=name):
            tune(folder, data, tmp_path / f"run_{folder.name}")
        tokenizer = AutoTokenizer.from_pretrained(base)
