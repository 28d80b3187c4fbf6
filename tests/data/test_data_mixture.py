"""Each source has its share of the tokens that a run reads, whatever its size; a batch stays a pure function."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.data.loader import MixtureWindows, data_usage, make_mixture
from hf_scratch_gpt.data.mixture import Turns, describe_shares, parse_mixture

SIZES = {"good": 1_003, "web": 50_000, "tiny": 200}
SHARES = {"good": 0.3, "web": 0.695, "tiny": 0.005}


class SourceShards:
    """`TokenShards` in which a token's value is the number of its source, counted from 1."""

    folder, split, separator_id = "memory", "train", 0

    def __init__(self, sizes=SIZES, mixture=None):
        self.tokens = np.repeat(np.arange(1, len(sizes) + 1), list(sizes.values())).astype(np.uint16)
        starts = np.cumsum([0, *sizes.values()]).tolist()
        self.sources = [
            {"source": name, "start": start, "tokens": size}
            for (name, size), start in zip(sizes.items(), starts, strict=False)
        ]
        self.manifest = {"sources": list(sizes), "mixture": mixture}

    def __len__(self):
        return len(self.tokens)

    def read(self, start, length):
        assert 0 <= start <= start + length <= len(self.tokens)
        return self.tokens[start : start + length]


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(0, 3000))
def test_any_prefix_has_its_shares_and_each_source_counts_on(weights, total):
    shares = [weight / sum(weights) for weight in weights]
    turns = Turns(tuple(shares))
    sources, numbers = turns.locate(np.arange(total))
    assert turns.counts(total) == np.bincount(sources, minlength=len(weights)).tolist()
    for source, share in enumerate(shares):
        assert numbers[sources == source].tolist() == list(range((sources == source).sum()))
        assert abs((sources == source).sum() - total * share) < len(weights)


def test_a_share_is_kept_beyond_billions_of_windows():
    turns, far = Turns((0.3, 0.7)), 10**11
    assert abs(Fraction(turns.counts(far)[0], far) - Fraction(3, 10)) < 1e-7
    _, numbers = turns.locate(np.array([far - 1]))
    assert 0 <= numbers[0] < far


def test_the_tokens_that_a_run_reads_are_mixed_as_asked():
    windows = MixtureWindows(SourceShards(), 16, SHARES)
    read = np.zeros(4, int)
    for step in range(400):
        read += np.bincount(windows.batch(16, seed=1, step=step)["input_ids"].flatten().numpy(), minlength=4)
    assert read.sum() == 400 * 16 * 16
    usage = windows.usage(400 * 16)
    for number, entry in enumerate(usage, start=1):
        name = entry["source"]
        assert entry["tokens"] == read[number]
        assert read[number] / read.sum() == pytest.approx(SHARES[name], rel=0.005)
        assert entry["share"] == read[number] / read.sum()
        assert entry["epochs"] == pytest.approx(read[number] / SIZES[name])
    assert usage[0]["epochs"] > 25 > 1.5 > usage[1]["epochs"]


def test_each_source_shows_each_of_its_windows_once_an_epoch():
    windows = MixtureWindows(SourceShards(), 10, {"good": 0.5, "web": 0.25, "tiny": 0.25})
    starts = windows.starts(np.arange(600), seed=3)
    good = starts[starts < 1003]
    assert len(good) == 300
    per_epoch = 99  # windows of 10 at every offset
    for epoch in range(3):
        mine = sorted(good[epoch * per_epoch : (epoch + 1) * per_epoch].tolist())
        assert [start - mine[0] for start in mine] == list(range(0, 990, 10))
    assert good[:99].tolist() != good[99:198].tolist()


@pytest.mark.parametrize("step", [0, 7, 1000])
def test_ranks_share_what_one_process_would_take(step):
    windows = MixtureWindows(SourceShards(), 16, SHARES)
    together = windows.batch(24, 5, step)["input_ids"]
    for world_size in (2, 3, 4):
        rows = 24 // world_size
        apart = [windows.batch(rows, 5, step, rank, world_size)["input_ids"] for rank in range(world_size)]
        assert np.concatenate(apart).tolist() == together.tolist()


def test_weights_come_from_the_recipe_or_else_from_the_manifest():
    shards = SourceShards(mixture=SHARES)
    assert [entry["weight"] for entry in make_mixture(shards, 16, None).usage(1)] == pytest.approx([0.3, 0.695, 0.005])
    given = make_mixture(shards, 16, "good=1,web=2,tiny=1").usage(4)
    assert [entry["tokens"] for entry in given] == [16, 32, 16]
    assert make_mixture(SourceShards(), 16, None) is None
    assert data_usage(shards, None, 100, 16) == {"epochs": 1600 / 51_203}


def test_weights_are_read_in_every_form():
    expected = {"a/b=c": 0.25, "d": 0.75}
    for form in ({"a/b=c": 1, "d": 3}, "a/b=c=1,d=3", ["a/b=c=1", "d=3"], '{"a/b=c": 1, "d": 3.0}'):
        assert parse_mixture(form, ["a/b=c", "d"]) == expected
    assert parse_mixture(None, ["a"]) is None


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({"a": 1}, "'b' has no weight"),
        ({"a": 1, "b": 1, "c": 1}, "'c' is none of the sources a, b"),
        ({"a": 1, "b": 0}, "the weight of 'b' is 0, expected a number above 0"),
        ({"a": True, "b": 1}, "the weight of 'a' is True"),
        ("a", "'a' is not of the form source=weight"),
    ],
)
def test_wrong_weights_are_named(weights, message):
    with pytest.raises(ValueError, match=message):
        parse_mixture(weights, ["a", "b"])


def test_a_source_shorter_than_a_window_is_named():
    with pytest.raises(
        ValueError, match="the source tiny has 200 tokens in the train part, too few for windows of 201"
    ):
        MixtureWindows(SourceShards(), 201, SHARES)


def test_a_pass_sees_a_source_as_often_as_its_weight_says():
    """90 and 10 tokens: half a pass of 100 is 50 of each, which is 5/9 and 5 times."""
    tokens = {"large": 90, "small": 10}
    described = describe_shares(tokens, {"large": 0.5, "small": 0.5})
    assert [entry["token_share"] for entry in described] == [0.9, 0.1]
    assert [entry["epochs_of_a_pass"] for entry in described] == pytest.approx([5 / 9, 5])
    assert sum(entry["epochs_of_a_pass"] * entry["tokens"] for entry in described) == pytest.approx(100)
    assert [(entry["weight"], entry["epochs_of_a_pass"]) for entry in describe_shares(tokens, None)] == [(None, 1)] * 2
    empty = describe_shares({"all": 5, "none": 0}, None)[1]
    assert (empty["token_share"], empty["epochs_of_a_pass"]) == (0, None)
