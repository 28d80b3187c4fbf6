"""Train a scaling ladder, predict a larger model's loss, write that down, and only then train the larger model.

The folder of a ladder holds a run folder of the stage `pretrain` for every model, `plan.json` (sizes, tokens, times:
kept, so that a ladder that is taken up again trains the same), `prediction.json` (written before the check run begins)
and `scaling.json` (all of it with the outcome). A model that is already trained is not trained again.
"""

import dataclasses
import hashlib
import json
import logging
import math
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from hf_scratch_gpt.pretraining import scaling
from hf_scratch_gpt.pretraining.arguments import PretrainArguments
from hf_scratch_gpt.pretraining.compute import TOKENS_A_PARAMETER
from hf_scratch_gpt.pretraining.ladder import LadderShapes, Rung, evaluation_seed, short_size
from hf_scratch_gpt.runs import given_settings, read_json, read_metrics, write_json
from hf_scratch_gpt.runs.identity import describe_inputs

logger = logging.getLogger(__name__)

PLAN, PREDICTION, RECORD = "plan.json", "prediction.json", "scaling.json"
DEFAULT_SHARES = (1 / 32, 1 / 16, 1 / 8, 1 / 4)  # of the recipe's model, which the check run then is
_LEAST_TOKENS_A_PARAMETER = 5.0  # below it a budget drops the largest size rather than train all of them shorter
_SECONDS_A_RUN = 3.0  # loading, a checkpoint, saving


@dataclasses.dataclass(frozen=True)
class LadderRequest:
    """What `scratch-gpt scaling` was asked for.

    Args:
        arguments (`PretrainArguments`): The recipe.
        output_dir (`Path`): Folder of the ladder.
        sizes (`tuple[float, ...]`): Parameters of each model; empty for 1/32 to 1/4 of the recipe's.
        count (`str`): Which parameters the law counts: `"non-embedding"` or `"total"`.
        minutes (`float`, *optional*): What all training may take, the check run included.
        tokens_a_parameter (`float`, *optional*): Fixed for all models; without, 20, or what the minutes allow.
        seeds (`int`): Runs of each size.
        check_factor (`float`): The check run's size over the ladder's largest.
        target (`float`, *optional*): Another size to predict, which is not trained.
    """

    arguments: PretrainArguments
    output_dir: Path
    sizes: tuple[float, ...] = ()
    count: str = "non-embedding"
    minutes: float | None = None
    tokens_a_parameter: float | None = None
    seeds: int = 2
    check_factor: float = 4.0
    target: float | None = None


@dataclasses.dataclass(frozen=True)
class _Timed:
    """A rung with what it costs: seconds for each token a parameter, and seconds whatever it is trained on."""

    rung: Rung
    seconds_a_ratio: float
    fixed_seconds: float

    def seconds(self, ratio: float) -> float:
        return self.seconds_a_ratio * ratio + self.fixed_seconds


def _identity(request: LadderRequest) -> str:
    """Digest of what decides a plan; the order in which a plan is made again must not change it."""
    settings = {
        name: value for name, value in given_settings(request.arguments).items() if name not in ("output_dir", "seed")
    }
    asked = {name: value for name, value in vars(request).items() if name not in ("arguments", "output_dir", "target")}
    text = json.dumps([settings, describe_inputs(request.arguments), asked], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Ladder:
    """A ladder from its plan to its outcome.

    Args:
        request (`LadderRequest`): What is asked.

    Raises:
        OSError, ValueError: if the prepared folder or the recipe cannot serve, or the request is out of range.
    """

    def __init__(self, request: LadderRequest):
        from hf_scratch_gpt.evaluation.questions import pick_texts
        from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_text
        from hf_scratch_gpt.pretraining.setup import load_dataset

        self.request, self.folder = request, request.output_dir
        _check(request)
        self.dataset = load_dataset(request.arguments.dataset_dir, request.arguments.context_length)
        arguments = request.arguments
        documents = [text for text in self.dataset.heldout if text]
        texts = pick_texts(documents, arguments.evaluation_bytes, evaluation_seed(arguments))
        if not texts:
            raise ValueError(f"{self.dataset.folder}: has no held-out text, and a loss is measured on that")
        self.heldout_tokens = sum(len(encode_text(self.dataset.tokenizer, text)) for text in texts)
        self.heldout_bytes = sum(len(text.encode("utf-8")) for text in texts)
        self.shapes = LadderShapes(request.arguments, self.dataset, request.count)
        vocabulary = self.shapes.config.vocab_size
        self.even_guess = math.log2(vocabulary) * self.heldout_tokens / self.heldout_bytes  # bits per byte

    def plan(self) -> dict[str, Any]:
        """What will be trained, from `plan.json` if that is of the same request; else chosen now and written."""
        identity, path = _identity(self.request), self.folder / PLAN
        if path.is_file():
            plan = read_json(path)
            if plan.get("identity") == identity:
                return plan
            logger.warning("%s is of another request: planning anew; models that stay the same are kept", path)
        rungs = self._choose_sizes()
        check = self._check_rung(rungs)
        timed = [self._time(rung) for rung in [*rungs, check]]
        kept, check_timed, ratio, left_out = self._fit_budget(timed[:-1], timed[-1])
        runs = self.request.seeds
        plan = {
            "identity": identity,
            "count": self.request.count,
            "tokens_a_parameter": ratio,
            "seeds": [self.request.arguments.seed + number for number in range(runs)],
            "ladder": [self._planned(entry, check_timed, ratio, runs) for entry in kept],
            "check": self._planned(check_timed, check_timed, ratio, 1),
            "left_out": [entry.rung.size(self.request.count) for entry in left_out],
            "budget_minutes": self.request.minutes,
            "training_tokens": self.dataset.manifest["splits"]["train"]["tokens"],
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(path, plan)
        return plan

    def _choose_sizes(self) -> list[Rung]:
        recipe = self.shapes.recipe_rung.size(self.request.count)
        sizes = self.request.sizes or tuple(share * recipe for share in DEFAULT_SHARES)
        rungs = sorted({self.shapes.nearest(size) for size in sizes}, key=lambda rung: rung.width)
        if len(rungs) < scaling.MIN_SIZES:
            widths = ", ".join(str(rung.width) for rung in rungs)
            raise ValueError(
                f"--sizes: {len(sizes)} sizes make {len(rungs)} different models (width {widths}), expected at least "
                f"{scaling.MIN_SIZES}: name sizes that are further apart"
            )
        return rungs

    def _check_rung(self, rungs: list[Rung]) -> Rung:
        largest = rungs[-1].size(self.request.count)
        rung = self.shapes.nearest(self.request.check_factor * largest)
        if rung.width <= rungs[-1].width:
            raise ValueError(
                f"--check-factor {self.request.check_factor:g} gives no larger model than the ladder's largest"
            )
        scaling.check_extrapolation(largest, rung.size(self.request.count))
        if self.request.target is not None:
            scaling.check_extrapolation(largest, self.request.target)
        return rung

    def _time(self, rung: Rung) -> _Timed:
        from hf_scratch_gpt.pretraining.speed import measure_speed

        settings = self.shapes.settings(rung, 0, self.request.arguments.seed, str(self.folder))  # at the whole batch
        speed = measure_speed(settings, self.dataset)
        # Windows overlap by half and the model is measured untrained and trained: about four passes.
        fixed = _SECONDS_A_RUN + 4 * self.heldout_tokens / speed.measuring
        return _Timed(rung, rung.size(self.request.count) / speed.training, fixed)

    def _fit_budget(self, ladder: list[_Timed], check: _Timed) -> tuple[list[_Timed], _Timed, float, list[_Timed]]:
        """The sizes and the tokens a parameter that the budget allows, and the sizes that it does not."""
        request = self.request
        left_out: list[_Timed] = []
        wanted = request.tokens_a_parameter or float(TOKENS_A_PARAMETER)
        if request.minutes is None:
            return ladder, check, wanted, []
        least = request.tokens_a_parameter or _LEAST_TOKENS_A_PARAMETER
        while True:
            costs = [*ladder * request.seeds, check]
            left = 60 * request.minutes - sum(cost.fixed_seconds for cost in costs)
            ratio = min(wanted, left / sum(cost.seconds_a_ratio for cost in costs))
            if ratio >= least:
                return ladder, check, wanted if ratio == wanted else float(f"{ratio:.3g}"), left_out
            if len(ladder) == scaling.MIN_SIZES:
                needed = sum(cost.seconds(least) for cost in costs) / 60
                raise ValueError(
                    f"--budget {request.minutes:g} minutes: the {scaling.MIN_SIZES} smallest sizes and their check "
                    f"run need about {needed:.1f} at {least:g} tokens a parameter; raise it or name smaller sizes"
                )
            left_out.append(ladder[-1])
            ladder = ladder[:-1]
            check = self._time(self._check_rung([entry.rung for entry in ladder]))

    def _planned(self, timed: _Timed, check: _Timed, ratio: float, runs: int) -> dict[str, Any]:
        rung, size = timed.rung, timed.rung.size(self.request.count)
        most = ratio * check.rung.size(self.request.count)
        settings = self.shapes.settings(rung, ratio * size, self.request.arguments.seed, str(self.folder), most)
        return {
            "width": rung.width,
            "size": size,
            "parameters": rung.parameters,
            "non_embedding": rung.size("non-embedding"),
            "steps": settings.max_steps,
            "batch_size": settings.batch_size,
            "expected_seconds": round(runs * timed.seconds(ratio), 1),
        }

    def train(self, plan: dict[str, Any], planned: dict[str, Any], seed: int, prefix: str = "") -> dict[str, Any]:
        """Train a model of the plan, or find it trained; returns what is known of the run."""
        import torch

        from hf_scratch_gpt.pretraining import pretrain
        from hf_scratch_gpt.runs.hardware import release_freed_memory

        rung = self.shapes.rung(planned["width"])
        folder = self.run_folder(planned, seed, prefix)
        torch.compiler.reset()  # compiled code of the model before is of no use, and there is a limit to it
        ratio = plan["tokens_a_parameter"]
        most = ratio * plan["check"]["size"]
        settings = self.shapes.settings(rung, ratio * planned["size"], seed, str(folder), most)
        pretrain.run(settings)
        release_freed_memory()
        metrics = read_metrics(folder)["metrics"]
        bits = metrics["heldout_bits_per_byte"]
        return {
            **{name: planned[name] for name in ("width", "size", "parameters", "non_embedding")},
            "seed": seed,
            "folder": folder.name,
            "tokens": metrics["tokens"],
            "seconds": metrics["seconds"],
            "batch_size": settings.batch_size,
            "learning_rate": settings.learning_rate,
            "bits_per_byte": bits,
            "nats_a_token": bits * self.nats_a_token,
            "skipped_updates": metrics["skipped_updates"],
        }

    def run_folder(self, planned: dict[str, Any], seed: int, prefix: str = "") -> Path:
        """Where the run of a planned model goes."""
        return self.folder / f"{prefix}{short_size(planned['size'])}-width{planned['width']}-seed{seed}"

    @property
    def nats_a_token(self) -> float:
        """Nats a token of a bit a byte on this held-out text."""
        return math.log(2) * self.heldout_bytes / self.heldout_tokens

    def predict(self, plan: dict[str, Any], runs: list[dict[str, Any]]) -> dict[str, Any]:
        """Fit the law and write what it predicts of the check run (and of the target) to `prediction.json`.

        If the check run has begun, the record says whether this very prediction was written before that.
        """
        path = self.folder / PREDICTION
        told = make_prediction(plan, runs, self.request.target, self.even_guess, self.nats_a_token)
        check = self.run_folder(plan["check"], plan["seeds"][0], "check-")
        told["made_before_check"] = not check.exists()
        told["made_at"] = datetime.now(timezone.utc).isoformat(timespec="seconds")
        if path.is_file():
            earlier = read_json(path)
            if all(earlier.get(name) == told[name] for name in ("check", "law")):
                told |= {name: earlier[name] for name in ("made_before_check", "made_at")}
        write_json(path, told)
        return told

    def finish(
        self, plan: dict[str, Any], runs: list[dict[str, Any]], prediction: dict[str, Any], check: dict[str, Any]
    ) -> dict[str, Any]:
        """Hold the check run against its prediction and write `scaling.json`."""
        told = prediction["check"]
        record = {
            "recipe": given_settings(self.request.arguments),
            "plan": plan,
            "runs": runs,
            "prediction": prediction,
            "check": check,
            "error": told["bits_per_byte"] / check["bits_per_byte"] - 1,
            "inside_interval": told["low"] <= check["bits_per_byte"] <= told["high"],
        }
        write_json(self.folder / RECORD, record)
        return record


def _check(request: LadderRequest) -> None:
    """Refuse what cannot work before anything is loaded."""
    arguments = request.arguments
    if arguments.objective != "causal":
        raise ValueError(f"objective is '{arguments.objective}': only a causal model's bits per byte are predicted")
    if request.sizes and len(set(request.sizes)) < scaling.MIN_SIZES:
        raise ValueError(
            f"--sizes names {len(set(request.sizes))} sizes, expected at least {scaling.MIN_SIZES}: two points fit "
            "any law"
        )
    if request.seeds < 1:
        raise ValueError(f"--seeds is {request.seeds}, expected at least 1")
    for flag, value in (("budget", request.minutes), ("tokens-per-parameter", request.tokens_a_parameter)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{flag} is {value}, expected a number above 0")
    if not 1 < request.check_factor <= scaling.MAX_EXTRAPOLATION:
        raise ValueError(
            f"--check-factor is {request.check_factor:g}, expected more than 1 and at most "
            f"{scaling.MAX_EXTRAPOLATION:g}: a fit is not trusted further"
        )
    if request.sizes and request.target is not None:
        scaling.check_extrapolation(max(request.sizes), request.target)


def make_prediction(
    plan: dict[str, Any], runs: list[dict[str, Any]], target: float | None, even_guess: float, nats_a_token: float
) -> dict[str, Any]:
    """What the runs of a ladder predict of its check run, as JSON has it; losses are bits per byte.

    Args:
        plan (`dict`), runs (`list[dict]`): What was planned and what came of it.
        target (`float`, *optional*): Another size to predict.
        even_guess (`float`): The loss of an even guess among all tokens, the law's ceiling.
        nats_a_token (`float`): Nats a token of a bit a byte.

    Raises:
        ValueError: as `hf_scratch_gpt.pretraining.scaling.predict`.
    """
    sizes, losses = [run["size"] for run in runs], [run["bits_per_byte"] for run in runs]
    check = scaling.predict(sizes, losses, plan["check"]["size"], even_guess)
    warnings = [
        f"the ladder is not monotone: {short_size(large)} is no better than {short_size(small)}; its law is doubtful"
        for small, large in scaling.rises(sizes, losses)
    ]
    return {
        "check": _prediction(check, nats_a_token),
        "target": None
        if target is None
        else _prediction(scaling.predict(sizes, losses, target, even_guess), nats_a_token),
        "law": {
            **dataclasses.asdict(check.law),
            "exponent_low": check.exponent_low,
            "exponent_high": check.exponent_high,
            "deviation": scaling.deviation(sizes, losses, even_guess),
            "deviation_by_count": {
                name: scaling.deviation([run[field] for run in runs], losses, even_guess)
                for name, field in (("non-embedding", "non_embedding"), ("total", "parameters"))
            },
            "backtest": scaling.backtest(sizes, losses, even_guess),
            "without_ceiling": _without_ceiling(sizes, losses, plan["check"]["size"]),
        },
        "runs": len(runs),
        "warnings": warnings,
    }


def _without_ceiling(sizes: list[float], losses: list[float], size: float) -> dict[str, Any]:
    """What the plain power law says, which bends where the small models' loss is near an even guess."""
    return {
        "bits_per_byte": scaling.fit_power_law(sizes, losses).loss(size),
        "deviation": scaling.deviation(sizes, losses),
        "backtest": scaling.backtest(sizes, losses),
    }


def _prediction(prediction: scaling.Prediction, nats_a_token: float) -> dict[str, Any]:
    return {
        "size": prediction.size,
        "bits_per_byte": prediction.loss,
        "low": prediction.low,
        "high": prediction.high,
        "nats_a_token": prediction.loss * nats_a_token,
        "extrapolation": prediction.extrapolation,
    }
