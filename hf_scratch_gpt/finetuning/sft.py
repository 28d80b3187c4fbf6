"""Supervised fine-tuning on conversations: `scratch-gpt sft recipe.yaml`.

The loss is on the assistant's tokens and its end token only; TRL's `SFTTrainer` trains low-rank adapters, which are
merged at the end, so that the output is a plain model folder (the adapter stays in `adapter/`). `--peft` chooses
another method (see `methods`). Examples are packed into windows (see `packing`), and attend to themselves alone.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM
from trl import SFTConfig, SFTTrainer

from hf_scratch_gpt.evaluation.intervals import bootstrap_ratio
from hf_scratch_gpt.finetuning._compat import (
    let_head_have_no_bias,
    score_only_trained_positions,
    use_linear_cross_entropy,
)
from hf_scratch_gpt.finetuning.arguments import TuningArguments, trainer_arguments
from hf_scratch_gpt.finetuning.methods import (
    check_method,
    initialise_prefix,
    make_peft_config,
    prepare_quantized,
    quantization_settings,
)
from hf_scratch_gpt.finetuning.models import (
    context_length,
    load_model,
    load_tokenizer,
)
from hf_scratch_gpt.finetuning.packing import PackedCollator, keeps_documents_apart, pack, padding_share
from hf_scratch_gpt.finetuning.scoring import score_answers
from hf_scratch_gpt.finetuning.tokenise import conversation_encoder, load_examples
from hf_scratch_gpt.finetuning.trainers import LengthGrouping, run_stage, train_and_save, train_in_blocks
from hf_scratch_gpt.runs import StageRun

logger = logging.getLogger(__name__)

_ROWS_LOOKED_AT = 100


@dataclasses.dataclass
class SFTArguments(TuningArguments, SFTConfig):
    """Settings of `sft`: `TuningArguments` and all of TRL's `SFTConfig`.

    Args:
        peft (`str`, *optional*, defaults to `"lora"`): `"lora"`, `"dora"`, `"none"`, `"qlora"`, `"prefix"` or
            `"adapter"`; see `methods`.
        packing (`bool`, *optional*, defaults to `True`): A row of a batch is a window of up to `max_length` tokens
            with as many whole examples as fit; off: a row is one example, in batches of like length.
        prefix_tokens (`int`, *optional*, defaults to `16`): Length of the prefix of prefix tuning, which the context
            loses.
        adapter_size (`int`, *optional*, defaults to `16`): Width of a bottleneck adapter.
    """

    peft_methods: ClassVar[tuple[str, ...]] = ("lora", "dora", "none", "qlora", "prefix", "adapter")

    peft: str = dataclasses.field(
        default="lora", metadata={"help": "lora, dora, qlora (all merged), none (all weights), prefix or adapter."}
    )
    packing: bool = dataclasses.field(
        default=True, metadata={"help": "Pack examples into windows of max_length tokens; they do not see each other."}
    )
    prefix_tokens: int = dataclasses.field(default=16, metadata={"help": "Tokens of the prefix of prefix tuning."})
    adapter_size: int = dataclasses.field(default=16, metadata={"help": "Width of bottleneck adapters."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.padding_free:
            raise ValueError("'padding_free' is not supported: packing leaves little padding, in rows of one window")
        for name in ("prefix_tokens", "adapter_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"'{name}' is {getattr(self, name)}, expected at least 1")

    def check_inputs(self) -> None:
        """Refuse settings without a model or data, and a method that this machine does not allow.

        Raises:
            ValueError: naming the setting.
        """
        super().check_inputs()
        check_method(self)


Arguments = SFTArguments


class ConversationTrainer(LengthGrouping, SFTTrainer):
    """`SFTTrainer` on rows that `tokenise` made: `input_ids` and `labels` are taken as they are.

    `args` is changed so that TRL neither prepares nor packs them: its packing needs a kernel that only GPUs have, and
    without it makes one row of the whole batch, whose attention costs as many times as much as there are rows.
    """

    def __init__(self, *, args: Any, train_dataset: Any, **kwargs: Any):
        self.example_lengths = list(train_dataset["length"])
        args.dataset_kwargs = {"skip_prepare_dataset": True}
        args.packing = False
        score_only_trained_positions()
        super().__init__(args=args, train_dataset=train_dataset, **kwargs)
        let_head_have_no_bias(self.model)
        use_linear_cross_entropy(self)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """TRL's, with its count of tokens put right: of rows without a mask it counts one, and resuming loses it."""
        if self.model.training and self.args.include_num_input_tokens_seen != "no":
            self._metrics["train"]["num_tokens"] = [int(self.state.num_input_tokens_seen)]
        super().log(logs, start_time)


def run(arguments: SFTArguments) -> Path:
    """Tune `model_name_or_path` on `dataset`, and write a complete model folder with the held-out loss in its metrics.

    Raises:
        ValueError: for unusable settings, model, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "sft", _tune)


def _tune(arguments: SFTArguments, stage_run: StageRun) -> None:
    source = arguments.model_name_or_path
    tokenizer = load_tokenizer(source)
    max_length = _room_for_text(arguments)
    examples = load_examples(arguments, "conversations", conversation_encoder(tokenizer), max_length)

    settings = trainer_arguments(arguments, stage_run, max_length)
    model = load_model(AutoModelForCausalLM, source, tokenizer, **quantization_settings(arguments))
    model = prepare_quantized(model, arguments) if arguments.peft == "qlora" else model
    train_in_blocks(model, settings)
    rows, collator, told = _training_rows(arguments, model, examples.train, max_length, tokenizer)
    trainer = ConversationTrainer(
        model=model,
        args=settings,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=examples.heldout,
        processing_class=tokenizer,
        peft_config=make_peft_config(arguments, model, control_tokens_in(examples.train, tokenizer)),
    )
    sample = examples.train[: min(4, len(examples.train))]["input_ids"]
    if arguments.peft == "prefix":
        initialise_prefix(trainer.model, sample[0])
    model, metrics = train_and_save(trainer, stage_run, tokenizer, sample)
    if not stage_run.is_main:
        return
    metrics |= {"examples": len(examples.train), "dropped_rows": examples.dropped, "peft": arguments.peft, **told}
    metrics["rejected_rows"] = examples.rejected
    if examples.heldout is not None:
        batch_size = arguments.per_device_eval_batch_size
        metrics |= measure_heldout(model, examples.heldout, tokenizer.pad_token_id, batch_size)
    stage_run.finish(metrics)


def _room_for_text(arguments: SFTArguments) -> int:
    """Longest row in tokens: `max_length`, or the model's context, less the prefix that has a share of it."""
    source, prefix = arguments.model_name_or_path, arguments.prefix_tokens if arguments.peft == "prefix" else 0
    if not prefix:
        return context_length(source, arguments.max_length)
    if arguments.max_length is not None:
        return context_length(source, arguments.max_length + prefix) - prefix
    room = context_length(source, None) - prefix
    if room < 2:
        raise ValueError(f"'prefix_tokens' is {prefix}, which leaves {room} of the context of {source}; lower it")
    return room


def _training_rows(
    arguments: SFTArguments, model: Any, examples: Any, max_length: int, tokenizer: Any
) -> tuple[Any, Any, dict[str, Any]]:
    """Rows to train on with what makes batches of them (`None` is TRL's), packed if that can be, and its figures."""
    packs = arguments.packing
    if packs and arguments.peft == "prefix":
        packs = False  # the prefix is in the cache, and with a cache documents are not kept apart
    elif packs and not keeps_documents_apart(model):
        logger.warning(
            "%s: packed examples would see each other in this model, so rows are single examples (packing: false)",
            arguments.model_name_or_path,
        )
        packs = False
    if not packs:
        return examples, None, {"packing": False}
    rows = pack(examples, max_length, arguments.seed)
    collator = PackedCollator(tokenizer.pad_token_id, arguments.pad_to_multiple_of)
    return rows, collator, {"packing": True, "windows": len(rows), "padding_share": padding_share(rows)}


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
