"""The stage `ppo`: a whole folder out of a chat model, a reward model and task rows, once and resumably."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from hf_scratch_gpt.alignment.ppo import stage
from hf_scratch_gpt.model import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTTokenizer,
    encode_conversation,
)
from hf_scratch_gpt.reporting.reward_kl import draw_reward_kl
from hf_scratch_gpt.runs import Interrupted, parse_arguments, read_json, read_metrics
from hf_scratch_gpt.runs.checkpoints import newest_checkpoint

COLOURS = ["red", "green", "blue", "black", "white"]


def make_rows(count):
    return [
        {
            "id": str(number),
            "family": "colour",
            "prompt": [{"role": "user", "content": f"Which is {COLOURS[number % 5]}?"}],
            "completion": [{"role": "assistant", "content": COLOURS[number % 5]}],
            "answer": COLOURS[number % 5],
        }
        for number in range(count)
    ]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tokenizer = ScratchGPTTokenizer.train(["Which is red green blue black white? user assistant"] * 9, vocab_size=300)
    set_seed(0)
    config = ScratchGPTConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    ScratchGPTForCausalLM(config).save_pretrained(folder / "sft")
    config.update({"num_labels": 1, "reward_mean": 0.1, "reward_std": 0.5})
    ScratchGPTForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(folder / name)
    for name, count in (("train", 30), ("heldout", 6)):
        lines = [json.dumps(row) for row in make_rows(count)]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return folder


def make_arguments(inputs, output, **options):
    settings = {
        "model_name_or_path": inputs / "sft",
        "reward_model": inputs / "reward",
        "dataset": inputs / "train.jsonl",
        "eval_dataset": inputs / "heldout.jsonl",
        "output_dir": output,
        "total_episodes": 24,
        "rollout_batch_size": 8,
        "per_device_train_batch_size": 4,
        "num_ppo_epochs": 2,
        "max_new_tokens": 6,
        "learning_rate": 1e-2,
        "logging_steps": 4,
        "save_steps": 3,
        **options,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return parse_arguments(stage.Arguments, flags)


def test_the_checkers_weight_enters_the_reward_that_is_maximised(inputs, tmp_path):
    curves = {}
    for weight in (0.0, 2.0):
        options = {"checker_weight": weight, "total_episodes": 8, "missing_end_score": 100}
        folder = stage.run(make_arguments(inputs, tmp_path / str(weight), **options))
        curves[weight] = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
        assert read_metrics(folder)["metrics"]["checker_weight"] == weight
    for without, with_checker in zip(curves[0.0], curves[2.0], strict=True):  # the same first rollout
        assert without["completion"] == with_checker["completion"]
        learnt, gold = (without["rewards"][name] for name in ("reward", "gold"))
        assert without["reward"] == pytest.approx((learnt - 0.1) / 0.5, abs=1e-5)
        assert with_checker["reward"] == pytest.approx((learnt - 0.1) / 0.5 + 2.0 * gold, abs=1e-5)


def test_a_checkers_weight_without_task_questions_is_refused(inputs, tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "Which is red?"}]}] * 9
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    arguments = make_arguments(inputs, tmp_path / "ppo", dataset=path, checker_weight=1.0)
    with pytest.raises(ValueError, match=r"'checker_weight' is 1\.0, but .* no task questions"):
        stage.run(arguments)


@pytest.mark.parametrize(("critic", "peft"), [("separate", "lora"), ("shared", "none")])
def test_it_writes_a_complete_model_that_is_not_made_twice(inputs, tmp_path, critic, peft):
    arguments = make_arguments(inputs, tmp_path / "ppo", critic=critic, peft=peft)
    folder = stage.run(arguments)
    metrics = read_metrics(folder)["metrics"]
    assert metrics["episodes"] == 24
    assert metrics["steps"] == 12
    wanted = {"reward_start", "reward_end", "kl", "share_ended", "train_seconds", "seconds"}
    assert wanted <= set(metrics)
    assert {"training_gold_start", "training_gold_end", "heldout_reward", "heldout_kl"} <= set(metrics)
    assert metrics["heldout_prompts"] == 6
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert {"reward", "kl", "rewards/reward", "rewards/gold", "tokens_per_second"} <= set(curve[0])
    assert len((folder / "completions.jsonl").read_text().splitlines()) == 3 * 4
    assert (folder / "value_model" / "config.json").is_file()
    assert not (folder / "checkpoints").exists()
    assert (folder / "adapter").is_dir() == (peft == "lora")

    before, after = (AutoModelForCausalLM.from_pretrained(source) for source in (inputs / "sft", folder))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = encode_conversation(tokenizer, make_rows(1)[0]["prompt"], add_generation_prompt=True)["input_ids"]
    assert not torch.allclose(before(torch.tensor([ids])).logits, after(torch.tensor([ids])).logits, atol=1e-4)
    assert tokenizer.eos_token_id in after.generation_config.eos_token_id
    made = (folder / "metrics.json").stat().st_mtime_ns
    assert stage.run(arguments) == folder
    assert (folder / "metrics.json").stat().st_mtime_ns == made


def test_an_interrupted_run_ends_as_an_uninterrupted_one(inputs, tmp_path, monkeypatch):
    from hf_scratch_gpt.alignment.ppo.trainer import PPOTrainer

    whole = stage.run(make_arguments(inputs, tmp_path / "whole", critic="shared"))
    plain = PPOTrainer.compute_loss
    calls = []

    def interrupt(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            import signal

            signal.raise_signal(signal.SIGTERM)
        return plain(self, *args, **kwargs)

    arguments = make_arguments(inputs, tmp_path / "stopped", critic="shared")
    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "compute_loss", interrupt)
        with pytest.raises(Interrupted, match="stopped by SIGTERM at step 6"):
            stage.run(arguments)
    assert newest_checkpoint(tmp_path / "stopped" / "checkpoints").name == "checkpoint-6"
    stopped = stage.run(arguments)
    names = ("model.safetensors", "value_model/value_head.safetensors", "completions.jsonl")
    for name in names:
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()

    def without_clock(folder):
        rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
        rows = [row for row in rows if "loss" in row]
        return [{name: row[name] for name in row if "second" not in name and name != "train_runtime"} for row in rows]

    assert without_clock(whole) == without_clock(stopped)
    first, second = (read_json(folder / "metrics.json")["metrics"] for folder in (whole, stopped))
    assert {name for name in first if first[name] != second[name]} <= {"seconds", "train_seconds"}


def test_prompts_need_no_answer_and_may_be_text(inputs, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "Which?"}\n{"prompt": [{"role": "user", "content": "Who?"}], "kind": 2}\n')
    rows = stage.read_prompt_rows(str(path), "train")
    assert rows[0] == {"prompt": [{"role": "user", "content": "Which?"}]}
    assert rows[1]["prompt"][0]["content"] == "Who?"
    assert stage.read_prompt_rows(str(inputs / "train.jsonl"), "train")[3]["answer"] == COLOURS[3]


def test_a_data_file_that_cannot_be_used_is_named(inputs, tmp_path):
    path = tmp_path / "prompts.jsonl"
    for text, message in (
        ("", r"prompts\.jsonl"),
        ('{"question": "Which?"}\n', r"prompts\.jsonl.*(question|prompt)"),
        (
            '{"prompt": "%s"}\n' % ("red " * 200),
            r"prompts\.jsonl, row 0: the prompt has \d+ tokens, but the model's con",
        ),
    ):
        path.write_text(text)
        with pytest.raises((ValueError, OSError), match=message):
            stage.run(make_arguments(inputs, tmp_path / "ppo", dataset=path, eval_prompts=0))


def test_rollouts_are_kept_with_the_gold_reward_beside_the_learnt_one(inputs, tmp_path):
    folder = stage.run(make_arguments(inputs, tmp_path / "ppo", ptx_dataset=write_text(tmp_path), ptx_length=8))
    rows = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text().splitlines()]
    assert [row["episodes"] for row in rows] == [8, 16, 24]
    assert all(row["reward_gold"] == row["rewards/gold"] for row in rows)
    assert rows[0]["reward_learnt"] == pytest.approx((rows[0]["rewards/reward"] - 0.1) / 0.5, abs=1e-5)
    curve = [json.loads(line) for line in (folder / "curve.jsonl").read_text().splitlines()]
    assert curve[0]["ptx_loss"] > 0
    assert draw_reward_kl(folder).name == "reward_kl.svg"


def write_text(folder):
    path = folder / "text.jsonl"
    path.write_text('{"text": "red is not green and black is not white"}\n' * 9)
    return path


def test_the_readmes_example_runs(inputs, tmp_path, monkeypatch):
    readme = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
    section = readme.split("\n## PPO\n", 1)[1].split("\n## ", 1)[0]
    example = re.search(r"```python\n(.*?)```", section, re.DOTALL).group(1)
    small = "total_episodes=8, rollout_batch_size=8, per_device_train_batch_size=4, max_new_tokens=6, use_cpu=True"
    assert "total_episodes=20_000" in example
    monkeypatch.chdir(tmp_path)
    shutil.copytree(inputs, tmp_path / "runs" / "mine")
    names = {"rows": make_rows(8)}
    exec(example.replace("total_episodes=20_000", small + ", report_to='none'"), names)
    row = names["trainer"].records.rollouts[0]
    assert {"rewards/reward", "rewards/short", "rewards/gold", "reward_gold", "reward_learnt"} <= set(row)
    assert (tmp_path / "runs" / "mine" / "ppo" / "rollouts.jsonl").is_file()


def test_missing_inputs_are_named(inputs, tmp_path):
    arguments = make_arguments(inputs, tmp_path / "ppo")
    with pytest.raises(ValueError, match="'reward_model' is missing: name the folder"):
        stage.run(dataclasses.replace(arguments, reward_model="", max_steps=-1))
    with pytest.raises(OSError, match="no such model folder"):
        stage.run(dataclasses.replace(arguments, reward_model=str(tmp_path / "none"), max_steps=-1))
    with pytest.raises(ValueError, match="unknown setting 'kl_coeff'; did you mean 'kl_coef'"):
        parse_arguments(stage.Arguments, ["--output_dir", str(tmp_path), "--kl_coeff", "0.1"])
