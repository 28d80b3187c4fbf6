"""A tiny model with its tokenizer, as a stage would save it."""

import pytest
import torch

TEXTS = [
    "The module os.path joins paths. What does it do? It joins paths: héllo wörld, 日本語, 🙂.",
    "user assistant system question answer import return function class module",
] * 20


def save_tiny_model(folder, context_length=64, **metrics):
    """A random ScratchGPT of two layers in `folder`, and `metrics.json` if its entries are given."""
    from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM, ScratchGPTTokenizer
    from hf_scratch_gpt.runs import write_json

    torch.manual_seed(0)
    tokenizer = ScratchGPTTokenizer.train(TEXTS, 320)
    config = ScratchGPTConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=context_length,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    ScratchGPTForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if metrics:
        write_json(folder / "metrics.json", {"run_id": folder.name, **metrics})
    return folder


@pytest.fixture(scope="session")
def make_tiny_model():
    """`save_tiny_model`, for a test that needs another one."""
    return save_tiny_model


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory):
    """Folder of a tiny random model with a context of 64 tokens."""
    return save_tiny_model(tmp_path_factory.mktemp("chat") / "model")


@pytest.fixture(scope="session")
def tiny_chat_model(tiny_model_folder):
    """That model, loaded to answer."""
    from hf_scratch_gpt.chat.answering import load_chat_model

    return load_chat_model(str(tiny_model_folder))
