"""Batches of like length, the same in every try of a run."""

from hypothesis import given
from hypothesis import strategies as st

from hf_scratch_gpt.finetuning.trainers import LengthSampler


@given(st.lists(st.integers(1, 99), min_size=1, max_size=300), st.integers(1, 16), st.integers(0, 5))
def test_each_example_comes_exactly_once_whatever_the_batch_size(lengths, batch_size, epoch):
    sampler = LengthSampler(lengths, batch_size, seed=1)
    sampler.set_epoch(epoch)
    assert sorted(sampler) == list(range(len(lengths)))
    assert len(sampler) == len(lengths)


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    lengths = [1 + index % 37 for index in range(200)]
    first, second = LengthSampler(lengths, 8, seed=1), LengthSampler(lengths, 8, seed=1)
    second.set_epoch(1)
    other_epoch = list(second)
    second.set_epoch(0)
    assert list(first) == list(second) != other_epoch
    assert list(LengthSampler(lengths, 8, seed=2)) != list(first)


def test_batches_hold_like_lengths_and_the_longest_comes_first():
    lengths = [1 + (index * 7919) % 97 for index in range(1000)]
    order = list(LengthSampler(lengths, 10, seed=0))
    batches = [[lengths[index] for index in order[at : at + 10]] for at in range(0, 1000, 10)]
    padding = sum(max(batch) * len(batch) - sum(batch) for batch in batches)
    assert padding < 0.05 * sum(lengths)  # about 0.9 times in random batches
    assert max(lengths) in batches[0]
