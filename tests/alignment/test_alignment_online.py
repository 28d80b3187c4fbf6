"""GRPO and RLOO on TRL's trainers: what is sampled, what is rewarded, and that a killed run ends as a whole one."""

import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relatives_tiny import arguments_of, likes_blue, make_inputs, make_rows, read_lines, write_lines
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_scratch_gpt.alignment import grpo, online, rloo
from hf_scratch_gpt.evaluation.generation import suppressed_token_ids
from hf_scratch_gpt.finetuning.models import load_model
from hf_scratch_gpt.model import encode_conversation
from hf_scratch_gpt.runs import read_metrics

TRAINERS = {"grpo": (grpo, grpo.OnlineGRPOTrainer), "rloo": (rloo, rloo.OnlineRLOOTrainer)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def align(inputs, output, method="grpo", **changed):
    module, _ = TRAINERS[method]
    chosen = {
        "model_name_or_path": inputs / "sft",
        "dataset": inputs / "prepare",
        "output_dir": output,
        "reward_function": "relatives_tiny:likes_blue",
        "max_completion_length": 6,
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_steps": 6,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "bf16": False,
        "beta": 0.05,
        **changed,
    }
    return module.run(arguments_of(module, **{name: value for name, value in chosen.items() if value != ""}))


# ---- Order


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=4, max_size=40), st.integers(1, 4), st.integers(2, 3), st.integers(1, 3))
def test_batches_of_samples_hold_whole_groups_and_come_once_for_every_pass(lengths, prompts, group, passes):
    sampler = online.GroupSampler(lengths, prompts, group, passes, seed=7)
    order, size = list(sampler), prompts * group
    assert len(order) == len(sampler) == len(lengths) // prompts * size * passes
    blocks = [order[start : start + size] for start in range(0, len(order), size)]
    used = []
    for number in range(0, len(blocks), passes):
        assert all(block == blocks[number] for block in blocks[number : number + passes])
        firsts = blocks[number][::group]
        assert blocks[number] == [index for index in firsts for _ in range(group)]
        used += firsts
    assert len(used) == len(set(used))
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert list(sampler) == order
    assert len(second) == len(order)


def test_prompts_of_like_length_are_sampled_together():
    lengths = [number % 10 + 1 for number in range(200)]
    order = list(online.GroupSampler(lengths, 10, 2, 1, seed=0))
    spreads = [
        max(lengths[index] for index in order[at : at + 20]) - min(lengths[index] for index in order[at : at + 20])
        for at in range(0, len(order), 20)
    ]
    assert sum(spreads) / len(spreads) <= 1  # 7 to 9 in a random order


def test_too_few_prompts_for_one_batch_are_told():
    with pytest.raises(ValueError, match="3 prompts do not fill one batch of samples, which has 4 prompts of 2"):
        online.GroupSampler([1, 1, 1], 4, 2, 1, seed=0)


# ---- What is read and sampled


@pytest.mark.parametrize("trainer", [trainer for _, trainer in TRAINERS.values()])
def test_control_tokens_in_a_prompt_stay_text(inputs, trainer):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "sft")
    prompt = [{"role": "user", "content": "say <|im_end|> and <|pad|>"}]
    ids, images, rest = trainer._tokenize_prompts(SimpleNamespace(processing_class=tokenizer), [prompt])
    assert (images, rest) == (None, {})
    assert ids == [encode_conversation(tokenizer, prompt, add_generation_prompt=True)["input_ids"]]
    assert ids[0].count(tokenizer.eos_token_id) == 1
    assert tokenizer.pad_token_id not in ids[0]


def test_a_reward_gets_the_text_and_whether_it_ended_and_the_columns(inputs):
    tokenizer = AutoTokenizer.from_pretrained(inputs / "sft")
    seen = []

    class Spy:
        name = "spy"

        def score(self, rows, texts, ended):
            seen.append((rows, texts, ended))
            return [1.0] * len(rows)

    blue = tokenizer("blue")["input_ids"]
    reward = online.as_reward_function(Spy(), tokenizer, frozenset({tokenizer.eos_token_id}))
    assert reward.__name__ == "spy"
    completions = [[*blue, tokenizer.eos_token_id], blue]
    columns = {"answer": ["blue", "red"], "completions": ["", ""], "trainer_state": None, "log_metric": None}
    assert reward(prompts=["p", "q"], completion_ids=completions, log_extra=None, **columns) == [1.0, 1.0]
    rows = [{"prompt": "p", "answer": "blue"}, {"prompt": "q", "answer": "red"}]
    assert seen == [(rows, ["blue", "blue"], [True, False])]


@pytest.mark.parametrize("method", TRAINERS)
def test_no_special_token_but_an_end_token_is_ever_sampled(inputs, tmp_path, monkeypatch, method):
    """The planted fault: every token that must not come is made by far the likeliest."""
    tokenizer = AutoTokenizer.from_pretrained(inputs / "sft")
    model = load_model(AutoModelForCausalLM, str(inputs / "sft"), tokenizer)
    suppressed = suppressed_token_ids(model, tokenizer)
    assert len(suppressed) > model.config.vocab_size - len(tokenizer)
    forward = type(model).forward

    @functools.wraps(forward)  # whose arguments `generate` looks at
    def tempted(self, *args, **kwargs):
        output = forward(self, *args, **kwargs)
        if not kwargs.get("fused_lm_head"):
            output.logits[..., suppressed] += 50.0
        return output

    sampled = []
    plain = online.as_reward_function

    def spying(scorer, *rest):
        function = plain(scorer, *rest)

        def reward(prompts, completion_ids, **columns):
            sampled.extend(completion_ids)
            return function(prompts, completion_ids, **columns)

        reward.__name__ = function.__name__
        return reward

    monkeypatch.setattr(type(model), "forward", tempted)
    monkeypatch.setattr(online, "as_reward_function", spying)
    align(inputs, tmp_path / "run", method, max_steps=1, eval_prompts=0)
    assert len(sampled) >= 16
    assert {token for ids in sampled for token in ids}.isdisjoint(suppressed)


# ---- Whole runs


@pytest.fixture(scope="module", params=TRAINERS)
def trained(request, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / request.param
    options = {"reward_model": inputs / "reward", "reward_function_weight": 4.0, "max_steps": 40}
    options |= {"per_device_train_batch_size": 32, "num_generations": 8, "steps_per_generation": 1}
    options |= {"lr_scheduler_type": "constant", "learning_rate": 1.5e-2}
    return align(inputs, folder, request.param, **options)


def test_the_rewarded_answer_becomes_likelier(trained, inputs):
    metrics = read_metrics(trained)["metrics"]
    assert metrics["reward_end"] > metrics["reward_start"] + 0.5
    assert metrics["rewards_reward_function_end"] > metrics["rewards_reward_function_start"] + 0.15
    assert metrics["episodes"] == 40 // 2 * 32
    assert 0 <= metrics["share_ended_start"] <= 1
    answers = read_lines(trained / "heldout_answers.jsonl")
    assert metrics["heldout_prompts"] == len(answers) == 6
    completions = [[{"content": answer["completion"]}] for answer in answers]
    assert metrics["heldout_reward_function"] == pytest.approx(sum(likes_blue(None, completions)) / 6)
    gold = [float(answer["gold"]) for answer in answers]
    assert metrics["heldout_gold"] == pytest.approx(sum(gold) / 6)
    assert metrics["heldout_kl"] > 0
    low, high = metrics["heldout_gold_gain_interval"]
    assert low <= metrics["heldout_gold_gain"] <= high
    gain = metrics["heldout_gold"] - metrics["heldout_gold_start"]
    assert metrics["heldout_gold_gain"] == pytest.approx(gain, abs=1e-9)


def test_the_output_is_a_plain_model_that_chats(trained, inputs):
    before, after = (load_file(folder / "model.safetensors") for folder in (inputs / "sft", trained))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "_proj" in name}
    tokenizer, model = AutoTokenizer.from_pretrained(trained), AutoModelForCausalLM.from_pretrained(trained)
    ids = encode_conversation(tokenizer, make_rows(1)[0]["prompt"], add_generation_prompt=True)["input_ids"]
    assert tokenizer.eos_token_id in model.generation_config.eos_token_id
    assert model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False).shape[1] > len(ids)
    assert (trained / "adapter").is_dir()
    assert not (trained / "checkpoints").exists()


@pytest.mark.parametrize(("method", "peft"), [("grpo", "lora"), ("rloo", "none")])
def test_a_run_that_broke_amid_its_samples_in_its_second_epoch_resumes_to_the_very_same_weights(
    inputs, tmp_path, monkeypatch, method, peft
):
    """8 prompts fill two batches of samples, of 4 steps each: step 9 begins the second epoch, 11 is amid samples."""
    path = write_lines(tmp_path / "prompts.jsonl", make_rows(9))
    options = {"dataset": path, "eval_prompts": 0, "peft": peft, "max_steps": 14, "save_steps": 11}
    options |= {"learning_rate": 1e-3 if peft == "none" else 1e-2}
    whole = align(inputs, tmp_path / "whole", method, **options)
    _, trainer = TRAINERS[method]
    step = trainer.training_step

    def break_at_12(self, *args, **kwargs):
        if self.state.global_step == 12:
            raise RuntimeError("planted")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "training_step", break_at_12)
        with pytest.raises(RuntimeError, match="planted"):
            align(inputs, tmp_path / "broken", method, **options)
    kept = tmp_path / "broken" / "checkpoints" / "checkpoint-11"
    assert (kept / online.SAMPLES_FILE.format(0)).is_file()
    resumed = align(inputs, tmp_path / "broken", method, **options)
    expected, found = (load_file(folder / "model.safetensors") for folder in (whole, resumed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    start = load_file(inputs / "sft" / "model.safetensors")
    assert not all(torch.equal(start[name], found[name]) for name in start)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"reward_function": ""}, "nothing scores the answers"),
        ({"reward_function": "relatives_tiny:not_a_number"}, "returned nan for answer 0"),
        ({"reward_weights": 1.0}, "'reward_weights' is set by 'checker_weight'"),
        ({"generation_batch_size": 400, "steps_per_generation": ""}, "30 prompts do not fill one batch"),
        ({"max_completion_length": 90}, "all 30 rows are too long"),
    ],
)
def test_what_cannot_be_trained_is_told(inputs, tmp_path, changed, told):
    with pytest.raises(ValueError, match=told):
        align(inputs, tmp_path / "run", **changed)
