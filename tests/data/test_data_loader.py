"""A batch is a pure function of seed, step and rank; an epoch shows each window once; documents are kept apart."""

import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from hf_scratch_gpt.data.loader import batch_windows, document_positions, shuffled_index, windows_per_epoch


class ArrayShards:
    """`TokenShards` over an array: the loader needs no more."""

    folder, split, separator_id = "memory", "train", 0

    def __init__(self, tokens):
        self.tokens = np.asarray(tokens, np.uint16)

    def __len__(self):
        return len(self.tokens)

    def read(self, start, length):
        assert 0 <= start <= start + length <= len(self.tokens)
        return self.tokens[start : start + length]


COUNTING = ArrayShards(np.arange(1, 1001))  # no separator: a window's first token tells its start


def starts(step, batch_size=4, seed=0, context_length=10, **settings):
    batch = batch_windows(COUNTING, context_length, batch_size, seed, step, **settings)
    assert (batch["input_ids"].diff(dim=1) == 1).all()
    return (batch["input_ids"][:, 0] - 1).tolist()


@given(count=st.integers(1, 3000), seed=st.integers(0, 2**40), epoch=st.integers(0, 100))
def test_the_shuffle_is_a_permutation(count, seed, epoch):
    assert sorted(shuffled_index(np.arange(count), count, seed, epoch).tolist()) == list(range(count))


def test_the_shuffle_leaves_no_order_behind():
    order = shuffled_index(np.arange(50_000), 50_000, 7, 0)
    other = shuffled_index(np.arange(50_000), 50_000, 7, 1)
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, other)[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(50_000))[0, 1]) < 0.02
    halves = (order[:25_000] < 25_000).mean()
    assert abs(halves - 0.5) < 0.02


def test_the_shuffle_of_billions_needs_no_table():
    began = time.process_time()
    index = shuffled_index(np.array([0, 5 * 10**9 - 1]), 5 * 10**9, 1, 2)
    assert time.process_time() - began < 0.5
    assert len(set(index.tolist())) == 2


def test_an_epoch_shows_each_window_once_and_the_next_one_differs():
    count = windows_per_epoch(COUNTING, 10)
    assert count == 99
    epochs = [[start for step in range(11) for start in starts(step + 11 * epoch, 9)] for epoch in range(2)]
    for epoch in epochs:
        offset = min(epoch)
        assert sorted(epoch) == [offset + 10 * number for number in range(count)]
    assert epochs[0] != epochs[1]


def test_a_batch_depends_on_seed_step_and_rank_alone():
    again = starts(17, seed=5)
    starts(3, seed=6)
    assert starts(17, seed=5) == again
    assert starts(17, seed=6) != again
    assert starts(18, seed=5) != again


@pytest.mark.parametrize("step", [0, 11, 12])  # 24 windows a step of 99: step 4 runs over an epoch's end, 12 is beyond
def test_ranks_share_what_one_process_would_take(step):
    together = starts(step, 24)
    apart = [start for rank in range(3) for start in starts(step, 8, rank=rank, world_size=3)]
    assert apart == together


def test_a_batch_may_run_over_the_end_of_an_epoch():
    joined = [start for step in range(0, 9) for start in starts(step, 22)]  # 198 windows: two epochs
    assert len(set(joined[:99])) == len(set(joined[99:])) == 99


def test_positions_restart_on_each_separator():
    ids = np.array([[5, 6, 0, 7, 8, 0, 0, 9], [0, 1, 2, 3, 4, 5, 6, 0]])
    assert document_positions(ids, 0).tolist() == [[0, 1, 0, 1, 2, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6, 0]]


def test_positions_count_on_if_documents_are_not_respected():
    shards = ArrayShards([5, 6, 0, 7, 8, 0] * 20)
    batch = batch_windows(shards, 8, 2, 0, 0, respect_documents=False)
    assert batch["position_ids"].tolist() == [list(range(8))] * 2
    kept_apart = batch_windows(shards, 8, 2, 0, 0)
    assert torch.equal(batch["input_ids"], kept_apart["input_ids"])
    assert (kept_apart["position_ids"] <= 3).all()


def test_shapes_and_types_are_what_a_model_takes():
    batch = batch_windows(COUNTING, 10, 4, 0, 0)
    for name in ("input_ids", "position_ids"):
        assert batch[name].shape == (4, 10)
        assert batch[name].dtype == torch.int64


def test_a_packed_document_scores_as_it_would_alone():
    """Two ways of computing one thing: a window of two documents, and each by itself after a separator."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=16,
        use_cache=False,
    )
    model = Qwen3ForCausalLM(config).eval()
    first, second = [0, 3, 4, 5], [0, 7, 8, 9, 10]
    shards = ArrayShards(first + second)
    batch = batch_windows(shards, 9, 1, 0, 0)
    with torch.no_grad():
        packed = model(**batch).logits[0]
        alone = torch.cat([model(torch.tensor([ids])).logits[0] for ids in (first, second)])
    torch.testing.assert_close(packed, alone, atol=1e-5, rtol=0)


def test_too_little_text_says_what_to_do():
    with pytest.raises(ValueError, match="the train part has 1000 tokens, too few for windows of 1001"):
        batch_windows(COUNTING, 1001, 1, 0, 0)
    assert windows_per_epoch(COUNTING, 1000) == windows_per_epoch(COUNTING, 600) == 1
    assert starts(0, 1, context_length=1000) == [0]
    assert all(0 <= start <= 400 for step in range(20) for start in starts(step, 3, context_length=600))
