"""SFT, reward model and DPO from a base model on one small file: held-out figures, whatever they honestly are.

    python tests/benchmarks/instructions.py --base runs/quickstart/pretrain --data instructions_with_preferences.json

The file's rows have `instruction`, `input`, `output`, `chosen` and `rejected`. They are shuffled by a fixed seed: 900
to train on, 200 held out, the same for all three stages and all seeds of training. Settings are those of
recipes/instructions. Each stage runs as a user's does; the figures are those of its metrics.json. Beside them stand
the base model's loss before tuning, what always preferring the longer answer gives, and how often the tuned model
finds the chosen answer likelier before DPO. Rows that do not fit the model's context are counted, not cut.
"""

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "instructions"


def split(data: Path, train: int, heldout: int, folder: Path) -> tuple[Path, Path]:
    """Write the rows to train on and those held out, drawn by a fixed seed, as two files."""
    rows = json.loads(data.read_text(encoding="utf-8"))
    if len(rows) < train + heldout:
        raise ValueError(f"{data}: {len(rows)} rows, expected at least {train + heldout}")
    random.Random(0).shuffle(rows)
    paths = folder / "train.json", folder / "heldout.json"
    for path, part in zip(paths, (rows[:train], rows[train : train + heldout]), strict=True):
        path.write_text(json.dumps(part), encoding="utf-8")
    return paths


def run_stage(stage: str, folder: Path, model: Path, files: tuple[Path, Path], seed: int, more: list[str]) -> Any:
    """One stage by its recipe; its metrics, and the seconds that it took."""
    import importlib

    from hf_scratch_gpt.runs import parse_arguments, read_metrics

    module = importlib.import_module(f"hf_scratch_gpt.{'finetuning' if stage == 'sft' else 'alignment'}.{stage}")
    settings = {
        "output_dir": folder,
        "model_name_or_path": model,
        "dataset": files[0],
        "eval_dataset": files[1],
        "seed": seed,
        "allow_dropped_rows": "true",
    }
    flags = [text for name, value in settings.items() for text in (f"--{name}", str(value))]
    started = time.monotonic()
    metrics = read_metrics(
        module.run(parse_arguments(module.Arguments, [str(RECIPES / f"{stage}.yaml"), *flags, *more]))
    )
    return {**metrics["metrics"], "wall_seconds": time.monotonic() - started}


def loss_of(model: Path, heldout: Path) -> dict[str, Any]:
    """The held-out loss of a model as it is."""
    from transformers import AutoModelForCausalLM

    from hf_scratch_gpt.data.conversations import load_conversations
    from hf_scratch_gpt.finetuning.models import context_length, load_model, load_tokenizer
    from hf_scratch_gpt.finetuning.sft import measure_heldout
    from hf_scratch_gpt.finetuning.tokenise import conversation_encoder, tokenise

    tokenizer = load_tokenizer(str(model))
    rows = load_conversations(heldout)
    examples, dropped = tokenise(
        rows, conversation_encoder(tokenizer), str(heldout), context_length(str(model), None), allow_dropped=True
    )
    loaded = load_model(AutoModelForCausalLM, str(model), tokenizer)
    measured = measure_heldout(loaded, examples, tokenizer.pad_token_id, 32)
    return {**measured, "heldout_dropped": dropped, "longest": max(examples["length"])}


def likelier(model: Path, heldout: Path) -> dict[str, Any]:
    """How often a model finds the chosen answer likelier than the rejected one, per answer and per token."""
    from transformers import AutoModelForCausalLM

    from hf_scratch_gpt.data.conversations import load_preferences
    from hf_scratch_gpt.evaluation.intervals import wilson
    from hf_scratch_gpt.evaluation.likelihood import answer_log_probabilities
    from hf_scratch_gpt.finetuning.models import context_length, load_model, load_tokenizer
    from hf_scratch_gpt.finetuning.tokenise import preference_encoder, tokenise

    tokenizer = load_tokenizer(str(model))
    rows = load_preferences(heldout)
    pairs, dropped = tokenise(
        rows, preference_encoder(tokenizer), str(heldout), context_length(str(model), None), allow_dropped=True
    )
    loaded = load_model(AutoModelForCausalLM, str(model), tokenizer)
    scores = []
    for column in ("chosen_ids", "rejected_ids"):
        answers = list(zip(pairs["prompt_ids"], pairs[column], strict=True))
        scores.append(
            [
                (score, len(answer))
                for score, (_, answer) in zip(answer_log_probabilities(loaded, answers, 32), answers, strict=True)
            ]
        )
    whole = wilson(sum(good[0] > bad[0] for good, bad in zip(*scores, strict=True)), len(pairs))
    each = wilson(sum(good[0] / good[1] > bad[0] / bad[1] for good, bad in zip(*scores, strict=True)), len(pairs))
    return {"answer": whole.as_dict(), "token": each.as_dict(), "heldout_pairs_dropped": dropped}


def percent(metrics: dict[str, Any], name: str) -> str:
    low, high = metrics[f"{name}_interval"]
    return f"{metrics[name]:.1%} ({low:.1%} to {high:.1%})"


def loss_text(metrics: dict[str, Any]) -> str:
    low, high = metrics["heldout_loss_interval"]
    return f"{metrics['heldout_loss']:.3f} ({low:.3f} to {high:.3f})"


def tell(result: dict[str, Any]) -> None:
    """The figures as a table, a row for each measure and seed."""
    before, runs = result["base"], result["runs"]
    print("| measure | held out | value (95%) | without training | chance |\n| --- | ---: | ---: | ---: | ---: |")
    for run in runs:
        sft, reward, dpo, prior = run["sft"], run["reward"], run["dpo"], run["likelier"]["answer"]
        longer = f"longer wins {reward['longer_wins_accuracy']:.1%}"
        likely = f"likelier wins {prior['mean']:.1%} ({prior['low']:.1%} to {prior['high']:.1%})"
        rows = [
            ("SFT loss, nats a token", f"{sft['heldout_examples']} answers", loss_text(sft), loss_text(before), ""),
            (
                "reward model, accuracy",
                f"{reward['heldout_pairs']} pairs",
                percent(reward, "heldout_accuracy"),
                longer,
            ),
            ("DPO, preference accuracy", f"{dpo['heldout_pairs']} pairs", percent(dpo, "preference_accuracy"), likely),
        ]
        for name, count, value, without, *chance in rows:
            print(f"| {name}, seed {run['seed']} | {count} | {value} | {without} | {(chance or ['50%'])[0]} |")
    last = runs[-1]
    print(
        f"\nrows that do not fit the context: {last['sft']['dropped_rows']} of the training answers, "
        f"{before['heldout_dropped']} of the held-out ones; {last['reward']['dropped_rows']} of the training pairs, "
        f"{last['likelier']['heldout_pairs_dropped']} of the held-out ones; the longest held-out row has "
        f"{before['longest']} tokens"
    )
    for run in runs:
        seconds = {stage: round(run[stage]["wall_seconds"]) for stage in ("sft", "reward", "dpo")}
        kl = "not measured" if "heldout_kl" not in run["dpo"] else f"{run['dpo']['heldout_kl']:.3f} nats an answer"
        print(
            f"seed {run['seed']}: seconds {seconds}; KL of DPO to its reference: {kl}; the reward model's calibration "
            f"error {run['reward']['expected_calibration_error']:.3f}, correlation of its gap with the difference in "
            f"length {run['reward']['length_difference_correlation']:+.2f}"
        )
    if len(runs) > 1:
        for stage, name in (("sft", "heldout_loss"), ("reward", "heldout_accuracy"), ("dpo", "preference_accuracy")):
            values = [run[stage][name] for run in runs]
            mean, deviation = statistics.mean(values), statistics.stdev(values)
            print(f"{stage} {name}: mean over seeds {mean:.3f}, deviation {deviation:.3f}")


def main() -> None:
    """Run the three stages for each seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, required=True, help="folder of a pretrained model with a chat template")
    parser.add_argument("--data", type=Path, required=True, help="instructions_with_preferences.json")
    parser.add_argument("--train", type=int, default=900, help="rows to train on")
    parser.add_argument("--heldout", type=int, default=200, help="rows held out")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of training; the split is the same")
    parser.add_argument("--work", type=Path, help="folder for the runs; temporary by default")
    parser.add_argument("--json", type=Path, help="write all metrics to this file")
    for stage in ("sft", "reward", "dpo"):
        parser.add_argument(
            f"--{stage}", nargs="*", default=[], metavar="name=value", help=f"other settings of {stage}"
        )
    options = parser.parse_args()
    more = {
        stage: [
            text for pair in getattr(options, stage) for text in ("--" + pair.split("=", 1)[0], pair.split("=", 1)[1])
        ]
        for stage in ("sft", "reward", "dpo")
    }
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        files = split(options.data, options.train, options.heldout, work)
        result: dict[str, Any] = {"base": loss_of(options.base, files[1]), "runs": []}
        for seed in options.seeds:
            folder = work / f"seed-{seed}"
            run: dict[str, Any] = {"seed": seed}
            run["sft"] = run_stage("sft", folder / "sft", options.base, files, seed, more["sft"])
            run["likelier"] = likelier(folder / "sft", files[1])
            for stage in ("reward", "dpo"):
                run[stage] = run_stage(stage, folder / stage, folder / "sft", files, seed, more[stage])
            result["runs"].append(run)
        tell(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
