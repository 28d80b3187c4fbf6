"""Best-fit packing: which documents share a window, so that none is cut that fits one (Ding et al. 2024, "Fewer
Truncations Improve Language Modeling", arXiv:2404.10830).

A document longer than a window is cut into pieces as long as one, each a window of its own, and a shorter rest. Rests
and short documents are packed by best-fit decreasing (Johnson 1973): the longest first, each into the window with the
least room that still takes it. What room is left is padding.

The plan is a pure function of the documents' lengths. It is made anew at each start, from the index of documents that
lies beside the shards, so that no file of it can go stale.
"""

import dataclasses

import numpy as np

BLOCK_DOCUMENTS = 1 << 22  # packed on their own, which bounds the memory that sorting takes to some 200 MB


class _OpenWindows:
    """Windows by the room that they have left: a flag a room, so that finding the least that fits is one `find`."""

    def __init__(self, capacity: int):
        self.capacity, self.count = capacity, 0
        self._is_found = bytearray(capacity + 1)
        self._by_room: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]

    def place(self, length: int, count: int) -> np.ndarray:
        """The windows of `count` pieces of one `length`, none of which is longer than a piece before, (count,).

        A window that takes one and has room for another has less room than any other that takes it, so the next goes
        there too: all windows of one room are filled at once, by whole numbers of pieces.
        """
        placed = []
        while count:
            room = self._is_found.find(1, length)
            windows = self._take(room) if room >= 0 else self._open(length, count)
            room = room if room >= 0 else self.capacity
            fits = room // length
            filled, rest = min(len(windows), count // fits), 0
            if filled < len(windows):
                rest = count - filled * fits
            placed += [np.repeat(windows[:filled], fits), np.repeat(windows[filled : filled + 1], rest)]
            self._put(room - fits * length, windows[:filled])
            if rest:
                self._put(room - rest * length, windows[filled : filled + 1])
            self._put(room, windows[filled + (rest > 0) :])
            count -= filled * fits + rest
        return np.concatenate(placed)

    def _open(self, length: int, count: int) -> np.ndarray:
        begin = self.count
        self.count += -(-count // (self.capacity // length))
        return np.arange(begin, self.count)

    def _take(self, room: int) -> np.ndarray:
        found, self._by_room[room] = self._by_room[room], []
        self._is_found[room] = 0
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _put(self, room: int, windows: np.ndarray) -> None:
        if room and len(windows):
            self._by_room[room].append(windows)
            self._is_found[room] = 1


def best_fit_decreasing(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Pack pieces into windows, the longest first, each into the fullest window that takes it (Johnson 1973).

    Pieces of one length are placed together: O(n log n) to sort them, and then a few operations for each pair of a
    length and a room that meet, instead of for each piece.

    Args:
        lengths (`np.ndarray`): Of the pieces, integers of shape (pieces,).
        capacity (`int`): Of a window.

    Returns:
        `np.ndarray`: The window of each piece, counted from 0, int64 of shape (pieces,).

    Raises:
        ValueError: for a length below 1 or above `capacity`.
    """
    if not len(lengths):
        return np.empty(0, np.int64)
    if lengths.min() < 1 or lengths.max() > capacity:
        raise ValueError(f"lengths are {lengths.min()} to {lengths.max()}, expected 1 to the capacity {capacity}")
    ascending = np.argsort(lengths, kind="stable")
    found, counts = np.unique(lengths, return_counts=True)
    ends, windows = np.cumsum(counts), _OpenWindows(capacity)
    placed = np.empty(len(lengths), np.int64)
    for length, count, end in zip(found[::-1].tolist(), counts[::-1].tolist(), ends[::-1].tolist(), strict=True):
        placed[ascending[end - count : end]] = windows.place(length, count)
    return placed


@dataclasses.dataclass(frozen=True)
class PackingPlan:
    """Which pieces of documents are in which window: 12 bytes a piece and 12 a window.

    Args:
        context_length (`int`): Room of a window.
        firsts (`np.ndarray`): Window w has the pieces `firsts[w]` to `firsts[w + 1]`, int64 of shape (windows + 1,).
        starts (`np.ndarray`): Token number at which each piece begins, int64 of shape (pieces,).
        lengths (`np.ndarray`): Tokens of each piece, int32 of shape (pieces,).
        filled (`np.ndarray`): Tokens of each window, int32 of shape (windows,).
        documents (`int`): How many there are.
        documents_cut (`int`): Of these, how many are longer than a window.
    """

    context_length: int
    firsts: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    filled: np.ndarray
    documents: int
    documents_cut: int

    @property
    def windows(self) -> int:
        """How many windows there are."""
        return len(self.filled)

    @property
    def tokens(self) -> int:
        """Tokens of all windows, without padding."""
        return int(self.filled.sum(dtype=np.int64))

    @property
    def padding_share(self) -> float:
        """Share of the windows' room that is padding."""
        return 1 - self.tokens / (self.windows * self.context_length)

    def pieces(self, window: int) -> list[tuple[int, int]]:
        """Start and length of each piece of a window, in the order of the text."""
        chosen = slice(self.firsts[window], self.firsts[window + 1])
        return list(zip(self.starts[chosen].tolist(), self.lengths[chosen].tolist(), strict=True))


def plan_windows(
    document_starts: np.ndarray, end: int, context_length: int, block_documents: int = BLOCK_DOCUMENTS
) -> PackingPlan:
    """Pack successive documents into windows.

    Args:
        document_starts (`np.ndarray`): Where each begins, ascending token numbers, int64 of shape (documents,).
        end (`int`): Where the last one ends.
        context_length (`int`): Tokens of a window.
        block_documents (`int`, *optional*): So many documents at a time are packed with each other.

    Returns:
        `PackingPlan`: In which each token is once.
    """
    lengths = np.diff(document_starts, append=end)
    blocks = []
    for begin in range(0, len(lengths), block_documents):
        block = slice(begin, begin + block_documents)
        blocks.append(_plan_block(document_starts[block], lengths[block], context_length))
    counts, starts, pieces = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    firsts = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return PackingPlan(
        context_length=context_length,
        firsts=firsts,
        starts=starts,
        lengths=pieces,
        filled=np.add.reduceat(pieces, firsts[:-1]),
        documents=len(lengths),
        documents_cut=int(np.count_nonzero(lengths > context_length)),
    )


def _plan_block(starts: np.ndarray, lengths: np.ndarray, context_length: int) -> tuple[np.ndarray, ...]:
    """Pieces of each window, and start and length of each piece, window after window."""
    whole, rest = lengths // context_length, lengths % context_length
    number = np.arange(whole.sum()) - np.repeat(np.cumsum(whole) - whole, whole)  # of a whole piece in its document
    whole_starts = np.repeat(starts, whole) + number * context_length
    chosen = rest > 0
    rest_starts, rests = (starts + whole * context_length)[chosen], rest[chosen].astype(np.int32)
    windows = best_fit_decreasing(rests, context_length)
    order = np.argsort(windows, kind="stable")
    return (
        np.concatenate([np.ones(len(whole_starts), np.int32), np.bincount(windows).astype(np.int32)]),
        np.concatenate([whole_starts, rest_starts[order]]),
        np.concatenate([np.full(len(whole_starts), context_length, np.int32), rests[order]]),
    )
