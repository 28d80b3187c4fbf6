"""A text classifier from a pretrained model: `scratch-gpt classify recipe.yaml`.

The whole model is tuned with a new linear head at the last token of each text, as GPT-1 was (Radford et al. 2018,
https://openai.com/index/language-unsupervised/), with its auxiliary language-model loss as an option. The folder that
comes out answers through `pipeline("text-classification", model=folder, trust_remote_code=True)`.
"""

import dataclasses
import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_scratch_gpt.evaluation.classification import classification_metrics
from hf_scratch_gpt.evaluation.intervals import wilson
from hf_scratch_gpt.evaluation.mode import measuring
from hf_scratch_gpt.finetuning.arguments import TuningArguments, make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.auxiliary import AuxiliaryLanguageModel
from hf_scratch_gpt.finetuning.classifier_data import Parts, load_parts
from hf_scratch_gpt.finetuning.classifier_inputs import (
    encode_for_classifier,
    load_classifier_tokenizer,
)
from hf_scratch_gpt.finetuning.models import align_tokens, check_model_source, load_model
from hf_scratch_gpt.finetuning.scoring import pad_rows
from hf_scratch_gpt.finetuning.trainers import LengthGrouping, run_stage, train_and_save
from hf_scratch_gpt.runs import StageRun, write_text
from hf_scratch_gpt.runs.loading import check_tokens_fit, loading
from hf_scratch_gpt.runs.values import nearest

REJECTED = "rejected.jsonl"


@dataclasses.dataclass
class ClassifyArguments(TuningArguments, TrainingArguments):
    """Settings of `classify`: `TuningArguments` and all of transformers' `TrainingArguments`.

    Args:
        dataset (`str`): A .tsv, .csv, .jsonl, .json or .parquet file, or a `datasets` id or folder.
        label_column, text_column (`str`, *optional*): Columns by name, or by number where a file has no header line.
            Unset: found by their names, or by what is in them.
        text_pair_column (`str`, *optional*): Column of a second text, to classify pairs (entailment, similarity).
        eval_dataset (`str`, *optional*): Held-out rows. Unset: a `heldout_fraction` of `dataset`, drawn by `seed`.
        heldout_fraction (`float`, *optional*, defaults to `0.2`): Share to hold out where there is no `eval_dataset`.
        validation_fraction (`float`, *optional*, defaults to `0.0`): Share of the training rows to leave out and
            measure beside the held-out ones: settings are to be chosen by these.
        stratify (`bool`, *optional*, defaults to `False`): Hold out this share of each label.
        deduplicate (`bool`, *optional*, defaults to `True`): Take training rows out whose text is held out too.
        positive_label (`str`, *optional*): The label whose F1 is told. Unset: of two labels the rarer one; of more the
            mean over all (macro).
        aux_lm_weight (`float`, *optional*, defaults to `0.0`): Weight of the language model's loss on the texts,
            while training; 0.5 in GPT-1.
        max_length (`int`, *optional*): Longest text in tokens, control tokens included; longer ones are cut. Unset:
            the model's context.
        allow_dropped_rows (`bool`, *optional*, defaults to `False`): Go on when more than 1% of the rows have no text
            or no label.
        peft (`str`, *optional*, defaults to `"none"`): `"none"` trains all weights, `"lora"` adapters and the head.

    Raises:
        ValueError: for a setting out of its range.
    """

    dataset: str = dataclasses.field(
        default="", metadata={"help": "Texts with labels: a .tsv, .csv, .jsonl or .parquet file, or a datasets id."}
    )
    eval_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "Held-out rows; unset: a share of dataset, drawn by the seed."}
    )
    eval_split: str | None = dataclasses.field(
        default=None, metadata={"help": "Split of eval_dataset; unset: test of a datasets id."}
    )
    label_column: str | None = dataclasses.field(
        default=None, metadata={"help": "Column of the labels, by name, or by number in a file without a header."}
    )
    text_column: str | None = dataclasses.field(default=None, metadata={"help": "Column of the texts, likewise."})
    text_pair_column: str | None = dataclasses.field(
        default=None, metadata={"help": "Column of a second text, to classify pairs of texts."}
    )
    heldout_fraction: float = dataclasses.field(
        default=0.2, metadata={"help": "Share of dataset to hold out where no eval_dataset is given."}
    )
    validation_fraction: float = dataclasses.field(
        default=0.0, metadata={"help": "Share of the training rows to leave out, to choose settings by."}
    )
    stratify: bool = dataclasses.field(default=False, metadata={"help": "Hold out the same share of each label."})
    deduplicate: bool = dataclasses.field(
        default=True, metadata={"help": "Take training rows out whose text is held out too."}
    )
    positive_label: str | None = dataclasses.field(
        default=None, metadata={"help": "Label whose F1 is told; unset: the rarer of two, or the mean over more."}
    )
    aux_lm_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "Weight of the language model's loss on the texts (GPT-1: 0.5)."}
    )
    allow_dropped_rows: bool = dataclasses.field(
        default=False, metadata={"help": "Go on when more than one row in a hundred has no text or no label."}
    )
    peft: str = dataclasses.field(default="none", metadata={"help": "none (all weights) or lora (merged at the end)."})
    # Fields of TrainingArguments, with defaults of ours.
    learning_rate: float = dataclasses.field(default=5e-4, metadata={"help": "Peak learning rate."})
    per_device_train_batch_size: int = dataclasses.field(default=32, metadata={"help": "Texts a step and device."})
    per_device_eval_batch_size: int = dataclasses.field(default=32, metadata={"help": "Texts measured at a time."})
    num_train_epochs: float = dataclasses.field(default=3.0, metadata={"help": "Passes over the training rows."})
    warmup_steps: float = dataclasses.field(
        default=0.1, metadata={"help": "Steps to the peak learning rate; below 1: that share of all steps."}
    )
    logging_steps: float = dataclasses.field(default=10, metadata={"help": "Steps between lines of curve.jsonl."})

    def _check(self) -> None:
        super()._check()
        if not 0 <= self.validation_fraction < 1:
            raise ValueError(
                f"'validation_fraction' is {self.validation_fraction}, expected a share from 0 to below 1"
            )
        if not self.aux_lm_weight >= 0:
            raise ValueError(f"'aux_lm_weight' is {self.aux_lm_weight}, expected 0 or more")
        if str(getattr(self.eval_strategy, "value", self.eval_strategy)) != "no" and not self.validation_fraction:
            raise ValueError("'eval_strategy' needs a validation_fraction: held-out rows are for the end alone")


Arguments = ClassifyArguments


class ClassificationTrainer(LengthGrouping, Trainer):
    """transformers' `Trainer` with the loss as a mean over texts, and GPT-1's auxiliary loss if asked.

    Args:
        auxiliary (`AuxiliaryLanguageModel`, *optional*): Gives the language model's loss.
        aux_lm_weight (`float`): Its weight, λ.
    """

    def __init__(
        self, *args: Any, train_dataset: Any, auxiliary: Any = None, aux_lm_weight: float = 0.0, **kwargs: Any
    ):
        self.example_lengths = list(train_dataset["length"])
        self.auxiliary, self.aux_lm_weight = auxiliary, aux_lm_weight
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        self.model_accepts_loss_kwargs = True  # so that `compute_loss` is told the texts of the whole step
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled or self.args.n_gpu > 1
        if auxiliary is not None and (sharded or self.args.torch_compile):
            raise ValueError(
                "'aux_lm_weight' needs a whole model, not compiled, in each process: launch without DeepSpeed and "
                "FSDP, one process a GPU, without torch_compile, or set it to 0"
            )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As `Trainer.train`; the language model's head is gone afterwards."""
        result = super().train(*args, **kwargs)
        if self.auxiliary is not None:
            self.auxiliary.detach()
        return result

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """L2 + λ L1, summed over the texts of the batch and divided by those of the step, over all processes."""
        labels = inputs["labels"]
        outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        smoothing = self.args.label_smoothing_factor
        loss = torch.nn.functional.cross_entropy(
            outputs.logits.float(), labels, reduction="sum", label_smoothing=smoothing
        )
        if self.auxiliary is not None and model.training:
            auxiliary = self.auxiliary.summed_loss(inputs["input_ids"], inputs["attention_mask"])
            loss = loss + self.aux_lm_weight * auxiliary
        loss = loss / (len(labels) if num_items_in_batch is None else num_items_in_batch)
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # whose gradients are averaged
        return (loss, outputs) if return_outputs else loss


def collate(rows: list[dict[str, Any]], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Rows of `input_ids`, `labels` and perhaps `token_type_ids` as tensors, padded on the right."""
    batch = {
        "input_ids": pad_rows([row["input_ids"] for row in rows], pad_token_id),
        "attention_mask": pad_rows([[1] * len(row["input_ids"]) for row in rows], 0),
    }
    if "token_type_ids" in rows[0]:
        batch["token_type_ids"] = pad_rows([row["token_type_ids"] for row in rows], 0)
    if "labels" in rows[0]:
        batch["labels"] = torch.tensor([row["labels"] for row in rows])
    return batch


def run(arguments: ClassifyArguments) -> Path:
    """Train a classifier from `model_name_or_path` on `dataset`; write it whole, with its held-out measures.

    Raises:
        ValueError: for unusable settings, model, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "classify", _train_classifier)


def _train_classifier(arguments: ClassifyArguments, stage_run: StageRun) -> None:
    source = arguments.model_name_or_path
    tokenizer = load_classifier_tokenizer(source)
    max_length = longest_text(source, tokenizer, arguments.max_length)
    if max_length is not None:
        tokenizer.model_max_length = max_length  # where `truncation=True` cuts
    parts = load_parts(arguments)
    positive = positive_label(parts, arguments.positive_label)
    encoded = {
        name: _encode(tokenizer, parts, part, max_length)
        for name, part in (("train", parts.train), ("validation", parts.validation), ("heldout", parts.heldout))
        if part is not None
    }
    rows = {name: part for name, (part, _) in encoded.items()}
    trainer = _make_trainer(arguments, stage_run, tokenizer, parts.names, rows)
    sample = rows["train"][: min(4, len(parts.train))]["input_ids"]
    model, metrics = train_and_save(trainer, stage_run, tokenizer, sample)
    if not stage_run.is_main:
        return
    metrics |= _describe(parts, {name: truncated for name, (_, truncated) in encoded.items()}, max_length)
    for name in ("validation", "heldout"):
        if name in rows:
            logits = class_logits(model, rows[name], tokenizer.pad_token_id, arguments.per_device_eval_batch_size)
            metrics |= _measure(parts, name, logits, positive)
    if parts.rejected:
        write_text(stage_run.folder / REJECTED, "".join(json.dumps(row) + "\n" for row in parts.rejected))
    stage_run.finish(metrics)


def _make_trainer(
    arguments: ClassifyArguments, stage_run: StageRun, tokenizer: Any, names: list[str], rows: dict[str, Any]
) -> ClassificationTrainer:
    source = arguments.model_name_or_path
    set_seed(arguments.seed)  # the head is new
    model = _load_classifier(source, tokenizer, names)
    lora = make_lora_config(arguments, "SEQ_CLS", model, modules_to_save=("score",) if hasattr(model, "score") else ())
    if lora is not None:
        from peft import get_peft_model

        model = get_peft_model(model, lora)
    return ClassificationTrainer(
        model=model,
        args=trainer_arguments(arguments, stage_run, arguments.max_length),
        train_dataset=rows["train"],
        eval_dataset=rows.get("validation"),
        data_collator=lambda batch: collate(batch, tokenizer.pad_token_id),
        processing_class=tokenizer,
        compute_metrics=_accuracy_while_training,
        auxiliary=AuxiliaryLanguageModel(model, source) if arguments.aux_lm_weight else None,
        aux_lm_weight=arguments.aux_lm_weight,
    )


def _accuracy_while_training(prediction: Any) -> dict[str, float]:
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}


def longest_text(source: str, tokenizer: Any, asked: int | None) -> int | None:
    """Longest text in tokens: `max_length` if given, else what model and tokenizer allow; `None` without a limit.

    Raises:
        ValueError: if `max_length` exceeds the model's context.
    """
    check_model_source(source)
    with loading(source, "config"):
        config = AutoConfig.from_pretrained(source)
    contexts = [getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
    context = min((length for length in contexts if length is not None and length < 10**9), default=None)
    if asked is not None and context is not None and asked > context:
        raise ValueError(f"'max_length' is {asked}, but {source} has a context of {context} tokens")
    return context if asked is None else asked


def positive_label(parts: Parts, asked: str | None) -> str | None:
    """The label whose F1 is told: as asked, else of two the rarer among the training rows; `None` for the mean.

    Raises:
        ValueError: if there is no such label.
    """
    if asked is not None and asked not in parts.names:
        raise ValueError(
            f"'positive_label' is '{asked}'{nearest(asked, parts.names)}; the labels are {', '.join(parts.names)}"
        )
    if asked is not None or len(parts.names) > 2:
        return asked
    counts = Counter(parts.train.labels)
    return min(reversed(parts.names), key=lambda name: counts[name])


def _encode(tokenizer: Any, parts: Parts, part: Any, max_length: int | None) -> tuple[Any, int]:
    """A part as a `datasets.Dataset`, and how many of its texts were cut."""
    from datasets import Dataset

    encoded = encode_for_classifier(tokenizer, part.texts, part.pairs, max_length)
    columns: dict[str, list] = {
        "input_ids": encoded.input_ids,
        "labels": parts.numbers(part),
        "length": [len(row) for row in encoded.input_ids],
    }
    if encoded.token_type_ids is not None:
        columns["token_type_ids"] = encoded.token_type_ids
    return Dataset.from_dict(columns), encoded.truncated


def _load_classifier(source: str, tokenizer: Any, names: list[str]) -> Any:
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    model = load_model(AutoModelForSequenceClassification, source, num_labels=len(names), **labels)
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) == rows + 1 and tokenizer.pad_token_id == rows:  # the padding token that was added
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    check_tokens_fit(source, model, tokenizer)
    align_tokens(model, tokenizer)
    model.config.problem_type = "single_label_classification"
    return model


def class_logits(model: Any, rows: Any, pad_token_id: int, batch_size: int) -> np.ndarray:
    """Logits (rows, labels) of encoded rows, in their order, fp32."""
    lengths = [len(ids) for ids in rows["input_ids"]]
    order = sorted(range(len(rows)), key=lambda index: -lengths[index])
    logits: list[Any] = [None] * len(rows)
    with measuring(model):
        for start in range(0, len(order), batch_size):
            indices = order[start : start + batch_size]
            batch = collate([rows[index] for index in indices], pad_token_id)
            batch.pop("labels")
            output = model(**{name: value.to(model.device) for name, value in batch.items()}).logits
            for index, row in zip(indices, output.float().cpu().numpy(), strict=True):
                logits[index] = row
    return np.stack(logits)


def _describe(parts: Parts, truncated: dict[str, int], max_length: int | None) -> dict[str, Any]:
    counts = Counter(parts.train.labels)
    return {
        "examples": len(parts.train),
        "labels": {name: counts[name] for name in parts.names},
        "columns": parts.train.columns,
        "rejected_rows": len(parts.rejected),
        "max_length": max_length,
        "truncated_texts": truncated,
        "removed_duplicates": parts.removed,
    }


def _measure(parts: Parts, name: str, logits: np.ndarray, positive: str | None) -> dict[str, Any]:
    part = getattr(parts, name)
    truth, predicted = parts.numbers(part), logits.argmax(-1).tolist()
    majority = Counter(parts.train.labels).most_common(1)[0][0]
    metrics = classification_metrics(truth, predicted, parts.names, positive, majority)
    if name == "validation":
        kept = ("examples", "accuracy", "accuracy_interval", "f1", "f1_interval")
        return {f"validation_{key}": metrics[f"heldout_{key}"] for key in kept if f"heldout_{key}" in metrics}
    metrics["heldout_duplicates"] = sum(parts.repeated)
    unseen = [index for index, repeated in enumerate(parts.repeated) if not repeated]
    if unseen and len(unseen) < len(truth) and not parts.removed:  # what training has seen helps the accuracy of all
        accuracy = wilson(sum(truth[index] == predicted[index] for index in unseen), len(unseen))
        metrics |= {
            "never_seen_examples": accuracy.n,
            "never_seen_accuracy": accuracy.mean,
            "never_seen_accuracy_interval": [accuracy.low, accuracy.high],
        }
    return metrics
