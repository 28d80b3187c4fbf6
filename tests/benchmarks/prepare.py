"""How fast `prepare` is, what memory it takes, and whether a kill changes anything.

    python tests/benchmarks/prepare.py [--megabytes 25 50 100] [--kills 1]

Makes a corpus of each size from the sources of the library of this Python, each copy with other words exchanged: a
folder of .txt, .jsonl and .jsonl.gz files. Prepares it with 1 and with 2 workers, and once more with 2 and `kill -9`
at random moments, and compares every file of the results. MB/s a core is bytes over the processor seconds of all
processes, which does not depend on what else the machine does.
"""

import argparse
import gzip
import hashlib
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

import psutil

DOCUMENT_CHARACTERS = 6_000


def write_corpus(folder: Path, megabytes: int) -> int:
    """Write a corpus of mixed files; returns its bytes."""
    folder.mkdir(parents=True)
    library = Path(sysconfig.get_path("stdlib"))
    texts = [path.read_text(encoding="utf-8", errors="ignore") for path in sorted(library.glob("*.py"))]
    words = sorted(set(re.findall(r"[a-z]{4,}", "".join(texts))))
    written = number = 0
    while written < megabytes * 1_000_000:
        chance = random.Random(number)
        others = {word: chance.choice(words) for word in chance.sample(words, len(words) // 5)}
        documents = []
        for text in chance.sample(texts, 40):
            for start in range(0, len(text), DOCUMENT_CHARACTERS):
                piece = text[start : start + DOCUMENT_CHARACTERS]
                documents.append(
                    re.sub(r"[a-z]{4,}", lambda found, others=others: others.get(found[0], found[0]), piece)
                )
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        if number % 3 == 0:
            (folder / f"{number:05}.txt").write_text("\n\n".join(documents), encoding="utf-8")
        elif number % 3 == 1:
            (folder / f"{number:05}.jsonl").write_text(lines, encoding="utf-8")
        else:
            (folder / f"{number:05}.jsonl.gz").write_bytes(gzip.compress(lines.encode(), 1))
        written += sum(len(text.encode()) for text in documents)
        number += 1
    return written


def command(output: Path, corpus: Path, tokenizer: Path, num_workers: int) -> list[str]:
    """The command line of one run."""
    settings = {"output_dir": output, "tokenizer_dir": tokenizer, "sources": corpus, "num_workers": num_workers}
    flags = [str(part) for name, value in settings.items() for part in (f"--{name}", value)]
    return [sys.executable, "-m", "hf_scratch_gpt", "prepare", *flags, "--shard_tokens", str(2**20)]


def watch(process: subprocess.Popen) -> dict[str, float]:
    """Wait for a run; seconds, processor seconds of all its processes, and their largest private memory in MB."""
    begin, main = time.monotonic(), psutil.Process(process.pid)
    used: dict[int, float] = {}
    memory = {"main": 0.0, "worker": 0.0}
    while process.poll() is None:
        try:
            for each in [main, *main.children(recursive=True)]:
                times = each.cpu_times()
                used[each.pid] = times.user + times.system
                kind = "main" if each.pid == process.pid else "worker"
                memory[kind] = max(memory[kind], each.memory_full_info().uss / 1e6)
        except psutil.Error:
            pass
        time.sleep(0.1)
    assert process.returncode == 0, f"prepare ended with {process.returncode}"
    return {"seconds": time.monotonic() - begin, "cpu": sum(used.values()), **memory}


def digest(folder: Path) -> str:
    """Of all that a stage reads; the report is a page that names its folder."""
    found = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name not in ("metrics.json", "recipe.yaml", "data_report.html"):
            found.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return found.hexdigest()[:16]


def main() -> None:
    """Print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[25, 50, 100])
    parser.add_argument("--kills", type=int, default=1)
    parser.add_argument("--tokenizer", type=Path, help="folder of a tokenizer; by default one of 4,096 tokens is made")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="prepare-"))
    tokenizer = arguments.tokenizer or folder / "tokenizer"
    if arguments.tokenizer is None:
        make = [sys.executable, "-m", "hf_scratch_gpt", "tokenizer", "--output_dir", str(tokenizer)]
        subprocess.run([*make, "--max_bytes", "5000000"], check=True, capture_output=True)
    for megabytes in arguments.megabytes:
        corpus, results = folder / f"corpus-{megabytes}", set()
        size = write_corpus(corpus, megabytes) / 1e6
        for workers in (1, 2):
            output = folder / f"prepare-{megabytes}-{workers}"
            with open(folder / "log", "w") as log:
                found = watch(subprocess.Popen(command(output, corpus, tokenizer, workers), stderr=log, stdout=log))
            results.add(digest(output))
            print(
                f"{size:.0f} MB, {workers} workers: {found['seconds']:.0f} s, {found['cpu']:.1f} processor seconds, "
                f"{size / found['cpu']:.1f} MB/s a core; private memory: {found['main']:.0f} MB, workers up to "
                f"{found['worker']:.0f} MB; {digest(output)}",
                flush=True,
            )
        for kill in range(arguments.kills if megabytes == max(arguments.megabytes) else 0):
            output = folder / f"killed-{kill}"
            process = subprocess.Popen(command(output, corpus, tokenizer, 2), stderr=subprocess.DEVNULL)
            journal = output / ".journal.json"
            wanted = random.Random(kill).uniform(0.1, 0.9) * megabytes * 250_000  # some 3.7 bytes a token
            while process.poll() is None:
                if journal.is_file() and json.loads(journal.read_text())["splits"]["train"]["tokens"] > wanted:
                    break
                time.sleep(0.05)
            process.kill()
            process.wait()
            before = json.loads(journal.read_text())
            kept = [shard for shard in before["splits"]["train"]["shards"] if shard["sha256"]]
            times = {shard["name"]: (output / "train" / shard["name"]).stat().st_mtime_ns for shard in kept}
            subprocess.run(command(output, corpus, tokenizer, 2), check=True, capture_output=True)
            same = all((output / "train" / name).stat().st_mtime_ns == at for name, at in times.items())
            results.add(digest(output))
            print(f"killed with {len(kept)} finished shards, kept as they were: {same}; {digest(output)}", flush=True)
        print(f"{megabytes} MB: {'all results are equal' if len(results) == 1 else 'RESULTS DIFFER'}", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
