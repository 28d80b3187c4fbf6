"""Direct preference optimisation: `scratch-gpt dpo recipe.yaml`.

The policy's implicit reward of an answer is beta times how much likelier it became than under the reference; DPO
trains the chosen answer's above the rejected one's (Rafailov et al. 2023, https://huggingface.co/papers/2305.18290).
The reference is the model that tuning starts from: with LoRA, the same weights with the adapter switched off.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from hf_scratch_gpt.alignment.own_answers import OwnAnswersArguments, own_preferences
from hf_scratch_gpt.alignment.reward_health import CHANCE
from hf_scratch_gpt.evaluation.intervals import wilson
from hf_scratch_gpt.evaluation.likelihood import answer_log_probabilities
from hf_scratch_gpt.finetuning._compat import score_only_trained_positions
from hf_scratch_gpt.finetuning.arguments import TuningArguments, make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.models import (
    context_length,
    load_model,
    load_tokenizer,
)
from hf_scratch_gpt.finetuning.tokenise import load_examples, preference_encoder
from hf_scratch_gpt.finetuning.trainers import LengthGrouping, run_stage, train_and_save
from hf_scratch_gpt.runs import StageRun


@dataclasses.dataclass
class DPOArguments(OwnAnswersArguments, TuningArguments, DPOConfig):
    """Settings of `dpo`: `OwnAnswersArguments`, `TuningArguments` and all of TRL's `DPOConfig` (`beta`, ...).

    `precompute_ref_log_probs` scores the reference once instead of each epoch: it pays from the second epoch on.
    """

    def check_inputs(self) -> None:
        """Refuse settings without a model or data, or that make no pairs.

        Raises:
            ValueError: naming the setting.
        """
        super().check_inputs()
        self.check_own_answers()


Arguments = DPOArguments


class PairDPOTrainer(LengthGrouping, DPOTrainer):
    """`DPOTrainer` on pairs that `tokenise` made: it would encode text by itself, control tokens in it included."""

    def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any):
        self.example_lengths = list(train_dataset["length"])
        score_only_trained_positions()
        super().__init__(*args, train_dataset=train_dataset, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def run(arguments: DPOArguments) -> Path:
    """Align `model_name_or_path` on the preferences of `dataset`; write a complete model folder.

    Raises:
        ValueError: for unusable settings, model, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "dpo", _align)


def _align(arguments: DPOArguments, stage_run: StageRun) -> None:
    source = arguments.model_name_or_path
    tokenizer = load_tokenizer(source)
    max_length = context_length(source, arguments.max_length)
    model = load_model(AutoModelForCausalLM, source, tokenizer)
    own = own_preferences(arguments, model, tokenizer, stage_run) if arguments.own_answer_questions else None
    pairs = load_examples(arguments, "preferences", preference_encoder(tokenizer), max_length, own)

    trainer = PairDPOTrainer(
        model=model,
        args=trainer_arguments(arguments, stage_run, max_length),
        train_dataset=pairs.train,
        eval_dataset=pairs.heldout,
        processing_class=tokenizer,
        peft_config=make_lora_config(arguments, "CAUSAL_LM", model),
    )
    first = pairs.train[: min(4, len(pairs.train))]
    sample = [prompt + answer for prompt, answer in zip(first["prompt_ids"], first["chosen_ids"], strict=True)]
    model, metrics = train_and_save(trainer, stage_run, tokenizer, sample)
    if not stage_run.is_main:
        return
    metrics |= {"pairs": len(pairs.train), "dropped_rows": pairs.dropped, "beta": arguments.beta}
    metrics["preferences"] = "dataset" if own is None else "own answers"
    if pairs.heldout is not None:
        reference = load_model(AutoModelForCausalLM, source).to(model.device)
        options = (arguments.beta, arguments.per_device_eval_batch_size)
        chosen = implicit_rewards(model, reference, pairs.heldout, "chosen_ids", *options)
        rejected = implicit_rewards(model, reference, pairs.heldout, "rejected_ids", *options)
        metrics |= preference_metrics(chosen, rejected)
    stage_run.finish(metrics)


def implicit_rewards(
    policy: Any, reference: Any, pairs: Any, column: str, beta: float, batch_size: int
) -> list[float]:
    """beta (log policy(answer) - log reference(answer)) of each answer, summed over its tokens; end token included."""
    answers = list(zip(pairs["prompt_ids"], pairs[column], strict=True))
    ours = answer_log_probabilities(policy, answers, batch_size)
    theirs = answer_log_probabilities(reference, answers, batch_size)
    return [beta * (mine - other) for mine, other in zip(ours, theirs, strict=True)]


def preference_metrics(chosen: list[float], rejected: list[float]) -> dict[str, Any]:
    """How often the implicit reward prefers the chosen answer (a tie is wrong), and by how much."""
    margins = np.subtract(chosen, rejected)
    accuracy = wilson(int((margins > 0).sum()), len(margins))
    return {
        "preference_accuracy": accuracy.mean,
        "preference_accuracy_interval": [accuracy.low, accuracy.high],
        "heldout_pairs": accuracy.n,
        "chance": CHANCE,
        "heldout_margin": float(margins.mean()),
        "heldout_chosen_reward": float(np.mean(chosen)),
        "heldout_rejected_reward": float(np.mean(rejected)),
    }
