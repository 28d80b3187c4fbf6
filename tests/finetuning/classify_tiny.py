"""Texts that a tiny model learns to tell apart in a few steps, and tiny models of other makes to start from."""

import json
import random

import torch
from finetuning_tiny import WORDS
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)


def make_texts(count=60):
    """(label, text): every third text is `warm` and says nothing but red, which no other one does."""
    draw, rows = random.Random(0), []
    for number in range(count):
        label = "warm" if number % 3 == 0 else "cold"
        words = [draw.choice(WORDS[:1] if label == "warm" else WORDS[1:]) for _ in range(2 + number % 5)]
        rows.append((label, f"{number} " + " ".join(words)))
    return rows


def write_texts(path, rows):
    path.write_text("".join(f"{label}\t{text}\n" for label, text in rows), encoding="utf-8")
    return str(path)


def write_recipe(folder, base, data, **settings):
    values = {
        "model_name_or_path": str(base),
        "dataset": str(data),
        "output_dir": str(folder),
        "bf16": False,
        "max_steps": 12,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "save_steps": 5,
        "logging_steps": 4,
        **settings,
    }
    recipe = folder.with_suffix(".yaml")
    recipe.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, value in values.items()))
    return str(recipe)


def word_tokenizer(special=(), **names):
    vocabulary = {word: number for number, word in enumerate([*special, "[UNK]", *WORDS, *map(str, range(90))])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if "[CLS]" in vocabulary:
        backend.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", **names)


def make_bert(folder):
    """An encoder that frames its texts by itself and tells two texts apart by `token_type_ids`."""
    tokenizer = word_tokenizer(
        ("[PAD]", "[CLS]", "[SEP]"),
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
    )
    return save(folder, BertForMaskedLM(config), tokenizer)


def make_gpt2(folder):
    """A causal model whose tokenizer has no padding token."""
    tokenizer = word_tokenizer(("<|endoftext|>",), eos_token="<|endoftext|>", bos_token="<|endoftext|>")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=1, n_head=2, n_positions=64)
    return save(folder, GPT2LMHeadModel(config), tokenizer)


def make_llama(folder):
    """A causal model whose head is not tied to its embedding."""
    tokenizer = word_tokenizer(("</s>", "[PAD]"), eos_token="</s>", pad_token="[PAD]")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    return save(folder, LlamaForCausalLM(config), tokenizer)


def save(folder, model, tokenizer):
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
