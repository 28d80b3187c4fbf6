"""Best-fit packing: nothing is lost, repeated or needlessly cut, and no more windows than best fit decreasing."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.data.packing import best_fit_decreasing, plan_windows


def textbook(lengths, capacity):
    """Room left in each window of best fit decreasing as it is defined, one piece after the other."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        fitting = [window for window, room in enumerate(rooms) if room >= length]
        if fitting:
            rooms[min(fitting, key=rooms.__getitem__)] -= length
        else:
            rooms.append(capacity - length)
    return sorted(rooms)


@settings(deadline=None, max_examples=300)
@given(data=st.data(), capacity=st.integers(1, 40))
def test_windows_are_filled_exactly_as_by_the_textbook(data, capacity):
    lengths = np.array(data.draw(st.lists(st.integers(1, capacity), max_size=80)), np.int64)
    windows = best_fit_decreasing(lengths, capacity)
    rooms = capacity - np.bincount(windows, weights=lengths).astype(int)
    assert sorted(rooms.tolist()) == textbook(lengths.tolist(), capacity)


def test_a_hand_packed_example():
    # 6 opens a window and leaves 4; 5 opens another and leaves 5; 4 fills the first; 3 and 2 fill the second.
    windows = best_fit_decreasing(np.array([2, 6, 3, 5, 4]), 10)
    assert windows.tolist() == [1, 0, 1, 1, 0]


@pytest.mark.parametrize("lengths", [[0, 3], [3, 11]])
def test_a_length_that_fits_no_window_is_refused(lengths):
    with pytest.raises(ValueError, match="expected 1 to the capacity 10"):
        best_fit_decreasing(np.array(lengths), 10)


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=60),
    begin=st.integers(0, 1000),
    context_length=st.integers(1, 30),
    block=st.sampled_from([1, 7, 1000]),
)
def test_each_token_is_in_one_window_and_only_what_is_too_long_is_cut(lengths, begin, context_length, block):
    starts = begin + np.cumsum([0, *lengths[:-1]])
    plan = plan_windows(starts, begin + sum(lengths), context_length, block)
    pieces = [plan.pieces(window) for window in range(plan.windows)]
    for window, filled in zip(pieces, plan.filled.tolist(), strict=True):
        assert 0 < sum(length for _, length in window) == filled <= context_length
        assert window == sorted(window)
    tokens = [start + offset for window in pieces for start, length in window for offset in range(length)]
    assert sorted(tokens) == list(range(begin, begin + sum(lengths)))
    found = sorted(piece for window in pieces for piece in window)
    owners = np.searchsorted(starts, [start for start, _ in found], side="right") - 1
    # As few pieces of a document as there can be, none of which runs into the next document.
    assert np.bincount(owners).tolist() == [-(-length // context_length) for length in lengths]
    assert plan.documents_cut == sum(length > context_length for length in lengths)
    assert plan.tokens == sum(lengths)
    assert plan.padding_share == pytest.approx(1 - sum(lengths) / (plan.windows * context_length))


def test_blocks_are_packed_apart_and_change_the_number_of_windows_little():
    lengths = np.random.default_rng(0).integers(1, 120, 20_000)
    starts = np.cumsum(lengths) - lengths
    whole = plan_windows(starts, int(lengths.sum()), 128)
    blocks = plan_windows(starts, int(lengths.sum()), 128, block_documents=2_000)
    least = -(-int(lengths.sum()) // 128)
    assert least <= whole.windows <= 1.001 * least
    assert whole.windows <= blocks.windows <= 1.01 * least


def test_a_plan_is_a_function_of_the_lengths_alone():
    lengths = np.random.default_rng(1).integers(1, 300, 3_000)
    starts = np.cumsum(lengths) - lengths
    plans = [plan_windows(starts.copy(), int(lengths.sum()), 200) for _ in range(2)]
    for name in ("firsts", "starts", "lengths", "filled"):
        assert getattr(plans[0], name).tolist() == getattr(plans[1], name).tolist()
