"""Kahneman-Tversky optimisation: `scratch-gpt kto recipe.yaml`.

No pairs are needed: each answer is by itself desirable or not, and is pushed above or below the KL between policy and
reference, which is estimated from answers to other prompts (Ethayarajh et al. 2024,
https://huggingface.co/papers/2402.01306).

`dataset` has rows of a prompt, a completion and `label` (true or false), or preferences, of which both answers are
taken by themselves; or the policy answers training questions itself and the checker labels what it said.
"""

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoModelForCausalLM
from trl import KTOConfig, KTOTrainer

from hf_scratch_gpt.alignment.dpo import implicit_rewards, preference_metrics
from hf_scratch_gpt.alignment.measuring import keep_fitting
from hf_scratch_gpt.alignment.own_answers import OwnAnswersArguments
from hf_scratch_gpt.alignment.sampling import sample_answers, unique_prompts
from hf_scratch_gpt.data.tasks import is_exact
from hf_scratch_gpt.evaluation.questions import pick, with_answers
from hf_scratch_gpt.finetuning._compat import score_only_trained_positions, unpaired_collator
from hf_scratch_gpt.finetuning.arguments import TuningArguments, make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.models import context_length, load_model, load_tokenizer
from hf_scratch_gpt.finetuning.tokenise import AnswerEncoder, Examples, load_examples, preference_encoder, tokenise
from hf_scratch_gpt.finetuning.trainers import LengthGrouping, run_stage, train_and_save
from hf_scratch_gpt.runs import StageRun

logger = logging.getLogger(__name__)

_LABELS = {True: True, False: False, "true": True, "false": False}  # 1 and 0 are keys too: they equal True and False


@dataclasses.dataclass
class KTOArguments(OwnAnswersArguments, TuningArguments, KTOConfig):
    """Settings of `kto`: `OwnAnswersArguments`, `TuningArguments` and all of TRL's `KTOConfig` (`beta`, ...).

    Args:
        balance_labels (`bool`, *optional*, defaults to `True`): Where there are more answers of one label than of the
            other, weigh the fewer ones up until both weigh the same; off leaves `desirable_weight` and
            `undesirable_weight` as they are.
    """

    balance_labels: bool = dataclasses.field(
        default=True, metadata={"help": "Weigh the label with fewer answers up until both weigh the same."}
    )

    def check_inputs(self) -> None:
        """Refuse settings without a model or data, or that cannot work.

        Raises:
            ValueError: naming the setting.
        """
        super().check_inputs()
        self.check_own_answers()
        if self.precompute_ref_log_probs:
            raise ValueError("'precompute_ref_log_probs' is not supported: the KL term's pairs change with the batch")


Arguments = KTOArguments


class UnpairedKTOTrainer(LengthGrouping, KTOTrainer):
    """`KTOTrainer` on answers that `tokenise` made, in batches of like length.

    TRL pairs each answer with another prompt of its batch once, before training, and so must read the rows in one
    fixed order, epoch for epoch. Here the pairs are made when a batch is, so any order will do.
    """

    def __init__(self, *args: Any, train_dataset: Any, processing_class: Any, **kwargs: Any):
        self.example_lengths = list(train_dataset["length"])
        score_only_trained_positions()
        with_kl = kwargs["args"].loss_type != "apo_zero_unpaired"
        collator = unpaired_collator(
            processing_class.pad_token_id, kwargs["args"].pad_to_multiple_of, pair_up if with_kl else None
        )
        super().__init__(
            *args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=collator,
            **kwargs,
        )

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset


def pair_up(prompts: list[list[int]]) -> list[int]:
    """For each row of a batch the row whose answer stands in for one to another prompt: all rows moved by one number.

    The two answers of a preference are often neighbours, as they are of like length: the number is the nearest to half
    the batch that pairs the fewest rows with an answer to their own prompt.
    """
    size = len(prompts)
    shifts = sorted(range(1, size), key=lambda shift: abs(shift - size / 2)) or [0]

    def own_prompts(shift: int) -> int:
        return sum(prompts[row] == prompts[(row + shift) % size] for row in range(size))

    best = min(shifts, key=own_prompts)
    return [(row + best) % size for row in range(size)]


def run(arguments: KTOArguments) -> Path:
    """Align `model_name_or_path` on the labelled answers of `dataset`; write a complete model folder.

    Raises:
        ValueError: for unusable settings, model, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "kto", _align)


def _align(arguments: KTOArguments, stage_run: StageRun) -> None:
    source = arguments.model_name_or_path
    tokenizer = load_tokenizer(source)
    max_length = context_length(source, arguments.max_length)
    model = load_model(AutoModelForCausalLM, source, tokenizer)
    settings = trainer_arguments(arguments, stage_run, max_length)
    own = own_labelled(arguments, model, tokenizer, stage_run) if arguments.own_answer_questions else None
    answers, pairs = load_answers(arguments, tokenizer, max_length, own)
    desirable = sum(answers.train["label"])
    weights = label_weights(arguments, desirable, len(answers.train) - desirable)
    settings.desirable_weight, settings.undesirable_weight = weights
    trainer = UnpairedKTOTrainer(
        model=model,
        args=settings,
        train_dataset=answers.train,
        eval_dataset=answers.heldout,
        processing_class=tokenizer,
        peft_config=make_lora_config(arguments, "CAUSAL_LM", model),
    )
    first = answers.train[: min(4, len(answers.train))]
    sample = [prompt + answer for prompt, answer in zip(first["prompt_ids"], first["completion_ids"], strict=True)]
    model, metrics = train_and_save(trainer, stage_run, tokenizer, sample)
    if not stage_run.is_main:
        return
    metrics |= {"answers": len(answers.train), "desirable_answers": desirable, "dropped_rows": answers.dropped}
    metrics |= {"beta": arguments.beta, "desirable_weight": weights[0], "undesirable_weight": weights[1]}
    metrics["labels"] = "dataset" if own is None else "own answers"
    if answers.heldout is not None:
        reference = load_model(AutoModelForCausalLM, source).to(model.device)
        options = (arguments.beta, arguments.per_device_eval_batch_size)
        if pairs is not None:
            chosen = implicit_rewards(model, reference, pairs, "chosen_ids", *options)
            rejected = implicit_rewards(model, reference, pairs, "rejected_ids", *options)
            metrics |= preference_metrics(chosen, rejected)
        rewards = implicit_rewards(model, reference, answers.heldout, "completion_ids", *options)
        metrics |= label_metrics(rewards, answers.heldout["label"])
    stage_run.finish(metrics)


def own_labelled(arguments: KTOArguments, model: Any, tokenizer: Any, stage_run: StageRun) -> list[dict[str, Any]]:
    """The model's own answers to training questions, each different one labelled by the checker.

    Answers that did not end are left out: what is trained on has an end token.

    Raises:
        ValueError: if all of them got one label.
    """
    from hf_scratch_gpt.data.conversations import load_conversations

    loaded = load_conversations(arguments.dataset, arguments.dataset_split, keep_columns=True)
    rows = unique_prompts(with_answers(dict(row) for row in loaded))
    context = context_length(arguments.model_name_or_path, arguments.max_length)
    rows, _ = keep_fitting(rows, tokenizer, arguments.own_answer_tokens, context, arguments.dataset)
    questions = pick(rows, arguments.own_answer_questions, arguments.seed)
    sampled = sample_answers(
        stage_run, "own-answers", model.to(arguments.device), tokenizer, questions,
        arguments.own_answers_per_question, arguments.own_answer_tokens, 1.0, arguments.seed,
    )  # fmt: skip
    labelled = [
        {"prompt": row["prompt"], "completion": [{"role": "assistant", "content": text}], "label": is_exact(row, text)}
        for row, answers in zip(questions, sampled, strict=True)
        for text in dict.fromkeys(answer.text for answer in answers if answer.ended and answer.text.strip())
    ]
    right = sum(row["label"] for row in labelled)
    if right in (0, len(labelled)):
        raise ValueError(
            f"{arguments.dataset}: of {len(labelled)} different answers that the model gave, {right} were right; KTO "
            "needs both kinds: ask more questions, or set own_answer_questions to 0 and give labelled answers"
        )
    return labelled


def load_answers(
    arguments: Any, tokenizer: Any, max_length: int, own: list[dict[str, Any]] | None
) -> tuple[Examples, Any | None]:
    """Labelled answers to train on and held out, and, where these came as pairs, the held-out pairs.

    Raises:
        ValueError: naming a row that cannot be used.
        OSError: if a data set is missing.
    """
    if own is not None or is_labelled(arguments.dataset):
        return load_labelled(arguments, answer_encoder(tokenizer), max_length, own), None
    pairs = load_examples(arguments, "preferences", preference_encoder(tokenizer), max_length)
    heldout = None if pairs.heldout is None else unpair(pairs.heldout)
    return Examples(unpair(pairs.train), heldout, pairs.dropped), pairs.heldout


def is_labelled(source: str) -> bool:
    """Whether a local file's first row has a label: anything else is read as preferences."""
    from hf_scratch_gpt.data.rows import read_rows

    path = Path(source)
    return path.is_file() and "label" in next((row for _, row in read_rows(path)), {})


def load_labelled(
    arguments: Any, encode: Callable[[dict], dict], max_length: int, own: list[dict[str, Any]] | None
) -> Examples:
    """Rows of `prompt`, `completion` and `label`, encoded; `own`, if given, in place of the data set's.

    Raises:
        ValueError: naming a row without a label, or that cannot be encoded.
        OSError: if a file is missing.
    """
    from datasets import Dataset

    from hf_scratch_gpt.data.conversations import load_conversations

    rows: Any = Dataset.from_list(own) if own else load_conversations(arguments.dataset, keep_columns=True)
    heldout = None
    if arguments.eval_dataset and is_labelled(arguments.eval_dataset):
        heldout = load_conversations(arguments.eval_dataset, keep_columns=True)
    elif arguments.heldout_fraction > 0 and len(rows) > 1:
        count = max(1, round(arguments.heldout_fraction * len(rows)))
        split = rows.train_test_split(test_size=count, seed=arguments.seed)
        rows, heldout = split["train"], split["test"]
    allow = arguments.allow_dropped_rows
    train, dropped = tokenise(rows, encode, f"{arguments.dataset} (training)", max_length, allow)
    if heldout is None:
        return Examples(train, None, dropped)
    origin = f"{arguments.eval_dataset or arguments.dataset} (held out)"
    return Examples(train, tokenise(heldout, encode, origin, max_length, allow)[0], dropped)


def answer_encoder(tokenizer: Any) -> Callable[[dict], dict]:
    """Row with `prompt`, `completion`, `label` -> `prompt_ids`, `completion_ids`, `label`, `length`."""
    encode_answer = AnswerEncoder(tokenizer)

    def encode(row: dict) -> dict:
        label = row.get("label")
        known = _LABELS.get(label.lower() if isinstance(label, str) else label) if label is not None else None
        if known is None:
            raise ValueError(f"'label' is {label!r}, expected true (a desirable answer) or false")
        answer = encode_answer(row["prompt"], row["completion"])
        return {
            "prompt_ids": answer.input_ids[: answer.start],
            "completion_ids": answer.input_ids[answer.start :],
            "label": known,
            "length": len(answer.input_ids),
        }

    return encode


def unpair(pairs: Any) -> Any:
    """Both answers of each encoded pair by themselves: the chosen one is desirable."""
    from datasets import Dataset

    rows = [
        {
            "prompt_ids": pair["prompt_ids"],
            "completion_ids": pair[column],
            "label": column == "chosen_ids",
            "length": len(pair["prompt_ids"]) + len(pair[column]),
        }
        for pair in pairs
        for column in ("chosen_ids", "rejected_ids")
    ]
    return Dataset.from_list(rows)


def label_weights(arguments: Any, desirable: int, undesirable: int) -> tuple[float, float]:
    """The weights of desirable and undesirable answers: as set, or balanced (the paper's equation 8, its lower end).

    Raises:
        ValueError: if there are no answers of one label.
    """
    if not desirable or not undesirable:
        raise ValueError(
            f"{arguments.dataset}: {desirable} desirable and {undesirable} undesirable answers; KTO needs both"
        )
    weights = (arguments.desirable_weight, arguments.undesirable_weight)
    if not arguments.balance_labels:
        return weights
    ratio = (weights[0] * desirable) / (weights[1] * undesirable)
    balanced = (weights[0], weights[1] * ratio) if ratio > 1 else (weights[0] / ratio, weights[1])
    if balanced != weights:
        logger.warning(
            "kto: %d desirable and %d undesirable answers: weighed %.3g to %.3g", desirable, undesirable, *balanced
        )
    return balanced


def label_metrics(rewards: list[float], labels: list[bool]) -> dict[str, Any]:
    """Mean implicit rewards by label, and how often a desirable answer's is above an undesirable one's (ties half)."""
    values, good = np.asarray(rewards), np.asarray(labels, dtype=bool)
    metrics: dict[str, Any] = {"heldout_answers": len(values)}
    if good.any() and not good.all():
        differences = np.subtract.outer(values[good], values[~good])
        metrics["heldout_label_auc"] = float((differences > 0).mean() + (differences == 0).mean() / 2)
        metrics["heldout_desirable_reward"] = float(values[good].mean())
        metrics["heldout_undesirable_reward"] = float(values[~good].mean())
    return metrics
