"""A reward model from preferences: `scratch-gpt reward recipe.yaml`.

One score a conversation, trained so that the chosen answer scores above the rejected one (Bradley-Terry; Ouyang et al.
2022, https://huggingface.co/papers/2203.02155), with rewards kept near zero (https://huggingface.co/papers/2312.09244).
It is read at the last token of the conversation as the chat template renders it, as `evaluate` and PPO do.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForSequenceClassification, set_seed
from trl import RewardConfig, RewardTrainer

from hf_scratch_gpt.evaluation.intervals import wilson
from hf_scratch_gpt.finetuning.arguments import TuningArguments, make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.models import (
    context_length,
    load_model,
    load_tokenizer,
)
from hf_scratch_gpt.finetuning.scoring import score_rewards
from hf_scratch_gpt.finetuning.tokenise import Examples, load_examples
from hf_scratch_gpt.finetuning.trainers import LengthGrouping, train_and_save
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation
from hf_scratch_gpt.runs import StageRun

CHANCE = 0.5
_SCALE_PAIRS = 1000  # so many answers give the deviation to within 2%


@dataclasses.dataclass
class RewardArguments(TuningArguments, RewardConfig):
    """Settings of `reward`: `TuningArguments` and all of TRL's `RewardConfig`.

    Args:
        center_rewards_coefficient (`float`, *optional*, defaults to `0.01`): Weight of the squared sum of a pair's
            rewards, which the ranking loss leaves free.
    """

    center_rewards_coefficient: float | None = dataclasses.field(
        default=0.01, metadata={"help": "Weight of the squared sum of a pair's rewards."}
    )


Arguments = RewardArguments


class PairRewardTrainer(LengthGrouping, RewardTrainer):
    """`RewardTrainer` on pairs that `tokenise` made."""

    def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any):
        self.example_lengths = list(train_dataset["length"])
        super().__init__(*args, train_dataset=train_dataset, **kwargs)


def reward_encoder(tokenizer: Any) -> Callable[[dict], dict]:
    """Row -> `chosen_ids` and `rejected_ids` (whole conversations as the chat template renders them), `length`."""

    def encode(row: dict) -> dict:
        chosen = encode_conversation(tokenizer, row["prompt"] + row["chosen"], tools=row.get("tools"))["input_ids"]
        rejected = encode_conversation(tokenizer, row["prompt"] + row["rejected"], tools=row.get("tools"))["input_ids"]
        if chosen == rejected:
            raise ValueError("'chosen' and 'rejected' are the same")
        return {"chosen_ids": chosen, "rejected_ids": rejected, "length": max(len(chosen), len(rejected))}

    return encode


def run(arguments: RewardArguments) -> Path:
    """Train a reward model from `model_name_or_path` on `dataset`; write it merged, with its held-out accuracy.

    Its config carries `reward_mean` and `reward_std`, the rewards of chosen answers that it was trained on, for PPO to
    normalise by: nothing that is held out takes part in training.

    Raises:
        ValueError: for unusable settings, model, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    arguments.check_inputs()
    with StageRun(arguments, "reward") as stage_run:
        if not stage_run.finished:
            _train_reward(arguments, stage_run)
        return stage_run.folder


def _train_reward(arguments: RewardArguments, stage_run: StageRun) -> None:
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    max_length = context_length(arguments.model_name_or_path, arguments.max_length)
    pairs = load_examples(arguments, "preferences", reward_encoder(tokenizer), max_length)

    set_seed(arguments.seed)  # the score head is new
    model = load_model(AutoModelForSequenceClassification, arguments.model_name_or_path, tokenizer, num_labels=1)
    trainer = PairRewardTrainer(
        model=model,
        # Long pairs are gone already; TRL's own filter would look at each row again.
        args=trainer_arguments(arguments, stage_run, max_length=None),
        train_dataset=pairs.train,
        eval_dataset=pairs.heldout,
        processing_class=tokenizer,
        peft_config=make_lora_config(arguments, "SEQ_CLS", model, modules_to_save=("score",)),
    )
    sample = pairs.train[: min(4, len(pairs.train))]["chosen_ids"]
    model, metrics = train_and_save(trainer, stage_run, tokenizer, sample)
    if not stage_run.is_main:
        return
    metrics |= {
        "pairs": len(pairs.train),
        "dropped_rows": pairs.dropped,
        "rejected_rows": pairs.rejected,
        "center_rewards_coefficient": arguments.center_rewards_coefficient,
    }
    metrics |= _measure(model, pairs, tokenizer.pad_token_id, arguments.per_device_eval_batch_size)
    model.config.update({name: metrics[name] for name in ("reward_mean", "reward_std")})
    model.config.save_pretrained(stage_run.folder)
    stage_run.finish(metrics)


def _measure(model: Any, pairs: Examples, pad_token_id: int, batch_size: int) -> dict[str, Any]:
    """The rewards' scale and, if pairs were held out, the accuracy on them."""
    reference = pairs.train[: min(_SCALE_PAIRS, len(pairs.train))]["chosen_ids"]
    scale = reward_scale(score_rewards(model, reference, pad_token_id, batch_size))
    if pairs.heldout is None:
        return scale
    chosen, rejected = score_pairs(model, pairs.heldout, pad_token_id, batch_size)
    return {**ranking_metrics(chosen, rejected, pairs.heldout), **scale}


def score_pairs(model: Any, pairs: Any, pad_token_id: int, batch_size: int) -> tuple[list[float], list[float]]:
    """The rewards of the chosen and of the rejected answers."""
    rows = list(pairs["chosen_ids"]) + list(pairs["rejected_ids"])
    rewards = score_rewards(model, rows, pad_token_id, batch_size)
    return rewards[: len(pairs)], rewards[len(pairs) :]


def reward_scale(chosen: list[float]) -> dict[str, float]:
    """Mean and standard deviation of the rewards of chosen answers: PPO shifts and scales by them."""
    return {"reward_mean": float(np.mean(chosen)), "reward_std": float(np.std(chosen))}


def ranking_metrics(chosen: list[float], rejected: list[float], pairs: Any) -> dict[str, Any]:
    """Accuracy (a tie is wrong) with Wilson's 95% interval, margin, and how far the reward follows mere length."""
    accuracy = wilson(sum(good > bad for good, bad in zip(chosen, rejected, strict=True)), len(chosen))
    lengths = [len(row) for row in pairs["chosen_ids"]] + [len(row) for row in pairs["rejected_ids"]]
    return {
        "heldout_accuracy": accuracy.mean,
        "heldout_accuracy_interval": [accuracy.low, accuracy.high],
        "heldout_pairs": accuracy.n,
        "chance": CHANCE,
        "heldout_margin": float(np.mean(np.subtract(chosen, rejected))),
        "length_correlation": correlation(chosen + rejected, lengths),
    }


def correlation(first: list[float], second: list[int]) -> float | None:
    """Pearson's correlation, or `None` where one side does not vary."""
    if np.std(first) == 0 or np.std(second) == 0:
        return None
    value = float(np.corrcoef(first, second)[0, 1])
    return value if math.isfinite(value) else None
