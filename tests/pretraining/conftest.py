import json
import random
from pathlib import Path

import pytest
from pretraining_tiny import TINY_MODEL

SENTENCE = "the list of names and a function that returns each value in the file when it is given by the caller"
WORDS = SENTENCE.split()


def _documents(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randint(5, 80))) + "." for _ in range(count)]


def _prepare(folder: Path, mask_token: bool) -> Path:
    """What `scratch-gpt prepare` writes, for a corpus of a few words."""
    from hf_scratch_gpt.data.manifest import write_manifest
    from hf_scratch_gpt.data.shards import (
        ShardWriter,
        encode_documents,
        separator_id,
        token_dtype,
        tokenizer_fingerprint,
    )
    from hf_scratch_gpt.model import ScratchGPTTokenizer

    train, heldout = _documents(200, 0), _documents(10, 1)
    tokenizer = ScratchGPTTokenizer.train(train, 300, mask_token)
    saved = tokenizer.save_pretrained(folder)
    dtype = token_dtype(len(tokenizer))
    splits = {}
    for split, texts in (("train", train), ("heldout", heldout)):
        writer = ShardWriter(folder / split, dtype, separator_id(tokenizer), shard_tokens=5000)
        for text, ids in zip(texts, encode_documents(tokenizer, texts), strict=True):
            writer.add(ids, len(text.encode()))
        splits[split] = writer.close()
    lines = [json.dumps({"id": str(number), "source": "words", "text": text}) for number, text in enumerate(heldout)]
    (folder / "heldout.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    manifest = {
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": len(tokenizer),
        "separator_id": separator_id(tokenizer),
        "dtype": dtype.name,
        "splits": splits,
        "cleaning": {"filters": ["empty", "exact_duplicates"]},
    }
    write_manifest(folder, manifest, ["heldout.jsonl", *(Path(name).name for name in saved)])
    return folder


@pytest.fixture(scope="session")
def prepared_folder(tmp_path_factory) -> Path:
    """A prepared folder of a few words."""
    return _prepare(tmp_path_factory.mktemp("data") / "prepared", mask_token=False)


@pytest.fixture(scope="session")
def masked_folder(tmp_path_factory) -> Path:
    """The same with a mask token in its tokenizer."""
    return _prepare(tmp_path_factory.mktemp("data") / "masked", mask_token=True)


@pytest.fixture
def make_arguments(prepared_folder, tmp_path):
    """Settings of a run of a few seconds; keywords change them."""
    from hf_scratch_gpt.pretraining.pretrain import Arguments

    def make(**changes):
        settings = {
            "output_dir": str(tmp_path / "pretrain"),
            "dataset_dir": str(prepared_folder),
            "model_overrides": TINY_MODEL,
            "context_length": 32,
            "batch_size": 4,
            "max_steps": 6,
            "warmup_steps": 2,
            "logging_steps": 2,
            "precision": "fp32",
            "compile": "false",
            "evaluation_bytes": 1000,
        }
        return Arguments(**{**settings, **changes})

    return make
