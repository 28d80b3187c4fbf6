"""A tiny tokenizer and a tiny random Qwen3 for the evaluation tests: seconds, not minutes."""

import copy
import json

import pytest

TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"]


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """Byte-level BPE without merges: 256 bytes and four special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|endoftext|>", "<|im_start|>"],
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def make_model(tokenizer, seed=0, context_length=128):
    """A random Qwen3 with a rather peaked distribution, so that argmax ties and flat samples do not occur."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context_length,
        tie_word_embeddings=True,
        initializer_range=0.4,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config).eval()


@pytest.fixture(scope="session")
def tiny_model(tiny_tokenizer):
    return make_model(tiny_tokenizer)


@pytest.fixture(scope="session")
def other_model(tiny_tokenizer):
    return make_model(tiny_tokenizer, seed=1)


@pytest.fixture(scope="session")
def new_model(tiny_tokenizer):
    """Makes a fresh tiny model that a test may change: `new_model(seed=3)`."""
    return lambda **settings: make_model(tiny_tokenizer, **settings)


QUESTIONS = [("upper", word, word.upper()) for word in ("ab", "cd", "ef", "gh", "ij", "kl")] + [
    ("double", str(number), str(2 * number)) for number in range(6)
]


def _lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="session")
def prepared(tmp_path_factory):
    """A small folder as the stage `prepare` leaves it: held-out documents, tasks and preferences."""
    folder = tmp_path_factory.mktemp("prepare")
    rows, pairs = [], []
    for index, (family, word, answer) in enumerate(QUESTIONS):
        common = {
            "id": f"{family}-{index}",
            "family": family,
            "prompt": [{"role": "user", "content": f"{family} {word}"}],
            "answer": answer,
        }
        rows.append({**common, "completion": [{"role": "assistant", "content": answer}]})
        chosen, rejected = [[{"role": "assistant", "content": text}] for text in (answer, "no")]
        pairs.append({**common, "chosen": chosen, "rejected": rejected})
    _lines(folder / "heldout.jsonl", [{"text": f"document {n}\n" * 6, "source": "x", "id": str(n)} for n in range(5)])
    for split in ("train", "heldout"):
        _lines(folder / "tasks" / f"{split}.jsonl", rows)
        _lines(folder / "tasks" / f"preferences_{split}.jsonl", pairs)
    return folder


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory, tiny_tokenizer, tiny_model, other_model):
    """Saved models `base` and `tuned`, and a reward model."""
    import torch
    from transformers import Qwen3ForSequenceClassification

    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    config = copy.deepcopy(tiny_model.config)
    config.num_labels = 1
    reward_model = Qwen3ForSequenceClassification(config)
    for name, model in (("base", tiny_model), ("tuned", other_model), ("reward", reward_model)):
        model.save_pretrained(root / name)
        tiny_tokenizer.save_pretrained(root / name)
    return root
