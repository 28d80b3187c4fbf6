"""Classification from a base model on random 80/20 splits, with and without GPT-1's auxiliary loss.

    python tests/benchmarks/classify.py --base DIR --data FILE [--seeds 5] [--aux] [--keep-duplicates] [--output DIR]
    python tests/benchmarks/classify.py --data FILE --seeds 5 --untested-rows ROWS.jsonl
    python tests/benchmarks/classify.py --base DIR --data ROWS.jsonl --validate [-- --learning_rate 1e-3 ...]

The first trains a classifier for each seed, 0 to N-1, which draws the split and the new head, and prints each one's
held-out accuracy and F1, their means, and the spread over seeds. `--aux` trains a second time with the auxiliary loss,
`--keep-duplicates` once more with the training rows whose text is held out too, which are left out otherwise.
Settings after `--` go to the stage.

They must not be chosen by rows that are reported. The second line writes the rows that no seed holds out; the third
trains on part of these and prints accuracy and F1 on a validation part, for seeds from 100.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

FIRST_VALIDATION_SEED = 100
AUXILIARY_WEIGHT = 0.5  # of Radford et al. 2018


def train(base: str, data: str, folder: Path, seed: int, flags: list[str]) -> dict[str, Any]:
    """The metrics of a classifier that is trained into `folder`, or was before."""
    from hf_scratch_gpt.finetuning import classify
    from hf_scratch_gpt.runs import parse_arguments, read_metrics

    settings = ["--model_name_or_path", base, "--dataset", data, "--output_dir", str(folder), "--seed", str(seed)]
    began = time.process_time()
    report = read_metrics(classify.run(parse_arguments(classify.Arguments, [*settings, *flags])))
    return {**report["metrics"], "processor_seconds": time.process_time() - began}


def write_untested_rows(data: str, seeds: int, fraction: float, output: str) -> int:
    """Write the rows whose text none of the seeds holds out; returns their number."""
    from hf_scratch_gpt.data.labelled import load_labelled, split_rows

    rows = load_labelled(data)
    keys = rows.keys()
    tested = {keys[index] for seed in range(seeds) for index in split_rows(rows.labels, fraction, seed, False)[1]}
    kept = [index for index, key in enumerate(keys) if key not in tested]
    with open(output, "w", encoding="utf-8") as file:
        for index in kept:
            file.write(json.dumps({"label": rows.labels[index], "text": rows.texts[index]}) + "\n")
    return len(kept)


def summarise(name: str, results: list[dict[str, Any]], part: str) -> str:
    """A line of the table: each seed's accuracy and F1, means, and standard deviations over the seeds."""
    cells = [name]
    for measure in ("accuracy", "f1"):
        values = [result.get(f"{part}_{measure}", 0.0) for result in results]
        spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
        cells.append(f"{statistics.mean(values):.4f}{spread} ({', '.join(f'{value:.4f}' for value in values)})")
    return "| " + " | ".join(cells) + " |"


def variants_of(options: argparse.Namespace) -> dict[str, list[str]]:
    """Flags of the stage by the name of the row that they make."""
    auxiliary = ["--aux_lm_weight", str(AUXILIARY_WEIGHT)]
    variants = {"labels alone": ["--aux_lm_weight", "0"]}
    if options.aux:
        variants["with the auxiliary loss"] = auxiliary
    if options.keep_duplicates:
        variants["labels alone, duplicates kept"] = ["--deduplicate", "false"]
    return variants


def main() -> None:
    """Train and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="folder of the model to start from")
    parser.add_argument("--data", required=True, help="file of labels and texts")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--heldout-fraction", type=float, default=0.2)
    parser.add_argument("--aux", action="store_true", help="also with the auxiliary loss")
    parser.add_argument("--keep-duplicates", action="store_true", help="also with held-out texts in training")
    parser.add_argument("--validate", action="store_true", help="report a validation part; hold nothing out")
    parser.add_argument("--untested-rows", help="write the rows that no seed holds out, and stop")
    parser.add_argument("--output", help="where the classifiers go (default: a folder that is removed)")
    parser.add_argument("flags", nargs="*", help="settings of the stage, after --")
    options = parser.parse_args()
    if options.untested_rows:
        count = write_untested_rows(options.data, options.seeds, options.heldout_fraction, options.untested_rows)
        print(f"{count} rows that no seed holds out: {options.untested_rows}")
        return
    if not options.base:
        parser.error("--base is missing")
    part, first = ("validation", FIRST_VALIDATION_SEED) if options.validate else ("heldout", 0)
    split = ["--heldout_fraction", str(0 if options.validate else options.heldout_fraction)]
    split += ["--validation_fraction", "0.2"] if options.validate else []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(options.output or temporary)
        print("| trained on | accuracy | F1 |\n| --- | --- | --- |", flush=True)
        for name, flags in variants_of(options).items():
            results = []
            for seed in range(first, first + options.seeds):
                folder = root / f"{name.replace(' ', '-').replace(',', '')}-{seed}"
                results.append(train(options.base, options.data, folder, seed, [*split, *flags, *options.flags]))
            print(summarise(name, results, part), flush=True)
            if any("never_seen_accuracy" in result for result in results):
                seen = [result["never_seen_accuracy"] for result in results if "never_seen_accuracy" in result]
                print(f"{name}: {statistics.mean(seen):.4f} on held-out texts that training has not")
            seconds = statistics.mean(result["processor_seconds"] for result in results)
            print(f"{name}: {seconds:.0f} processor seconds a seed", flush=True)


if __name__ == "__main__":
    main()
