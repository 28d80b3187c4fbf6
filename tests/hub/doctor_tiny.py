"""Tiny models and tokenizers on which the doctor's tests run, healthy and with a fault planted in their code."""

from functools import cache
from itertools import count
from pathlib import Path

import torch

from hf_scratch_gpt.hub.doctor.loading import load_subject
from hf_scratch_gpt.hub.doctor.main import examine
from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
from hf_scratch_gpt.model.presets import PRESETS

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 64}
TEXTS = [
    "def add(first, second):\n    return first + second\n\n",
    "The user asks and the assistant answers; the system starts, the tool ends. naïve café 你好 🙂\n",
]
_FORKS = count(1)
MODELING, CONFIGURATION = "modeling_scratch_gpt.py", "configuration_scratch_gpt.py"


@cache
def _trained() -> ScratchGPTTokenizer:
    return ScratchGPTTokenizer.train(TEXTS * 20, 320)


def make_tokenizer() -> ScratchGPTTokenizer:
    """A byte-level tokenizer of its own, free to be changed."""
    trained = _trained()
    return ScratchGPTTokenizer(
        tokenizer_object=trained.backend_tokenizer,
        **trained.special_tokens_map,
        extra_special_tokens=list(trained.extra_special_tokens),
        chat_template=trained.chat_template,
        clean_up_tokenization_spaces=False,
    )


def token_settings() -> dict:
    """The fields of a config that must agree with the tokenizer."""
    tokenizer = _trained()
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    return {"vocab_size": len(tokenizer), **ids}


def shrunk(preset: str, **overrides) -> ScratchGPTForCausalLM:
    """A preset with few layers and little width, all else as it is."""
    fields = PRESETS[preset]
    smaller = {"intermediate_size": 64, "head_dim": 8}
    if "num_key_value_heads" in fields:
        smaller["num_key_value_heads"] = 2
    if fields.get("layer_types"):
        smaller["layer_types"] = fields["layer_types"][:2]
    if fields.get("sliding_window"):
        smaller["sliding_window"] = 4
    torch.manual_seed(0)
    settings = {**token_settings(), **SMALL, **smaller, **overrides}
    return ScratchGPTForCausalLM(ScratchGPTConfig.from_preset(preset, **settings))


def foreign(name: str):
    """A tiny model of transformers' own."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    settings = {**token_settings(), **SMALL, "intermediate_size": 64, "num_key_value_heads": 2}
    if name == "llama":
        return LlamaForCausalLM(LlamaConfig(**settings))
    if name == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**settings, head_dim=8))
    return GPT2LMHeadModel(GPT2Config(**token_settings(), n_embd=32, n_layer=2, n_head=4, n_positions=64))


def write(model, folder: Path, tokenizer=None) -> Path:
    """Save a model and, if given, a tokenizer."""
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def write_with_code(folder: Path, changes: dict[str, str], tokenizer=None, **overrides) -> Path:
    """A tiny model as custom code: our files, each text of `changes` (which must be there) replaced by its value."""
    write(shrunk("modern-5m", **overrides), folder, tokenizer)
    missing = set(changes)
    # Each has a model type of its own: a class that is registered, or was loaded before, goes before a folder's code.
    changes = {'scratch_gpt"': f'scratch_gpt_{next(_FORKS)}"', **changes}
    for name in (MODELING, CONFIGURATION, "config.json"):
        text = (folder / name).read_text(encoding="utf-8")
        for old, new in changes.items():
            if old in text:
                missing.discard(old)
                text = text.replace(old, new)
        (folder / name).write_text(text, encoding="utf-8")
    assert not missing, f"the model's code no longer has {missing}: plant this fault anew"
    return folder


def outcomes_of(folder: Path, **settings) -> dict:
    """The doctor's outcomes by name of the check; the saved copy is loaded in this process unless asked otherwise."""
    settings = {"fresh_process": False, **settings}
    return {outcome.name: outcome for outcome in examine(load_subject(str(folder), **settings))}


def names(outcomes: dict, status: str) -> set[str]:
    """Names of the checks with this status."""
    return {name for name, outcome in outcomes.items() if outcome.status == status}
