"""A tiny base model with its tokenizer, and rows that it can learn in a few steps."""

import hashlib
import json

import torch

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer

WORDS = ["red", "green", "blue", "black", "white"]


def make_base(folder, context=96, seed=0):
    texts = [f"Which word follows {word}? It is {word}. user assistant system" for word in WORDS]
    tokenizer = ScratchGPTTokenizer.train(texts * 3, vocab_size=300)
    torch.manual_seed(seed)
    config = ScratchGPTConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=context,
        pad_token_id=tokenizer.pad_token_id,
    )
    ScratchGPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_rows(count=40):
    rows = []
    for number in range(count):
        word = WORDS[number % len(WORDS)]
        question = f"Which word follows {word}?" + " Please." * (number % 4)
        answer = f"It is {WORDS[(number + 1) % len(WORDS)]}."
        rows.append(
            {
                "prompt": [{"role": "user", "content": question}],
                "completion": [{"role": "assistant", "content": answer}],
            }
        )
    return rows


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def digest(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
