"""The row of ours: the stage `pretrain` itself, called as the command line calls it."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from pretrain_request import HeldOut, Request, describe, finish, peak_memory
from pretrain_watch import Watch

from hf_scratch_gpt import cli
from hf_scratch_gpt.pretraining import interim, pretrain
from hf_scratch_gpt.pretraining.schedules import Budget
from hf_scratch_gpt.runs import read_metrics


def stage_flags(request: Request, folder: Path) -> list[str]:
    """The command line of the stage: the shape, the batch and the budget, the rest at its defaults.

    The settings in `ours` win; its `model_overrides` are added to the shape's, or to its `preset`'s if it names one.
    """
    given = dict(request.ours)
    fields = {**request.size.modern_fields, "max_position_embeddings": request.size.context_length}
    overrides = ",".join(f"{name}={value}" for name, value in fields.items())
    if "preset" in given:  # whose shape it is
        overrides = given.pop("model_overrides", "")
    elif "model_overrides" in given:
        overrides += "," + given.pop("model_overrides")
    settings: dict[str, Any] = {
        "output_dir": folder,
        "dataset_dir": request.dataset_dir,
        "model_overrides": overrides,
        "context_length": request.size.context_length,
        "batch_size": request.batch_size,
        "gradient_accumulation_steps": request.accumulation,
        "seed": request.seed,
        "logging_steps": 1,
    }
    if request.seconds:
        settings |= {"max_minutes": request.seconds / 60, "evaluation_bytes": request.curve_bytes}
    else:
        # A few steps would not pay for compiling, but it is a long run's speed that is asked for.
        settings |= {"max_steps": request.total_steps, "compile": "true"}
        settings |= {"evaluation_bytes": 2000, "evaluation_batch_size": 1}
    settings |= given
    return [str(part) for name, value in settings.items() for part in (f"--{name}", value)]


@contextlib.contextmanager
def training_time_only(watch: Watch, heldout: HeldOut) -> Iterator[None]:
    """Give the stage the watch's clock, so that it trains for as long as the other rows do.

    Its own clock begins with the stage and counts loading, evaluation and saving. With this one, time begins before
    compiling and stands still during evaluation, which comes by time and is on the benchmark's documents.
    """
    stage = pretrain._Pretraining
    compile_model, evaluate = stage._compile, stage._evaluate

    def compile_by_the_watch(self: Any) -> bool:
        watch.start()
        return compile_model(self)

    def evaluate_off_the_clock(self: Any) -> dict[str, Any]:
        self.documents = heldout.some
        now = watch.elapsed()
        with watch.paused():
            measured = evaluate(self)
        if now:  # not of the untrained model
            watch.curve.append((now, measured["mean"]))
        return measured

    with (
        mock.patch.object(stage, "_compile", compile_by_the_watch),
        mock.patch.object(stage, "_evaluate", evaluate_off_the_clock),
        mock.patch.object(stage, "_clock", side_effect=watch.elapsed),
        mock.patch.object(stage, "_make_budget", return_value=Budget(seconds=watch.seconds)),
        mock.patch.object(interim.Interim, "due", lambda self, step: step > 0 and watch.due()),
    ):
        yield


def _step_seconds(folder: Path, tokens_per_step: int) -> list[float]:
    """Seconds of each step, from the curve's rate in each line."""
    rows = [json.loads(line) for line in (folder / "curve.jsonl").read_text(encoding="utf-8").splitlines()]
    return [tokens_per_step / row["tokens_per_second"] for row in rows if "tokens_per_second" in row]


def train_ours(request: Request) -> dict[str, Any]:
    """Run the stage, and read its curve and metrics.

    Raises:
        RuntimeError: if the command did not end with 0.
    """
    from transformers import AutoModelForCausalLM

    folder = Path(request.work) / "ours"
    heldout = HeldOut(request) if request.seconds else None
    watch = Watch(request.total_steps, request.seconds, request.interval)
    with training_time_only(watch, heldout) if heldout else contextlib.nullcontext():
        status = cli.main(["pretrain", *stage_flags(request, folder)])
    if status:
        raise RuntimeError(f"scratch-gpt pretrain ended with {status}")
    memory = peak_memory(request.device)
    metrics = read_metrics(folder)["metrics"]
    tokens_per_step = int(request.ours.get("batch_size", request.batch_size)) * request.size.context_length
    watch.step_seconds = _step_seconds(folder, tokens_per_step)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(request.device)
    result = {**describe(model, request.size), **finish(request, watch, False), "peak_rss_bytes": memory}
    result |= {
        "tokens_per_step": tokens_per_step,
        "steps": metrics["steps"],
        "compile_seconds": metrics["compile_seconds"],
    }
    chosen = ("precision", "compiled", "optimizer")
    result["chosen"] = {name: metrics[name] for name in chosen if name in metrics}
    if heldout is None:
        return result | {"training_seconds": metrics["seconds"]}
    last = watch.curve[-1][0]
    return result | {
        "training_seconds": last,
        "curve": watch.curve,
        "bits_per_byte": heldout.measure(model, heldout.all),
    }
