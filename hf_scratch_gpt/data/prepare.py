"""Stage `prepare`: clean and split text, and write what training and evaluation read.

    scratch-gpt prepare --output_dir runs/prepare --tokenizer_dir runs/tokenizer --sources my_texts/

The folder holds token shards of both splits (see `shards`), the held-out documents as they are in `heldout.jsonl`,
the tokenizer, what the filters removed in `data_report.json`, and `tasks/` if asked for. `manifest.json`, with
the checksums of them all, is written when they are there.

One process reads the sources in their order; `num_workers` others clean and encode a chunk of about a megabyte at a
time; the first one takes the results in order, removes duplicates and writes. So the shards do not depend on the
number of workers, memory does not grow with the corpus but for 25 to 50 bytes a document (see `seen`; more with
the filter `minhash_duplicates`), and a run that was killed goes on from the last document that its journal names (see
`tokenised`).
"""

import dataclasses
import gzip
import json
import logging
import lzma
import time
from collections import Counter
from pathlib import Path
from typing import Any, ClassVar

from hf_scratch_gpt.data.corpus import CorpusArguments, check_corpus_arguments, check_splits, read_chunks
from hf_scratch_gpt.data.data_report import DATA_REPORT, filter_counts
from hf_scratch_gpt.data.encoding import encoder_settings
from hf_scratch_gpt.data.manifest import PREPARE_AGAIN, check_files, read_manifest, write_manifest
from hf_scratch_gpt.data.mixture import MixtureWeights, describe_shares, parse_mixture
from hf_scratch_gpt.data.processing import ProcessorSettings
from hf_scratch_gpt.data.shards import SPLITS, TokenShards, separator_id, token_dtype, tokenizer_fingerprint
from hf_scratch_gpt.data.sources import KNOWN_TERMS, PYTHON_DOCS
from hf_scratch_gpt.data.tokenised import HELDOUT, TokenisedFolder
from hf_scratch_gpt.data.workers import process_chunks
from hf_scratch_gpt.runs import StageRun, read_metrics, write_json
from hf_scratch_gpt.runs.hardware import usable_cores
from hf_scratch_gpt.runs.identity import fingerprint
from hf_scratch_gpt.runs.loading import loading

logger = logging.getLogger(__name__)

_CHUNK_CHARACTERS = 1_000_000  # of text in a chunk, or one document
# The general compressors are measured on no more than this: xz takes seconds a megabyte.
_COMPRESSED_BYTES = 64_000_000


@dataclasses.dataclass
class PrepareArguments(CorpusArguments):
    """Settings of the stage `prepare`, besides those of the corpus.

    Args:
        tokenizer_dir (`str`): A folder with a fast tokenizer: the stage `tokenizer`'s or any other.
        tasks (`str`, *optional*): `"python-docs"` also writes questions with checkable answers and preferences.
        shard_tokens (`int`, *optional*, defaults to `16777216`): Tokens of a shard file.
        num_workers (`int`, *optional*, defaults to `0`): Processes that clean and encode; 0: one for each core. The
            result does not depend on it.
        mixture (`dict[str, float]`, *optional*): A weight for each source: its share of the training tokens, whatever
            its size, as in table 2.2 of arXiv:2005.14165. It goes into the manifest, for `pretrain` to draw by;
            `pretrain` may say another without new shards. Without, every token is seen equally often.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("tokenizer_dir", "sources", "evaluation_sets", "toxic_words")

    tokenizer_dir: str = dataclasses.field(default="", metadata={"help": "Folder with the tokenizer."})
    tasks: str | None = dataclasses.field(default=None, metadata={"help": "python-docs, or nothing: tasks to write."})
    shard_tokens: int = dataclasses.field(default=2**24, metadata={"help": "Tokens of a shard file."})
    num_workers: int = dataclasses.field(
        default=0, metadata={"help": "Processes that clean and encode; 0: one for each core. Results do not change."}
    )
    mixture: MixtureWeights = dataclasses.field(
        default=None,
        metadata={
            "help": "Weight of each source, its share of the training tokens: a mapping in a recipe; here "
            "'source=weight,...' or JSON."
        },
    )


Arguments = PrepareArguments


def load_tokenizer(folder: str) -> Any:
    """The fast tokenizer in `folder`.

    Raises:
        FileNotFoundError: if the folder is missing or holds none.
        ValueError: if none is named or it is not a fast one.
    """
    from transformers import AutoTokenizer

    if not folder:
        raise ValueError(
            "'tokenizer_dir' is missing: name the folder of the stage 'tokenizer' or of another tokenizer"
        )
    if not (Path(folder) / "tokenizer.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer here (no tokenizer.json); run the stage 'tokenizer' first")
    with loading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if not tokenizer.is_fast:
        raise ValueError(f"{folder}: {type(tokenizer).__name__} is no fast tokenizer; convert it to a tokenizer.json")
    return tokenizer


def _check_arguments(arguments: PrepareArguments) -> None:
    """Refuse a split that differs from the tokenizer's on the same text: the tokenizer would know held-out text."""
    check_corpus_arguments(arguments)
    parse_mixture(arguments.mixture, arguments.sources)
    if arguments.num_workers < 0:
        raise ValueError(f"'num_workers' is {arguments.num_workers}, expected 0 (one for each core) or more")
    if arguments.tasks not in (None, PYTHON_DOCS):
        raise ValueError(f"'tasks' is '{arguments.tasks}', expected {PYTHON_DOCS} or nothing")
    try:
        metrics = read_metrics(arguments.tokenizer_dir)["metrics"]
    except FileNotFoundError:  # somebody else's tokenizer
        return
    shared = set(arguments.sources) & set(metrics.get("sources", ()))
    if shared and metrics["split"] != arguments.split_settings():
        raise ValueError(
            f"{arguments.tokenizer_dir}: trained on {', '.join(sorted(shared))} with the split {metrics['split']}, "
            f"but this recipe has {arguments.split_settings()}, so held-out text would have trained the tokenizer; "
            "give both stages the same seed, heldout_fraction and group_column"
        )


def compression(text: bytes) -> dict[str, Any]:
    """Bits per byte that `gzip -9` and `xz -9` need for `text`: what a language model has to beat."""
    # xz's own dictionary of 64 MB changes nothing on less text, but takes 700 MB of memory.
    window = max(4096, 1 << len(text).bit_length())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": min(window, 1 << 26)}]
    return {
        "bytes": len(text),
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, filters=filters)) / len(text),
    }


def _read_heldout(path: Path) -> bytes:
    """The beginning of the held-out text, for `compression`."""
    text = bytearray()
    with open(path, encoding="utf-8") as file:
        for line in file:
            text += json.loads(line)["text"].encode()
            if len(text) >= _COMPRESSED_BYTES:
                break
    return bytes(text)


def _tokenise(arguments: PrepareArguments, tokenizer: Any, folder: TokenisedFolder) -> dict[str, Any]:
    """Stream what is left of the corpus into `folder`; returns the manifest's splits."""
    from hf_scratch_gpt.runs.training import progress_bar

    settings = ProcessorSettings(
        arguments.cleaning_settings(),
        encoder_settings(tokenizer),
        separator_id(tokenizer),
        arguments.seed,
        arguments.heldout_fraction,
    )
    chunks = read_chunks(arguments, _CHUNK_CHARACTERS, folder.position)
    begin, done = time.monotonic(), folder.documents.total()
    if folder.reused_shards or done:
        logger.warning("going on after %d documents; %d finished shards are kept", done, folder.reused_shards)
    read_bytes = 0
    with progress_bar("prepare", None, done) as bar:  # type: ignore[arg-type]  # a stream has no known length
        bar.unit = "document"
        for chunk, position in process_chunks(chunks, settings, arguments.num_workers or usable_cores()):
            folder.add(chunk, position)
            read_bytes += int(chunk.sizes.sum())
            bar.update(folder.documents.total() - bar.n)
            rate = read_bytes / 1e6 / (time.monotonic() - begin)
            bar.set_postfix({"tokens": f"{folder.tokens:,}", "MB/s": f"{rate:.1f}"})
    check_splits(arguments, folder.documents, folder.cleaning.removed)
    return folder.close()


def _describe_sources(by_source: dict[str, Counter[str]]) -> list[dict[str, Any]]:
    """What each source gave to each split, and its licence where that is known."""
    names = [f"{split}_{unit}" for split in SPLITS for unit in ("documents", "tokens", "bytes")]
    return [
        {"source": source, **KNOWN_TERMS.get(source, {}), **{name: sizes[name] for name in names}}
        for source, sizes in by_source.items()
    ]


def _describe(splits: dict[str, Any], heldout_text: bytes) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for split, entry in splits.items():
        metrics |= {f"{split}_{name}": entry[name] for name in ("tokens", "documents", "bytes")}
    heldout = splits["heldout"]
    metrics["heldout_bytes_per_token"] = heldout["bytes"] / (heldout["tokens"] - heldout["documents"])
    return metrics | {"heldout_compression": compression(heldout_text)}


def _files_to_list(folder: Path, saved: list[str]) -> list[str]:
    """What is read later beside the shards: held-out text, report, tasks, and the tokenizer's `saved` files."""
    tasks = [path.relative_to(folder).as_posix() for path in (folder / "tasks").rglob("*") if path.is_file()]
    return [HELDOUT, DATA_REPORT, *tasks, *(name for name in saved if (folder / name).is_file())]


def find_damage(folder: str | Path) -> str | None:
    """What is wrong with a finished folder of this stage, naming the file, or `None` if all of it is as written."""
    try:
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        for split in manifest["splits"]:
            TokenShards(folder, split)
    except (OSError, ValueError) as error:
        return str(error).removesuffix(f"; {PREPARE_AGAIN}")
    return None


def run(arguments: PrepareArguments) -> Path:
    """Write shards, held-out documents, tokenizer and tasks to `arguments.output_dir`; a damaged folder is made anew.

    Raises:
        FileNotFoundError, ValueError, OSError: for a tokenizer or sources that cannot be read, naming file and place;
            for a corpus that leaves nothing to train on or to hold out; for a split that is not the tokenizer's.
    """
    with StageRun(arguments, "prepare") as run:
        if run.finished and run.is_main:
            damage = find_damage(run.folder)
            if damage is not None:
                run.begin_anew(damage)
        if run.finished or not run.is_main:  # one process is enough: the others of a launch have nothing to do
            return run.folder
        _check_arguments(arguments)
        tokenizer = load_tokenizer(arguments.tokenizer_dir)
        dtype = token_dtype(len(tokenizer))
        folder = TokenisedFolder(
            run.folder,
            dtype,
            separator_id(tokenizer),
            arguments.shard_tokens,
            arguments.sources,
            arguments.cleaning_settings(),
            run.resumed,
        )
        splits = _tokenise(arguments, tokenizer, folder)
        saved = [Path(name).name for name in tokenizer.save_pretrained(run.folder)]
        metrics = _describe(splits, _read_heldout(run.folder / HELDOUT))
        metrics["by_source"] = _describe_sources(folder.by_source)
        if arguments.tasks:
            from hf_scratch_gpt.data.tasks import write_tasks

            metrics["tasks"] = write_tasks(run.folder / "tasks", arguments.seed)
        report, removed = folder.cleaning.data_report(), dict(folder.cleaning.removed)
        write_json(run.folder / DATA_REPORT, report)
        metrics["filters"] = [filter_counts(entry) for entry in report["filters"]]
        mixture = parse_mixture(arguments.mixture, arguments.sources)
        metrics["shares"] = describe_shares(
            {source: sizes["train_tokens"] for source, sizes in folder.by_source.items()}, mixture
        )
        manifest = {
            "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
            "vocab_size": len(tokenizer),
            "separator_id": separator_id(tokenizer),
            "dtype": dtype.name,
            "recipe_hash": fingerprint(arguments, "prepare"),
            "splits": splits,
            "sources": arguments.sources,
            "mixture": mixture,
            "shares": metrics["shares"],
            "removed": removed,
            "filters": metrics["filters"],
            "cleaning": dataclasses.asdict(arguments.cleaning_settings()),  # for a stream, which is cleaned like this
        }
        write_manifest(run.folder, manifest, _files_to_list(run.folder, saved))
        run.finish({**metrics, "sources": arguments.sources, "removed": removed})
        folder.remove_journal()
        return run.folder
