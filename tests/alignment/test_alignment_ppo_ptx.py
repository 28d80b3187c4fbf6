"""PPO-ptx: a pretraining batch in each update, from a prepared folder or text, exact to resume."""

import json
from pathlib import Path

import pytest
import torch
from ppo_tiny import make_gpt2, make_llama, make_tokenizer, make_trainer, parameters_of
from tokenizers import pre_tokenizers
from torch.testing import assert_close

from hf_scratch_gpt.data.manifest import write_manifest
from hf_scratch_gpt.data.shards import (
    ShardWriter,
    encode_documents,
    separator_id,
    token_dtype,
    tokenizer_fingerprint,
)

TEXTS = [" ".join(f"w{(start + step * 7) % 53}" for step in range(20)) for start in range(40)]
OPTIONS = {"ptx_coef": 2.0, "ptx_batch_size": 4, "ptx_length": 12}


def mixed(folder, model=None, texts=TEXTS, **options):
    return make_trainer(folder, model, given={"ptx_dataset": texts}, **{**OPTIONS, **options})


@pytest.mark.parametrize("make_model", [make_llama, make_gpt2], ids=["llama", "gpt2"])
def test_the_loss_is_ppos_and_the_weighted_loss_of_the_models_own_forward(tmp_path, make_model):
    trainer, plain = mixed(tmp_path / "mixed", make_model()), make_trainer(tmp_path / "plain", make_model())
    found = []
    for each in (trainer, plain):
        each.create_optimizer_and_scheduler(8)
        inputs = each._prepare_inputs({"micro_step": torch.tensor([0])})
        found.append(each.compute_loss(each.model, inputs))
    windows = trainer.ptx.batch(0)
    model = make_model()
    alone = [{name: value[row : row + 1] for name, value in windows.items()} for row in range(4)]
    expected = torch.stack([model(**one, labels=one["input_ids"], use_cache=False).loss for one in alone]).mean()
    assert_close(found[0], found[1] + 2.0 * expected, atol=1e-5, rtol=1e-5)


def test_the_policy_stays_better_at_its_pretraining_text(tmp_path):
    losses = {}
    for coefficient in (0.0, 2.0):
        trainer = mixed(tmp_path / str(coefficient), ptx_coef=coefficient, max_steps=40, learning_rate=1e-2)
        trainer.train()
        lines = [line for line in trainer.state.log_history if "loss" in line]
        losses[coefficient] = sum(line["ptx_loss"] for line in lines[-5:]) / 5
        line = lines[3]
        assert line["loss"] == pytest.approx(
            line["policy_loss"] + 0.1 * line["value_loss"] + coefficient * line["ptx_loss"], rel=1e-6
        )
    assert losses[2.0] < losses[0.0] - 0.5


@pytest.mark.parametrize("peft", [False, True], ids=["full", "lora"])
def test_resume_is_exact_with_pretraining_text(tmp_path, peft):
    options = {"save_strategy": "steps", "save_steps": 3, "max_steps": 8, "peft": peft, "critic": "separate"}
    whole = mixed(tmp_path, **options)
    whole.train()
    for step in (3, 6):
        resumed = mixed(tmp_path, **{**options, "save_strategy": "no"})
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert all(torch.equal(value, parameters_of(resumed)[n]) for n, value in parameters_of(whole).items())
        assert resumed.state.log_history[-2]["ptx_loss"] == whole.state.log_history[-2]["ptx_loss"]


def test_accumulation_changes_nothing(tmp_path):
    settings = {"learning_rate": 1e-3, "optim": "sgd", "max_grad_norm": 0.0, "max_steps": 4}
    whole = mixed(tmp_path / "whole", per_device_train_batch_size=8, ptx_batch_size=8, **settings)
    parts = mixed(
        tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4, ptx_batch_size=2, **settings
    )
    whole.train()
    parts.train()
    for name, value in parameters_of(whole).items():
        assert_close(parameters_of(parts)[name], value, atol=1e-6, rtol=1e-4, msg=name)


def prepare(folder, tokenizer):
    """What the stage `prepare` writes, for TEXTS."""
    saved = tokenizer.save_pretrained(folder)
    writer = ShardWriter(folder / "train", token_dtype(len(tokenizer)), separator_id(tokenizer), shard_tokens=100)
    for text, ids in zip(TEXTS, encode_documents(tokenizer, TEXTS), strict=True):
        writer.add(ids, len(text))
    manifest = {
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "separator_id": separator_id(tokenizer),
        "dtype": token_dtype(len(tokenizer)).name,
        "splits": {"train": writer.close()},
    }
    write_manifest(folder, manifest, [Path(name).name for name in saved])
    return str(folder)


def test_a_prepared_folder_a_file_and_text_give_the_same_windows(tmp_path):
    folder = prepare(tmp_path / "prepared", make_tokenizer())
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    sources = [mixed(tmp_path / "ppo", texts=texts).ptx for texts in (TEXTS, folder, str(path), rows_of(TEXTS))]
    for step in range(40):
        first, *others = (source.batch(step) for source in sources)
        for other in others:
            assert torch.equal(first["input_ids"], other["input_ids"])
            assert torch.equal(first["position_ids"], other["position_ids"])
    assert not torch.equal(sources[0].batch(0)["input_ids"], sources[0].batch(1)["input_ids"])
    other = make_tokenizer()
    other.backend_tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ValueError, match="was prepared with another tokenizer than the policy's"):
        mixed(tmp_path / "ppo", texts=folder, tokenizer=other)


def rows_of(texts):
    return [{"text": text} for text in texts]


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "ptx_dataset: has no text"),
        ([{"words": "w1"}], {}, r"ptx_dataset, row 0: no text in a column 'text' \(columns: words\)"),
        (["w1 w2"], {}, "has 3 tokens, too few for windows of 12"),
        (TEXTS, {"ptx_length": 99}, "'ptx_length' is 99, but the model's context is 32 tokens"),
        ("/nowhere/text.jsonl", {}, "/nowhere/text.jsonl: neither a folder that 'prepare' wrote nor a file"),
    ],
)
def test_text_that_cannot_be_mixed_in_is_named(tmp_path, texts, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        mixed(tmp_path, texts=texts, **options)
