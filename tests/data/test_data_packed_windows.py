"""Packed windows: each token is a target once an epoch, documents are apart, and a batch stays a pure function."""

import itertools
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.data.packed_windows import PackedWindows, pack_windows

PADDING, SEPARATOR = 1, 0
SHARES = {"good": 0.4, "web": 0.55, "tiny": 0.05}


class DocumentShards:
    """`TokenShards` over documents; the token of a text is its own number, so that each is told from all others."""

    folder, split, separator_id = "memory", "train", SEPARATOR

    def __init__(self, lengths, sources=None, mixture=None):
        ends = np.cumsum(np.array(lengths) + 1)
        self.tokens = np.arange(2, ends[-1] + 2)
        self.tokens[ends - 1] = SEPARATOR
        self._starts = np.concatenate([[0], ends[:-1]])
        self.sources, at = [], 0
        for name, count in (sources or {}).items():
            start, end = int(self._starts[at]), int(ends[at + count - 1])
            self.sources.append({"source": name, "start": start, "tokens": end - start, "documents": count})
            at += count
        self.manifest = {"sources": list(sources or {}), "mixture": mixture}

    def document_starts(self):
        return self._starts

    def __len__(self):
        return len(self.tokens)

    def read(self, start, length):
        assert 0 <= start <= start + length <= len(self.tokens)
        return self.tokens[start : start + length]


def draw_lengths(count, longest, seed=0):
    return np.random.default_rng(seed).integers(1, longest, count)


def mixed_shards(mixture=None):
    lengths = [*draw_lengths(60, 30), *draw_lengths(900, 25, 1), *draw_lengths(8, 9, 2)]
    return DocumentShards(lengths, {"good": 60, "web": 900, "tiny": 8}, mixture)


def documents_of(batch):
    """(inputs, targets) of each packed piece of a batch, and what is left: the padding."""
    pieces, padding = [], 0
    rows = (batch[name].numpy() for name in ("input_ids", "position_ids", "labels"))
    for ids, positions, labels in zip(*rows, strict=True):
        for start, end in itertools.pairwise([*np.flatnonzero(positions == 0), len(ids)]):
            assert positions[start:end].tolist() == list(range(end - start))
            if labels[start] == -100:
                assert end == len(ids)  # one padding, and at the end
                assert set(ids[start:]) == {PADDING}
                assert set(labels[start:]) == {-100}
                padding += end - start
            else:
                pieces.append((ids[start:end], labels[start:end]))
    return pieces, padding


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=40),
    context_length=st.integers(2, 24),
    seed=st.integers(0, 2**30),
)
def test_an_epoch_has_each_token_once_and_each_document_behind_a_separator(lengths, context_length, seed):
    shards = DocumentShards(lengths)
    windows = PackedWindows(shards, context_length, padding_id=PADDING)
    (plan,) = windows.plans
    batch = windows.batch(plan.windows, seed, step=0)
    pieces, padding = documents_of(batch)
    assert padding == windows.count_padding(plan.windows, seed, 0)
    assert Counter(int(token) for _, labels in pieces for token in labels) == Counter(shards.tokens.tolist())
    seen = Counter(int(token) for ids, _ in pieces for token in ids)
    assert seen == Counter(shards.tokens.tolist())  # as many separators, and each token of text once
    for ids, labels in pieces:
        assert ids[1:].tolist() == labels[:-1].tolist()  # a target is the next input
        assert SEPARATOR not in labels[:-1]  # it stands only before a document and after it
        assert len(ids) <= context_length
    whole = [len(ids) - 1 for ids, labels in pieces if ids[0] == SEPARATOR and labels[-1] == SEPARATOR]
    assert sorted(whole) == sorted(length for length in lengths if length + 1 <= context_length)


def test_each_epoch_shows_each_window_once_in_an_order_of_its_own():
    windows = PackedWindows(DocumentShards(draw_lengths(300, 30)), 32)
    count = windows.plans[0].windows
    rows = [windows.batch(count, 7, step)["labels"] for step in range(2)]
    assert rows[0].tolist() != rows[1].tolist()
    assert sorted(rows[0].tolist()) == sorted(rows[1].tolist())
    usage = windows.usage(2 * count, 7)
    assert usage["epochs"] == 2
    assert windows.usage(count + 5, 7)["epochs"] == pytest.approx(
        1 + float((rows[1][:5] != -100).sum()) / len(windows._shards)
    )


@pytest.mark.parametrize("shares", [None, SHARES])
@pytest.mark.parametrize("step", [0, 7, 1000])
def test_ranks_share_what_one_process_would_take(step, shares):
    windows = PackedWindows(mixed_shards(), 16, shares)
    together = windows.batch(24, 5, step)
    for world_size in (2, 3, 4):
        apart = [windows.batch(24 // world_size, 5, step, rank, world_size) for rank in range(world_size)]
        for name, values in together.items():
            assert torch.equal(torch.cat([batch[name] for batch in apart]), values)
    assert windows.count_padding(24, 5, step) == int((together["labels"] == -100).sum())


def test_the_targets_of_a_mixture_have_the_shares_that_were_asked_for():
    shards = mixed_shards()
    windows = PackedWindows(shards, 16, SHARES)
    seen = np.zeros(3, int)
    ends = np.cumsum([part["tokens"] for part in shards.sources])
    steps = 300
    for step in range(steps):
        batch = windows.batch(16, 1, step)
        for ids, labels in zip(batch["input_ids"].numpy(), batch["labels"].numpy(), strict=True):
            text = ids[(labels != -100) & (ids != SEPARATOR)]
            (source,) = set(np.searchsorted(ends, text - 2, side="right"))  # sources share no window
            seen[source] += (labels != -100).sum()
    usage = windows.usage(16 * steps, 1)
    for entry, tokens, part in zip(usage["mixture"], seen.tolist(), shards.sources, strict=True):
        assert entry["tokens"] == tokens
        assert entry["share"] == tokens / seen.sum() == pytest.approx(SHARES[entry["source"]], rel=0.005)
        assert entry["epochs"] == tokens / part["tokens"]
        assert entry["weight"] == SHARES[entry["source"]]
    assert usage["epochs"] == seen.sum() / len(shards)


def test_weights_come_from_the_recipe_or_else_from_the_manifest():
    by_manifest = pack_windows(mixed_shards(SHARES), 16, None).usage(1000, 0)["mixture"]
    assert [entry["weight"] for entry in by_manifest] == list(SHARES.values())
    given = pack_windows(mixed_shards(SHARES), 16, "good=1,web=2,tiny=1").usage(1000, 0)["mixture"]
    assert [entry["weight"] for entry in given] == [0.25, 0.5, 0.25]
    assert "mixture" not in pack_windows(mixed_shards(), 16, None).usage(1000, 0)


def test_positions_count_on_if_documents_are_not_respected():
    windows = PackedWindows(DocumentShards(draw_lengths(50, 12)), 16)
    free, kept = windows.batch(8, 0, 0, respect_documents=False), windows.batch(8, 0, 0)
    assert free["position_ids"].tolist() == [list(range(16))] * 8
    for name in ("input_ids", "labels"):
        assert torch.equal(free[name], kept[name])
    assert (kept["position_ids"] <= 12).all()


def test_a_packed_document_scores_as_it_would_alone():
    """Two ways of computing one thing: documents and padding in one window, and each document by itself."""
    from hf_scratch_gpt import ScratchGPTConfig, ScratchGPTForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = ScratchGPTConfig(vocab_size=40, num_key_value_heads=2, head_dim=16, max_position_embeddings=32, **sizes)
    model = ScratchGPTForCausalLM(config).eval()
    windows = PackedWindows(DocumentShards([9, 5, 3]), 24, padding_id=PADDING)
    batch = windows.batch(1, 0, 0)
    pieces, padding = documents_of(batch)
    assert [len(ids) for ids, _ in pieces] == [10, 6, 4]
    assert padding == 4
    with torch.no_grad():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits[0]
        alone = torch.cat([model(torch.from_numpy(ids)[None], use_cache=False).logits[0] for ids, _ in pieces])
    torch.testing.assert_close(packed[:20], alone, atol=1e-5, rtol=0)


def test_a_source_without_documents_is_named():
    shards = mixed_shards()
    shards.sources[2]["tokens"] = 0
    with pytest.raises(ValueError, match="the source tiny has no documents in the train part"):
        PackedWindows(shards, 16, SHARES)


def test_an_index_that_does_not_fit_the_manifest_is_refused():
    shards = mixed_shards()
    shards.sources[1]["start"] += 1
    with pytest.raises(
        ValueError, match=f"no document begins at token {shards.sources[1]['start']} of the train part"
    ):
        PackedWindows(shards, 16, SHARES)
