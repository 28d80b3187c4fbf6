"""Shards give back what was written, whatever the shard size; damage is found and named; text makes no separator."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.data.manifest import read_manifest, write_manifest
from hf_scratch_gpt.data.shards import (
    ShardWriter,
    TokenShards,
    encode_documents,
    separator_id,
    token_dtype,
)
from hf_scratch_gpt.model import ScratchGPTTokenizer

documents_strategy = st.lists(st.lists(st.integers(1, 300), max_size=30), min_size=1, max_size=10)


def write(folder, documents, shard_tokens=7, vocab_size=301):
    dtype = token_dtype(vocab_size)
    writer = ShardWriter(folder / "train", dtype, 0, shard_tokens)
    for ids in documents:
        writer.add(np.array(ids, dtype), len(ids))
    manifest = {"dtype": dtype.name, "separator_id": 0, "splits": {"train": writer.close()}}
    write_manifest(folder, manifest, [])
    return folder


@pytest.fixture(scope="module")
def tokenizer():
    return ScratchGPTTokenizer.train(["a text about nothing much, " * 20], 280)


@settings(deadline=None, max_examples=40)
@given(documents=documents_strategy, shard_tokens=st.integers(1, 40), data=st.data())
def test_any_range_reads_back_across_shards(tmp_path_factory, documents, shard_tokens, data):
    expected = [token for ids in documents for token in (*ids, 0)]
    shards = TokenShards(write(tmp_path_factory.mktemp("shards"), documents, shard_tokens))
    assert len(shards) == len(expected)
    start = data.draw(st.integers(0, len(expected)))
    length = data.draw(st.integers(0, len(expected) - start))
    assert shards.read(start, length).tolist() == expected[start : start + length]


@settings(deadline=None, max_examples=20)
@given(documents=documents_strategy, shard_tokens=st.integers(1, 40))
def test_the_index_says_where_each_document_begins(tmp_path_factory, documents, shard_tokens):
    shards = TokenShards(write(tmp_path_factory.mktemp("shards"), documents, shard_tokens))
    lengths = [len(ids) + 1 for ids in documents]
    assert shards.document_starts().tolist() == [sum(lengths[:number]) for number in range(len(lengths))]


def test_shards_have_the_asked_size_and_the_manifest_adds_up(tmp_path):
    folder = write(tmp_path, [[1] * 10, [2] * 5], shard_tokens=6)
    entry = read_manifest(folder)["splits"]["train"]
    assert [shard["tokens"] for shard in entry["shards"]] == [6, 6, 5]
    assert (entry["tokens"], entry["documents"], entry["bytes"]) == (17, 2, 15)
    assert (folder / "train" / "shard-00000.bin").stat().st_size == 12


def test_large_vocabularies_take_four_bytes(tmp_path):
    assert token_dtype(2**16).itemsize == 2
    shards = TokenShards(write(tmp_path, [[70_000, 5]], vocab_size=2**16 + 1))
    assert shards.read(0, 3).tolist() == [70_000, 5, 0]


def test_a_read_beyond_the_end_is_refused(tmp_path):
    shards = TokenShards(write(tmp_path, [[1, 2]]))
    for start, length in ((0, 4), (-1, 2), (3, 1)):
        with pytest.raises(IndexError):
            shards.read(start, length)


def test_a_flipped_bit_names_its_shard(tmp_path):
    folder = write(tmp_path, [[1] * 20])
    path = folder / "train" / "shard-00001.bin"
    content = bytearray(path.read_bytes())
    content[3] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00001\.bin: content does not match its checksum"):
        TokenShards(folder)
    assert len(TokenShards(folder, verify=False)) == 21


def test_a_cut_shard_names_itself_even_unverified(tmp_path):
    folder = write(tmp_path, [[1] * 20])
    path = folder / "train" / "shard-00002.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"shard-00002\.bin: 13 bytes, expected 14"):
        TokenShards(folder, verify=False)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"shard-00002\.bin: this token shard is missing"):
        TokenShards(folder)


def test_a_folder_without_manifest_is_no_prepared_one(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the stage 'prepare' first"):
        TokenShards(tmp_path)
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="no 'splits'"):
        TokenShards(tmp_path)
    with pytest.raises(ValueError, match="no split 'test'; it has train"):
        TokenShards(write(tmp_path, [[1]]), "test")


def test_a_document_with_a_separator_inside_is_refused(tmp_path):
    writer = ShardWriter(tmp_path / "train", token_dtype(300), 0, 10)
    with pytest.raises(ValueError, match="contain the separator"):
        writer.add(np.array([1, 0, 2], "<u2"), 3)


def test_control_tokens_in_a_text_are_text(tokenizer):
    texts = ["a<|endoftext|>b", "<|im_start|>user\nhi<|im_end|><|pad|>", "<tool_call>{}</tool_call>", "", "plain é 😀"]
    control = set(tokenizer.get_added_vocab().values())
    assert len(control) == 6
    encoded = list(encode_documents(tokenizer, texts))
    assert [tokenizer.decode(ids.tolist()) for ids in encoded] == texts
    assert all(control.isdisjoint(ids.tolist()) for ids in encoded)


def test_the_separator_is_the_document_end(tokenizer):
    assert tokenizer.convert_ids_to_tokens(separator_id(tokenizer)) == "<|endoftext|>"


def test_a_foreign_tokenizer_separates_with_its_end_token():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0, "</s>": 1}, []))
    with pytest.raises(ValueError, match="neither"):
        separator_id(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert separator_id(PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")) == 1
