"""A tiny model with its tokenizer, and preferences that it learns in a few steps: answers with "good" are chosen."""

import json

import torch

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer


def make_model(folder, seed=0):
    texts = ["user assistant This is good. That is bad. What do you say, number one?"] * 5
    tokenizer = ScratchGPTTokenizer.train(texts, vocab_size=300)
    torch.manual_seed(seed)
    config = ScratchGPTConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=96,
        pad_token_id=tokenizer.pad_token_id,
    )
    ScratchGPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_preferences(path, count=40):
    rows = []
    for number in range(count):
        end = " sir" * (number % 5)
        rows.append(
            {
                "prompt": [{"role": "user", "content": f"What do you say, number {number}?"}],
                "chosen": [{"role": "assistant", "content": f"This is good{end}."}],
                "rejected": [{"role": "assistant", "content": f"That is bad{end}."}],
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def write_recipe(folder, model, data, **settings):
    values = {
        "model_name_or_path": str(model),
        "dataset": data,
        "output_dir": str(folder),
        "bf16": False,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lora_r": 4,
        "save_steps": 5,
        "logging_steps": 4,
        "heldout_fraction": 0.25,
        **settings,
    }
    recipe = folder.with_suffix(".yaml")
    recipe.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    return str(recipe)
