"""Chunks of documents through several processes, in order: the results do not tell how many there were.

Each worker is a process of its own that never shared a thread with this one (`forkserver`, or `spawn` where there is
none): a fork of a process whose tokenizer has started threads may wait for ever. It has one chunk at a time.
"""

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain, islice
from queue import SimpleQueue
from typing import Any, TypeVar

from hf_scratch_gpt.data.documents import Document
from hf_scratch_gpt.data.processing import ProcessedChunk, Processor, ProcessorSettings

T = TypeVar("T")
# A corpus of no more chunks is done before workers would have started.
CHUNKS_BEFORE_WORKERS = 8
_WAITING_PER_WORKER = 2  # chunks that are read ahead: they bound the memory
_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"


def _serve(connection: Any, settings: ProcessorSettings) -> None:
    """The life of a worker: chunks in, results or errors out, until the other end is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    processor = Processor(settings)
    try:
        while True:
            documents = connection.recv()
            try:
                result: Any = processor.process(documents)
            except Exception as error:
                result = error
            connection.send(result)
    except (EOFError, OSError):
        return


def _describe(documents: list[Document]) -> str:
    first, last = documents[0], documents[-1]
    if len(documents) == 1:
        return f"document {first.id} of {first.source}"
    return f"documents {first.id} of {first.source} to {last.id} of {last.source}"


class _Worker:
    """A process and the end of its pipe."""

    def __init__(self, context: Any, settings: ProcessorSettings):
        self._connection, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, settings), daemon=True)
        self.process.start()
        other.close()

    def work(self, documents: list[Document]) -> ProcessedChunk:
        try:
            self._connection.send(documents)
            result = self._connection.recv()
        except (EOFError, OSError):
            self.process.join(10)
            raise OSError(
                f"prepare: the worker process {self.process.pid} died (exit status {self.process.exitcode}) at "
                f"{_describe(documents)}; if memory ran out use fewer num_workers, then start again: it goes on there"
            ) from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self) -> None:
        self._connection.close()
        self.process.join(5)
        if self.process.is_alive():
            self.process.terminate()


def _through_workers(
    chunks: Iterator[tuple[list[Document], T]], settings: ProcessorSettings, num_workers: int
) -> Iterator[tuple[ProcessedChunk, T]]:
    context = multiprocessing.get_context(_METHOD)
    if _METHOD == "forkserver":
        context.set_forkserver_preload([__name__])
    workers = [_Worker(context, settings) for _ in range(num_workers)]
    idle: SimpleQueue[_Worker] = SimpleQueue()
    for worker in workers:
        idle.put(worker)

    def work(documents: list[Document]) -> ProcessedChunk:
        worker = idle.get()
        try:
            return worker.work(documents)
        finally:
            idle.put(worker)

    # A thread for each worker waits for its answers; all the computing is in the processes.
    pool = ThreadPoolExecutor(num_workers)
    pending: deque[tuple[Future[ProcessedChunk], T]] = deque()
    try:
        for documents, mark in chunks:
            pending.append((pool.submit(work, documents), mark))
            if len(pending) >= num_workers * (1 + _WAITING_PER_WORKER):
                future, mark = pending.popleft()
                yield future.result(), mark
        while pending:
            future, mark = pending.popleft()
            yield future.result(), mark
    finally:
        pool.shutdown(cancel_futures=True)  # waits for the chunks in work, a moment each
        for worker in workers:
            worker.close()


def process_chunks(
    chunks: Iterable[tuple[list[Document], T]], settings: ProcessorSettings, num_workers: int
) -> Iterator[tuple[ProcessedChunk, T]]:
    """Process chunks of documents; yields the results in the order of the chunks, each with its chunk's mark.

    Args:
        chunks (`Iterable`): Pairs of documents and a mark that is handed through.
        settings (`ProcessorSettings`): What is done with them.
        num_workers (`int`): Processes; 1 works in this one.

    Raises:
        OSError: if a worker dies, naming the documents that it had.
        ValueError: whatever is wrong with a document.
    """
    iterator = iter(chunks)
    first = list(islice(iterator, CHUNKS_BEFORE_WORKERS + 1)) if num_workers > 1 else []
    rest = chain(first, iterator)
    if len(first) > CHUNKS_BEFORE_WORKERS:
        yield from _through_workers(rest, settings, num_workers)
        return
    processor = Processor(settings)
    for documents, mark in rest:
        yield processor.process(documents), mark
