"""Supervised fine-tuning on conversations: `scratch-gpt sft recipe.yaml`.

The loss is on the assistant's tokens and its end token only; TRL's `SFTTrainer` trains low-rank adapters, which are
merged at the end, so that the output is a plain model folder (the adapter stays in `adapter/`).
"""

import dataclasses
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_scratch_gpt.evaluation.intervals import bootstrap_ratio
from hf_scratch_gpt.finetuning._compat import (
    let_head_have_no_bias,
    score_only_trained_positions,
    use_linear_cross_entropy,
)
from hf_scratch_gpt.finetuning.arguments import TuningArguments, make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.models import (
    context_length,
    load_model,
    load_tokenizer,
)
from hf_scratch_gpt.finetuning.scoring import score_answers
from hf_scratch_gpt.finetuning.tokenise import conversation_encoder, load_examples
from hf_scratch_gpt.finetuning.trainers import LengthGrouping, run_stage, train_and_save
from hf_scratch_gpt.runs import StageRun

_ROWS_LOOKED_AT = 100


@dataclasses.dataclass
class SFTArguments(TuningArguments, SFTConfig):
    """Settings of `sft`: `TuningArguments` and all of TRL's `SFTConfig`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("packing", "padding_free"):
            if getattr(self, name):
                raise ValueError(f"'{name}' is not supported: batches hold rows of like length instead")


Arguments = SFTArguments


class ConversationTrainer(LengthGrouping, SFTTrainer):
    """`SFTTrainer` on rows that `tokenise` made: `input_ids` and `labels` are taken as they are."""

    def __init__(self, *args: Any, train_dataset: Any, **kwargs: Any):
        self.example_lengths = list(train_dataset["length"])
        score_only_trained_positions()
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        let_head_have_no_bias(self.model)
        use_linear_cross_entropy(self)


def run(arguments: SFTArguments) -> Path:
    """Tune `model_name_or_path` on `dataset`, and write a complete model folder with the held-out loss in its metrics.

    Raises:
        ValueError: for unusable settings, model, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "sft", _tune)


def _tune(arguments: SFTArguments, stage_run: StageRun) -> None:
    tokenizer = load_tokenizer(arguments.model_name_or_path)
    max_length = context_length(arguments.model_name_or_path, arguments.max_length)
    examples = load_examples(arguments, "conversations", conversation_encoder(tokenizer), max_length)

    settings = trainer_arguments(arguments, stage_run, max_length)
    settings.dataset_kwargs = {"skip_prepare_dataset": True}
    model = load_model(AutoModelForCausalLM, arguments.model_name_or_path, tokenizer)
    lora = make_lora_config(arguments, "CAUSAL_LM", model)
    if lora is not None:
        lora.trainable_token_indices = control_tokens_in(examples.train, tokenizer) or None
    trainer = ConversationTrainer(
        model=model,
        args=settings,
        train_dataset=examples.train,
        eval_dataset=examples.heldout,
        processing_class=tokenizer,
        peft_config=lora,
    )
    sample = examples.train[: min(4, len(examples.train))]["input_ids"]
    model, metrics = train_and_save(trainer, stage_run, tokenizer, sample)
    if not stage_run.is_main:
        return
    metrics |= {"examples": len(examples.train), "dropped_rows": examples.dropped}
    if examples.heldout is not None:
        batch_size = arguments.per_device_eval_batch_size
        metrics |= measure_heldout(model, examples.heldout, tokenizer.pad_token_id, batch_size)
    stage_run.finish(metrics)


def control_tokens_in(examples: Any, tokenizer: Any) -> list[int]:
    """Ids of the chat template's control tokens: their embeddings are trained beside the adapter.

    A base model has never read them, and pretraining moved all the rows that it never read the same way. Adapters
    leave the embedding as it is, so the end token would share its probability with every other unread token: the
    quickstart's base model gave it 0.09 at most, whatever the adapters did.
    """
    added = set(tokenizer.added_tokens_decoder)
    rows = examples[: min(_ROWS_LOOKED_AT, len(examples))]["input_ids"]
    return sorted({token for row in rows for token in row if token in added})


def measure_heldout(model: Any, heldout: Any, pad_token_id: int, batch_size: int) -> dict[str, Any]:
    """Loss (nats a token) and accuracy (teacher-forced) on the held-out answers' tokens, end tokens included."""
    scores = score_answers(model, heldout["input_ids"], heldout["labels"], pad_token_id, batch_size)
    tokens = [score.tokens for score in scores]
    loss = bootstrap_ratio([-score.log_probability for score in scores], tokens)
    accuracy = bootstrap_ratio([score.correct for score in scores], tokens)
    return {
        "heldout_examples": len(scores),
        "heldout_tokens": sum(tokens),
        "heldout_loss": loss.mean,
        "heldout_loss_interval": [loss.low, loss.high],
        "heldout_token_accuracy": accuracy.mean,
        "heldout_token_accuracy_interval": [accuracy.low, accuracy.high],
    }
