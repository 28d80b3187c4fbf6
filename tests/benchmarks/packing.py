"""What packing documents whole saves and costs, against contiguous windows, and how long its plan takes.

    python tests/benchmarks/packing.py [--prepared FOLDER] [--context_lengths 256 1024 2048 8192]
    python tests/benchmarks/packing.py --train 400 [--seeds 0 1] [--context_length 512]

Without a prepared folder it makes one of `prepare`'s default source, the Python documentation, with a tokenizer of
4,096 tokens. For each window length: the share of documents that are cut, of those the needless ones (documents that
would fit a window), the padding, and the plan's seconds. Then the plan of a million documents of log-normal lengths.
`--train` trains a small model on as many windows of each kind and tells bits per byte and tokens.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from hf_scratch_gpt.data.loader import windows_per_epoch
from hf_scratch_gpt.data.packing import plan_windows
from hf_scratch_gpt.data.shards import TokenShards

SMALL = ["hidden_size=128", "intermediate_size=384", "num_hidden_layers=4", "num_attention_heads=4"]
SMALL += ["num_key_value_heads=2", "head_dim=32"]


def stage(name: str, output: Path, **settings: object) -> Path:
    """Run a stage on its command line; returns its folder."""
    flags = [str(part) for key, value in settings.items() for part in (f"--{key}", value)]
    command = [sys.executable, "-m", "hf_scratch_gpt", name, "--output_dir", str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return output


def prepare(folder: Path) -> Path:
    """The Python documentation as token shards."""
    tokenizer = stage("tokenizer", folder / "tokenizer", sources="python-docs")
    return stage("prepare", folder / "prepare", sources="python-docs", tokenizer_dir=tokenizer)


def cut_by_contiguous(starts: np.ndarray, end: int, context_length: int, offset: int) -> np.ndarray:
    """Whether each document lies across a border of windows that follow each other from `offset` on, (documents,)."""
    lasts = np.append(starts[1:], end) - 1
    return (starts - offset) // context_length != (lasts - offset) // context_length


def compare(shards: TokenShards, context_length: int) -> None:
    """Print a line for each kind of windows."""
    starts, end = shards.document_starts(), len(shards)
    lengths = np.diff(starts, append=end)
    fits = lengths <= context_length
    # The mean over the offsets that epochs may have.
    offsets = np.linspace(0, context_length, 16, endpoint=False).astype(int)
    cut = np.mean([cut_by_contiguous(starts, end, context_length, offset) for offset in offsets], axis=0)
    begin = time.perf_counter()
    plan = plan_windows(starts, end, context_length)
    seconds = time.perf_counter() - begin
    windows = windows_per_epoch(shards, context_length)
    print(
        f"{context_length} tokens, {fits.mean():.1%} of {len(starts):,} documents fit\n"
        f"  contiguous: {cut.mean():.1%} of documents cut, of those that fit {cut[fits].mean():.1%}; "
        f"{windows} windows\n"
        f"  best fit:   {plan.documents_cut / plan.documents:.1%} of documents cut, of those that fit 0%; "
        f"{plan.windows} windows, {plan.padding_share:.3%} padding; planned in {seconds * 1e3:.0f} ms",
        flush=True,
    )


def plan_a_million(context_lengths: list[int]) -> None:
    """Print how long the plan of a million documents takes."""
    lengths = np.maximum(1, np.random.default_rng(0).lognormal(6.3, 1.2, 1_000_000)).astype(np.int64)
    starts, end = np.cumsum(lengths) - lengths, int(lengths.sum())
    for context_length in context_lengths:
        begin = time.process_time()
        plan = plan_windows(starts, end, context_length)
        seconds = time.process_time() - begin
        size = sum(values.nbytes for values in (plan.firsts, plan.starts, plan.lengths, plan.filled))
        print(
            f"a million documents, {end / 1e9:.1f} billion tokens, windows of {context_length}: {seconds:.1f} "
            f"processor seconds, {size / 1e6:.0f} MB, {plan.padding_share:.4%} padding, "
            f"{plan.documents_cut / 1e6:.1%} of documents cut",
            flush=True,
        )


def train(prepared: Path, folder: Path, steps: int, context_length: int, seeds: list[int]) -> None:
    """Print bits per byte after as many windows of each kind."""
    settings = {"context_length": context_length, "batch_size": 4096 // context_length, "max_steps": steps}
    overrides = ",".join([*SMALL, f"max_position_embeddings={context_length}"])
    for seed in seeds:
        for packing in ("contiguous", "best_fit"):
            output = folder / f"{packing}-{seed}"
            stage(
                "pretrain", output, dataset_dir=prepared, packing=packing, seed=seed, compile="false",
                model_overrides=overrides, checkpoint_seconds=0.0, **settings,
            )  # fmt: skip
            metrics = json.loads((output / "metrics.json").read_text())["metrics"]
            low, high = metrics["heldout_bits_per_byte_interval"]
            print(
                f"{packing}, seed {seed}: {metrics['heldout_bits_per_byte']:.4f} bits per byte ({low:.4f} to "
                f"{high:.4f}), {metrics['tokens']:,} tokens, {metrics['padding_share']:.2%} padding",
                flush=True,
            )


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prepared", type=Path)
    parser.add_argument("--context_lengths", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096, 8192])
    parser.add_argument("--train", type=int, default=0, help="steps of 4,096 tokens; by default nothing is trained")
    parser.add_argument("--context_length", type=int, default=512, help="of the windows to train on")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="packing-"))
    prepared = arguments.prepared or prepare(folder)
    if arguments.train:
        train(prepared, folder, arguments.train, arguments.context_length, arguments.seeds)
        return
    shards = TokenShards(prepared)
    for context_length in arguments.context_lengths:
        compare(shards, context_length)
    plan_a_million(arguments.context_lengths)


if __name__ == "__main__":
    main()
