"""A tiny chat model with a reward model, and task questions about colours; recipes are given as dictionaries."""

import json

import torch
from transformers import set_seed

from hf_scratch_gpt.finetuning.scoring import pad_rows
from hf_scratch_gpt.finetuning.tokenise import conversation_encoder
from hf_scratch_gpt.model import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTTokenizer,
)
from hf_scratch_gpt.runs import parse_arguments

COLOURS = ["red", "green", "blue", "black", "white"]


def make_rows(count):
    return [
        {
            "id": str(number),
            "family": "colour",
            "prompt": [
                {"role": "user", "content": f"Which is {COLOURS[number % 5]}{' now' * (number % 3)}, {number}?"}
            ],
            "completion": [{"role": "assistant", "content": COLOURS[number % 5]}],
            "answer": COLOURS[number % 5],
        }
        for number in range(count)
    ]


def make_pairs(count):
    return [
        {
            "prompt": row["prompt"],
            "chosen": row["completion"],
            "rejected": [{"role": "assistant", "content": COLOURS[(number + 1) % 5]}],
        }
        for number, row in enumerate(make_rows(count))
    ]


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def make_inputs(folder):
    """`sft` and `reward` (two models of one tokenizer), and `prepare/tasks`, as the quickstart's road has them."""
    texts = ["Which is red green blue black white now? user assistant, 0 1 2 3 4 5 6 7 8 9"] * 9
    tokenizer = ScratchGPTTokenizer.train(texts, vocab_size=300)
    set_seed(0)
    config = ScratchGPTConfig(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=96, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = ScratchGPTForCausalLM(config)
    learn_colours(model, tokenizer)
    model.save_pretrained(folder / "sft")
    config.update({"num_labels": 1, "reward_mean": 0.1, "reward_std": 0.5})
    ScratchGPTForSequenceClassification(config).save_pretrained(folder / "reward")
    for name in ("sft", "reward"):
        tokenizer.save_pretrained(folder / name)
    tasks = folder / "prepare" / "tasks"
    write_lines(tasks / "train.jsonl", make_rows(30))
    write_lines(tasks / "heldout.jsonl", make_rows(36)[30:])
    write_lines(tasks / "preferences_train.jsonl", make_pairs(40))
    write_lines(tasks / "preferences_heldout.jsonl", make_pairs(48)[40:])
    return folder


def learn_colours(model, tokenizer, steps=40):
    """Tune until answers are mostly colours that end, and often wrong ones."""
    encode = conversation_encoder(tokenizer)
    rows = [encode(row) for row in make_rows(30)]
    wrong = [
        encode({**row, "completion": make_rows(31)[number + 1]["completion"]})
        for number, row in enumerate(make_rows(30))
    ]
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ids = pad_rows([row["input_ids"] for row in rows + wrong], tokenizer.pad_token_id)
    labels = pad_rows([row["labels"] for row in rows + wrong], -100)
    for _ in range(steps):
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


def arguments_of(module, **settings):
    """The settings of a stage, as a recipe gives them."""
    flags = []
    for name, value in settings.items():
        flags += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return parse_arguments(module.Arguments, flags)


# What the tests name as `relatives_tiny:...`.


def likes_blue(prompts, completions, **columns):
    """1 for an answer that begins with blue."""
    return [float(completion[-1]["content"].startswith("blue")) for completion in completions]


def prefers_blue(prompts, firsts, seconds):
    """A judge with the same taste."""
    return [
        0.5 + (first.startswith("blue") - second.startswith("blue")) / 2
        for first, second in zip(firsts, seconds, strict=True)
    ]


def raises(prompts, completions, **columns):
    raise KeyError("no such thing")


def too_few(prompts, completions, **columns):
    return [0.0]


def not_a_number(prompts, completions, **columns):
    return [float("nan")] * len(prompts)


def no_number(prompts, completions, **columns):
    return ["good"] * len(prompts)
