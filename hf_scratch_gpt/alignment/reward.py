"""A reward model from preferences: `scratch-gpt reward recipe.yaml`.

One score a conversation, trained so that the chosen answer scores above the rejected one (Bradley-Terry; Ouyang et al.
2022, https://huggingface.co/papers/2203.02155), with rewards kept near zero (https://huggingface.co/papers/2312.09244).
It is read at the last token of the conversation as the chat template renders it, as `evaluate` and PPO do.

Preferences are pairs or rankings of K answers (see `rankings`). With `pretraining_dataset` a first pass over weak
preferences comes before them, in the folder `pretraining` of the run: the very same stage, on other data (preference
model pretraining; Askell et al. 2021, https://arxiv.org/abs/2112.00861, section 4).
"""

import dataclasses
import logging
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from accelerate import PartialState
from transformers import AutoModelForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer

from hf_scratch_gpt.alignment.rankings import RankingRewardTrainer, ranking_encoder
from hf_scratch_gpt.alignment.reward_health import ScoredPairs, health_lines, health_metrics, length_warning
from hf_scratch_gpt.data.rows import read_rows
from hf_scratch_gpt.finetuning.arguments import TuningArguments, make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.models import (
    context_length,
    load_model,
    load_tokenizer,
)
from hf_scratch_gpt.finetuning.scoring import score_rewards
from hf_scratch_gpt.finetuning.tokenise import Examples, load_examples
from hf_scratch_gpt.finetuning.trainers import LengthGrouping, run_stage, train_and_save
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation
from hf_scratch_gpt.runs import StageRun, read_metrics
from hf_scratch_gpt.runs.arguments import given_settings

logger = logging.getLogger(__name__)

PRETRAINING_FOLDER = "pretraining"
_FORMS = ("auto", "pairs", "rankings")
_LISTS = ("completions", "answers", "responses")  # columns in which rankings have their answers
_SCALE_ANSWERS = 1000  # so many answers give the deviation to within 2%
# What `metrics.json` tells of the first pass; all of it is in the `metrics.json` of its own folder.
_PRETRAINING_MEASURES = ("pairs", "dropped_rows", "steps", "tokens", "last_train_loss", "heldout_accuracy")


@dataclasses.dataclass
class RewardArguments(TuningArguments, RewardConfig):
    """Settings of `reward`: `TuningArguments` and all of TRL's `RewardConfig`.

    Args:
        center_rewards_coefficient (`float`, *optional*, defaults to `0.01`): Weight of the squared sum of a pair's
            rewards, which the ranking loss leaves free.
        preference_form (`str`, *optional*, defaults to `"auto"`): `"pairs"` of `chosen` and `rejected`, or
            `"rankings"` of `completions`. `"auto"` looks at the first row of a local file and takes pairs of anything
            else.
        margin_scale (`float`, *optional*, defaults to `0.0`): What a pair's margin is multiplied by before it is
            taken off the difference of rewards in the loss (Touvron et al. 2023, https://arxiv.org/abs/2307.09288,
            section 3.2.2). The margin is the row's `margin`, or `score_chosen` less `score_rejected`; in a ranking
            the difference of ranks. 0 leaves margins out.
        pretraining_dataset (`str`, *optional*): Weak preferences for a first pass before `dataset`.
        pretraining_split (`str`, *optional*, defaults to `"train"`): Split of a `datasets` id.
        pretraining_epochs (`float`, *optional*, defaults to `1.0`): Passes over them.
        pretraining_steps (`int`, *optional*, defaults to `0`): Steps of the first pass instead, if above 0.
        pretraining_learning_rate (`float`, *optional*): Learning rate of the first pass; unset: `learning_rate`.
    """

    input_fields: ClassVar[tuple[str, ...]] = (*TuningArguments.input_fields, "pretraining_dataset")

    center_rewards_coefficient: float | None = dataclasses.field(
        default=0.01, metadata={"help": "Weight of the squared sum of a pair's rewards."}
    )
    preference_form: str = dataclasses.field(
        default="auto", metadata={"help": "pairs, rankings, or auto: by the first row of a local file."}
    )
    margin_scale: float = dataclasses.field(
        default=0.0, metadata={"help": "What margins of the data are multiplied by in the loss; 0 leaves them out."}
    )
    pretraining_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "Weak preferences for a first pass before dataset."}
    )
    pretraining_split: str = dataclasses.field(default="train", metadata={"help": "Split of a datasets id."})
    pretraining_epochs: float = dataclasses.field(default=1.0, metadata={"help": "Passes over pretraining_dataset."})
    pretraining_steps: int = dataclasses.field(
        default=0, metadata={"help": "Steps of the first pass; 0: pretraining_epochs decides."}
    )
    pretraining_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "Learning rate of the first pass; unset: learning_rate."}
    )

    def _check(self) -> None:
        super()._check()
        if self.preference_form not in _FORMS:
            raise ValueError(f"'preference_form' is '{self.preference_form}', expected one of {', '.join(_FORMS)}")
        if self.margin_scale < 0:
            raise ValueError(f"'margin_scale' is {self.margin_scale}, expected at least 0")
        if self.pretraining_steps < 0 or self.pretraining_epochs <= 0:
            raise ValueError(
                f"'pretraining_steps' is {self.pretraining_steps} and 'pretraining_epochs' {self.pretraining_epochs}, "
                "expected at least 0 and more than 0"
            )


Arguments = RewardArguments


class PairRewardTrainer(LengthGrouping, RewardTrainer):
    """`RewardTrainer` on pairs that `tokenise` made."""

    def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any):
        self.example_lengths = list(train_dataset["length"])
        super().__init__(*args, train_dataset=train_dataset, **kwargs)


def reward_encoder(tokenizer: Any, margin_scale: float = 0.0) -> Callable[[dict], dict]:
    """Row -> `chosen_ids` and `rejected_ids` (whole conversations as the chat template renders them), `length`.

    With a `margin_scale` other than 0 also `margin`, so many times the row's own.
    """

    def encode(row: dict) -> dict:
        chosen = encode_conversation(tokenizer, row["prompt"] + row["chosen"], tools=row.get("tools"))["input_ids"]
        rejected = encode_conversation(tokenizer, row["prompt"] + row["rejected"], tools=row.get("tools"))["input_ids"]
        if chosen == rejected:
            raise ValueError("'chosen' and 'rejected' are the same")
        margin = {"margin": margin_scale * margin_of(row)} if margin_scale else {}
        return {
            "chosen_ids": chosen,
            "rejected_ids": rejected,
            "length": max(len(chosen), len(rejected)),
            **margin,
        }

    return encode


def margin_of(row: dict) -> float:
    """By how much a row says that `chosen` is better: its `margin`, or `score_chosen` less `score_rejected`.

    Raises:
        ValueError: if it has neither, or if they are no finite numbers from 0 on.
    """
    columns = ("margin",) if row.get("margin") is not None else ("score_chosen", "score_rejected")
    values = []
    for column in columns:
        value = row.get(column)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(
                f"'{column}' is {value!r}, expected a number: 'margin_scale' needs 'margin', or 'score_chosen' and "
                "'score_rejected', in every row"
            )
        values.append(float(value))
    margin = values[0] - sum(values[1:])
    if margin < 0:
        raise ValueError(f"{' and '.join(columns)} give a margin of {margin:g}: the rejected answer would be better")
    return margin


def run(arguments: RewardArguments) -> Path:
    """Train a reward model from `model_name_or_path` on `dataset`; write it merged, with its held-out accuracy.

    Its config carries `reward_mean` and `reward_std`, the rewards of chosen answers that it was trained on, for PPO to
    normalise by: nothing that is held out takes part in training.

    Raises:
        ValueError: for unusable settings, model, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "reward", _train_reward)


def _train_reward(arguments: RewardArguments, stage_run: StageRun) -> None:
    pretraining = _pretrain(arguments, stage_run) if arguments.pretraining_dataset else None
    source = str(stage_run.folder / PRETRAINING_FOLDER) if pretraining else arguments.model_name_or_path
    tokenizer = load_tokenizer(source)
    max_length = context_length(source, arguments.max_length)
    is_ranking = _form(arguments) == "rankings"
    make_encoder = ranking_encoder if is_ranking else reward_encoder
    examples = load_examples(
        arguments,
        "rankings" if is_ranking else "preferences",
        make_encoder(tokenizer, arguments.margin_scale),
        max_length,
        keep_columns=bool(arguments.margin_scale) and not is_ranking,
    )
    trainer = _make_trainer(arguments, stage_run, source, tokenizer, examples)
    sample = best_answers(examples.train.select(range(min(4, len(examples.train)))))
    model, metrics = train_and_save(trainer, stage_run, tokenizer, sample)
    if not stage_run.is_main:
        return
    metrics |= {
        **_describe(examples, is_ranking),
        "rejected_rows": examples.rejected,
        "center_rewards_coefficient": arguments.center_rewards_coefficient,
        "margin_scale": arguments.margin_scale,
        **({"pretraining": pretraining} if pretraining else {}),
    }
    metrics |= _measure(model, examples, tokenizer.pad_token_id, arguments)
    model.config.update({name: metrics[name] for name in ("reward_mean", "reward_std")})
    model.config.save_pretrained(stage_run.folder)
    _tell(stage_run, metrics)
    stage_run.finish(metrics)


def _form(arguments: RewardArguments) -> str:
    """`pairs` or `rankings`."""
    if arguments.preference_form != "auto":
        return arguments.preference_form
    if not Path(arguments.dataset).is_file():
        return "pairs"
    _, row = next(iter(read_rows(Path(arguments.dataset))), ("", {}))
    return "rankings" if "chosen" not in row and any(isinstance(row.get(name), list) for name in _LISTS) else "pairs"


def _pretrain(arguments: RewardArguments, stage_run: StageRun) -> dict[str, Any]:
    """Run the first pass, or what is left of it, and tell what it did."""
    settings = {
        name: value
        for name, value in given_settings(arguments).items()
        if not name.startswith("pretraining_") and name not in ("eval_dataset", "eval_split", "preference_form")
    }
    steps = arguments.pretraining_steps
    settings |= {
        "output_dir": str(stage_run.folder / PRETRAINING_FOLDER),
        "dataset": arguments.pretraining_dataset,
        "dataset_split": arguments.pretraining_split,
        "num_train_epochs": arguments.pretraining_epochs,
        "max_steps": steps if steps else -1,
        "learning_rate": arguments.pretraining_learning_rate or arguments.learning_rate,
    }
    phase = RewardArguments(**settings)
    phase.given = settings  # of which the recipe and the fingerprint are made
    if stage_run.is_main:
        print(
            f"{stage_run.stage}: first pass over the weak preferences of {arguments.pretraining_dataset}", flush=True
        )
    folder = run(phase)
    PartialState().wait_for_everyone()  # the main process writes the folder that all load now
    metrics = read_metrics(folder)["metrics"] if stage_run.is_main else {}
    told = {name: metrics[name] for name in _PRETRAINING_MEASURES if name in metrics}
    return {"dataset": arguments.pretraining_dataset, **told}


def _make_trainer(
    arguments: RewardArguments, stage_run: StageRun, source: str, tokenizer: Any, examples: Examples
) -> Any:
    set_seed(arguments.seed)  # the score head is new
    model = load_model(AutoModelForSequenceClassification, source, tokenizer, num_labels=1)
    options = {
        "model": model,
        # Long rows are gone already; TRL's own filter would look at each again.
        "args": trainer_arguments(arguments, stage_run, max_length=None),
        "train_dataset": examples.train,
        "eval_dataset": examples.heldout,
        "processing_class": tokenizer,
        "peft_config": make_lora_config(arguments, "SEQ_CLS", model, modules_to_save=("score",)),
    }
    if "completion_ids" in examples.train.column_names:
        return RankingRewardTrainer(pad_token_id=tokenizer.pad_token_id, **options)
    return PairRewardTrainer(**options)


def _describe(examples: Examples, is_ranking: bool) -> dict[str, Any]:
    described = {"pairs": len(examples.train), "dropped_rows": examples.dropped}
    if is_ranking:
        sizes = [len(ranks) for ranks in examples.train["ranks"]]
        described["pairs"] = sum(len(better) for better in examples.train["better"])
        described |= {"rankings": len(examples.train), "smallest_ranking": min(sizes), "largest_ranking": max(sizes)}
    return described


def answers_of(example: dict) -> tuple[list[list[int]], list[int], list[int]]:
    """The encoded answers of a pair or a ranking, and the indices of the better and worse one of each pair."""
    if "completion_ids" in example:
        return example["completion_ids"], example["better"], example["worse"]
    return [example["chosen_ids"], example["rejected_ids"]], [0], [1]


def best_answers(examples: Any) -> list[list[int]]:
    """The chosen answer of each pair, and the best-ranked one of each ranking (of several, the first)."""
    if "completion_ids" not in examples.column_names:
        return list(examples["chosen_ids"])
    return [
        answers[ranks.index(min(ranks))]
        for answers, ranks in zip(*(examples[name] for name in ("completion_ids", "ranks")), strict=True)
    ]


def _measure(model: Any, examples: Examples, pad_token_id: int, arguments: RewardArguments) -> dict[str, Any]:
    """The rewards' scale and, if rows were held out, what they tell of the model."""
    batch_size = arguments.per_device_eval_batch_size
    count = min(_SCALE_ANSWERS, len(examples.train))
    drawn = random.Random(arguments.seed).sample(range(len(examples.train)), count)
    reference = best_answers(examples.train.select(drawn))
    scale = reward_scale(score_rewards(model, reference, pad_token_id, batch_size))
    if examples.heldout is None:
        return scale
    pairs, rewards, lengths = score_pairs(model, examples.heldout, pad_token_id, batch_size)
    best = score_rewards(model, best_answers(examples.heldout), pad_token_id, batch_size)
    heldout_scale = {
        f"heldout_{name}": value for name, value in reward_scale(best).items() if name != "reward_answers"
    }
    return {**health_metrics(pairs, rewards, lengths), **scale, **heldout_scale}


def score_pairs(
    model: Any, examples: Any, pad_token_id: int, batch_size: int
) -> tuple[ScoredPairs, list[float], list[int]]:
    """Rewards and lengths of both answers of each pair; then those of each answer once."""
    parts = [answers_of(example) for example in examples]
    rewards = score_rewards(model, [row for rows, _, _ in parts for row in rows], pad_token_id, batch_size)
    lengths = [len(row) for rows, _, _ in parts for row in rows]
    better, worse, prompt, start = [], [], [], 0
    for number, (rows, winners, losers) in enumerate(parts):
        better += [start + index for index in winners]
        worse += [start + index for index in losers]
        prompt += [number] * len(winners)
        start += len(rows)
    reward, length = np.array(rewards), np.array(lengths)
    pairs = ScoredPairs(reward[better], reward[worse], length[better], length[worse], np.array(prompt))
    return pairs, rewards, lengths


def reward_scale(rewards: list[float]) -> dict[str, float]:
    """Mean and standard deviation of the rewards of reference answers: PPO shifts and scales by them."""
    return {
        "reward_mean": float(np.mean(rewards)),
        "reward_std": float(np.std(rewards)),
        "reward_answers": len(rewards),
    }


def _tell(stage_run: StageRun, metrics: dict[str, Any]) -> None:
    if metrics["reward_std"] == 0:
        logger.warning("%s: all answers get the same reward; PPO cannot normalise by it", stage_run.folder)
    if "heldout_accuracy" not in metrics:
        return
    print("\n".join(f"{stage_run.stage}: {line}" for line in health_lines(metrics)), flush=True)
    warning = length_warning(metrics)
    if warning is not None:
        logger.warning("%s %s", stage_run.folder, warning)
