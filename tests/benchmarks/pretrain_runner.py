"""Starts the rows of the pretraining benchmarks, each in a process of its own, and prepares their corpora."""

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROWS_SCRIPT = Path(__file__).with_name("pretrain_rows.py")
PYTHON_DOCS = "python-docs"
TINY_SHAKESPEARE = "tinyshakespeare"
_DOCUMENT_CHARACTERS = 4000
_TAIL_LINES = 15


def parse_pairs(texts: list[str]) -> dict[str, str]:
    """`name=value` texts as a mapping; a value may hold more equals signs."""
    return dict(text.split("=", 1) for text in texts)


def run_command(command: list[str], log: Path, **environment: str) -> None:
    """Run a command, its output in `log`.

    Raises:
        SystemExit: if it fails, with the end of its output.
    """
    with open(log, "wb") as file:
        done = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **environment})
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:]
        raise SystemExit("\n".join([f"{' '.join(command)}\nended with {done.returncode}:", *tail]))


def _shakespeare_documents(work: Path) -> Path:
    """Tiny Shakespeare as documents of a few speeches, so that some of them can be held out.

    Raises:
        SystemExit: if the text is not there.
    """
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    file = Path(os.environ.get("SCRATCH_GPT_TEST_DATA", beside)) / "tinyshakespeare.txt"
    if not file.is_file():
        raise SystemExit(f"{file}: not found; set SCRATCH_GPT_TEST_DATA to the folder with tinyshakespeare.txt")
    documents: list[list[str]] = [[]]
    for speech in re.split(r"\n\n+", file.read_text(encoding="utf-8").strip()):
        documents[-1].append(speech)
        if sum(map(len, documents[-1])) >= _DOCUMENT_CHARACTERS:
            documents.append([])
    lines = [json.dumps({"text": "\n\n".join(speeches)}) for speeches in documents if speeches]
    target = work / "tinyshakespeare.jsonl"
    target.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return target


def prepare_corpus(corpus: str, vocab_size: int, work: Path) -> Path:
    """Tokenizer and token shards of a corpus, by our own stages; what is already below `work` stays.

    Args:
        corpus (`str`): `"python-docs"`, `"tinyshakespeare"`, or a file or folder of texts.
        vocab_size (`int`): Tokens of the tokenizer.
        work (`Path`): Folder of the benchmark.
    """
    source = str(_shakespeare_documents(work)) if corpus == TINY_SHAKESPEARE else corpus
    name = f"{Path(corpus).name}-{vocab_size}"
    tokenizer, prepared = work / f"tokenizer-{name}", work / f"prepare-{name}"
    common = ["--sources", source, "--heldout_fraction", "0.05"]
    scratch_gpt = [sys.executable, "-m", "hf_scratch_gpt"]
    sized = ["--vocab_size", str(vocab_size), "--output_dir", str(tokenizer)]
    run_command([*scratch_gpt, "tokenizer", *common, *sized], work / "tokenizer.log")
    used = ["--tokenizer_dir", str(tokenizer), "--output_dir", str(prepared)]
    run_command([*scratch_gpt, "prepare", *common, *used], work / "prepare.log")
    return prepared


def run_row(request: dict[str, Any], work: Path) -> dict[str, Any]:
    """Measure one row in a process of its own, with no code compiled before; see `pretrain_request.Request`.

    Raises:
        SystemExit: if the row fails, with the end of its output.
    """
    with tempfile.TemporaryDirectory(dir=work, prefix=f"{request['row']}-") as name:
        folder = Path(name)
        request_file, result_file = folder / "request.json", folder / "result.json"
        request_file.write_text(json.dumps({**request, "work": str(folder)}), encoding="utf-8")
        environment = {
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "compiled"),
            "TRITON_CACHE_DIR": str(folder / "triton"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, str(ROWS_SCRIPT), str(request_file), str(result_file)]
        run_command(command, work / "row.log", **environment)
        return json.loads(result_file.read_text(encoding="utf-8"))


@contextlib.contextmanager
def work_folder(given: str | None) -> Iterator[Path]:
    """The folder given, created, or a temporary one."""
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
    else:
        with tempfile.TemporaryDirectory(prefix="pretrain-benchmark-") as name:
            yield Path(name)


@dataclasses.dataclass(frozen=True)
class Speed:
    """A row's speed in one repeat.

    Args:
        tokens_per_second (`float`): Over the steps after the warm-up.
        share_of_peak (`float`): Model FLOPs a second over the bf16 peak of the same process, 0 to 1.
    """

    tokens_per_second: float
    share_of_peak: float

    @classmethod
    def of(cls, result: dict[str, Any], warmup: int) -> "Speed":
        """From the result of a row; of all its steps if its time was over before the warm-up was."""
        counted = result["step_seconds"][warmup:] or result["step_seconds"]
        rate = len(counted) * result["tokens_per_step"] / sum(counted)
        # The better of before and after: the strictest peak to be held against.
        return cls(rate, rate * result["flops_per_token"] / max(result["peak_flops"]))
