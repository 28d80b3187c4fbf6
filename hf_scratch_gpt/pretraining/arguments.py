"""Settings of the stage `pretrain`, checked before anything is loaded."""

import dataclasses
from typing import Any, ClassVar, Literal, get_args, get_type_hints

from hf_scratch_gpt.runs import StageArguments
from hf_scratch_gpt.runs.values import read_mapping

# The order matters: the command line is read as the second kind.
ModelOverrides = dict[str, Any] | str | list[str] | None
Trackers = Literal["none", "tensorboard", "trackio"]


def _field(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclasses.dataclass
class PretrainArguments(StageArguments):
    """Settings of `scratch-gpt pretrain`. The help texts below are the reference; `muon_` settings concern Muon only.

    Raises:
        ValueError: for a value out of range, naming the setting.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("dataset_dir",)
    named_input_fields: ClassVar[tuple[str, ...]] = ("stream",)
    # Names that a recipe or the command line states, the default's value or not; `parse_arguments` sets it.
    stated: ClassVar[frozenset[str] | None] = None

    dataset_dir: str = _field("", "Folder of `scratch-gpt prepare`: token shards, tokenizer, held-out text.")
    objective: Literal["causal", "masked"] = _field(
        "causal", "causal: predict the next token (GPT); masked: fill in hidden tokens, read both ways (BERT)."
    )
    preset: str = _field("modern-5m", "Named model size; see hf_scratch_gpt.model.presets.")
    model_overrides: ModelOverrides = dataclasses.field(
        default=None,
        metadata={"help": "Config fields over the preset's: a mapping in a recipe; here 'key=value,...' or JSON."},
    )
    zero_init_output_projections: bool = _field(
        True, "Start attention's and the feed-forward's output projections at zero: each layer begins as identity."
    )
    context_length: int = _field(256, "Tokens in a window.")
    mixture: ModelOverrides = dataclasses.field(
        default=None,
        metadata={
            "help": "Weight of each source of the prepared folder, its share of the training tokens: a mapping in a "
            "recipe; here 'source=weight,...' or JSON. Without, the weights that `prepare` was given, if any; else "
            "every token is seen equally often."
        },
    )
    packing: Literal["contiguous", "best_fit"] = _field(
        "contiguous",
        "contiguous: windows run across documents, and cut them where they end; best_fit: documents that fit a window "
        "are packed whole, longer ones are cut as little as they must, and what room is left is padding.",
    )
    stream: list[str] | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Train on the text of these sources (files, folders, data set ids, as for `prepare`) instead of "
            "the shards, encoded on the fly; dataset_dir still gives the tokenizer, the held-out text, which is left "
            "out, and the filters, but for those that find duplicates. Limits: read once, in the order it has, in "
            "contiguous windows (not shuffled, no mixture); a run that outlasts it stops with an error; each process "
            "reads all of it; to resume, and to go back from a spike, is to read it again from its start, and refused "
            "if what was trained on has changed. It is known by its name: a finished run does not notice other text "
            "behind it."
        },
    )
    stream_text_column: str = _field("text", "Column of a stream's tables that holds the text.")
    stream_split: str = _field("train", "Split of a stream's data set ids.")
    separate_documents: bool = _field(
        True, "Keep documents that share a window apart in attention and positions, as they are read later."
    )
    batch_size: int = _field(32, "Windows in an optimizer step, over all processes and accumulation steps.")
    gradient_accumulation_steps: int = _field(1, "Split each process's share of the batch in so many parts.")
    num_processes: int = _field(
        0, "Processes that this run expects, over all machines: a launch of another number is refused; 0 for any."
    )
    distributed: Literal["auto", "none", "ddp", "fsdp"] = _field(
        "auto",
        "How this run expects to be spread: none (one process), ddp (data-parallel), fsdp (FSDP2: weights, gradients "
        "and optimizer states in slices). Another launch is refused; auto takes what the launcher asks for.",
    )
    max_steps: int = _field(0, "Train for so many optimizer steps; exactly one of max_steps, max_minutes, tokens.")
    max_minutes: float = _field(
        0.0,
        "Train for so long. Bounds the whole stage: loading, compiling and the final evaluation are taken off, so "
        "that the stage ends about then; the schedule follows the time. After an interruption, training time counts "
        "on from the last checkpoint.",
    )
    tokens: str = _field(
        "",
        "Train on so many tokens (2000000, 2M, 1.5B); auto: as many as the model's size makes worth while, with a "
        "batch, warm-up and learning rates that fit, where they are not given; see hf_scratch_gpt.pretraining.dial.",
    )
    optimizer: Literal["muon", "adamw"] = _field("muon", "muon (hidden matrices; AdamW for the rest) or adamw.")
    learning_rate: float = _field(3e-3, "AdamW's learning rate.")
    muon_learning_rate: float = _field(0.02, "Muon's learning rate.")
    momentum: float = _field(0.95, "Muon's momentum.")
    momentum_warmup_steps: int = _field(0, "Raise Muon's momentum from 0.85 over so many steps.")
    adam_beta1: float = _field(0.9, "AdamW's decay of the mean gradient.")
    adam_beta2: float = _field(0.95, "AdamW's decay of the mean squared gradient.")
    weight_decay: float = _field(0.1, "Decoupled weight decay of matrices and embeddings; norms and biases have none.")
    cautious_weight_decay: bool = _field(False, "Muon decays an entry only where the update shrinks it too.")
    schedule: Literal["wsd", "cosine", "linear"] = _field("wsd", "wsd (stay, then fall linearly), cosine or linear.")
    warmup_steps: int = _field(20, "Raise the learning rate linearly over so many steps.")
    decay_fraction: float = _field(0.4, "wsd: the last share of the budget, over which the rate falls.")
    final_learning_rate_fraction: float = _field(0.0, "Share of the learning rate that is left at the end.")
    grad_clip: float = _field(1.0, "Largest norm of the gradient; 0 for no clipping.")
    z_loss: float = _field(
        0.0, "Coefficient of log(Z)^2, a penalty on the softmax's normaliser (PaLM: 1e-4); the curve's loss has it in."
    )
    ema_decay: float = _field(
        0.0, "Keep an exponential moving average of the weights; it is what is measured and saved. 0 for none."
    )
    spike_threshold: float = _field(
        6.0,
        "Leave an update out whose loss is so many robust deviations above the usual (10/6 of them for the logarithm "
        "of the gradient norm); 0 for only those that are not finite.",
    )
    spike_rollbacks: int = _field(
        8, "When a spike lasts, go back to a checkpoint and pass over its data, at most so many times; 0 for never."
    )
    precision: Literal["auto", "fp32", "bf16", "fp16"] = _field(
        "auto",
        "fp32, bf16 (autocast), fp16 (autocast with loss scaling, for GPUs without bf16), or auto: bf16 where the "
        "hardware is faster in it.",
    )
    compile: Literal["auto", "true", "false"] = _field(
        "auto", "torch.compile: true, false, or auto: where it can pay for itself."
    )
    checkpoint_steps: int = _field(0, "Save a checkpoint every so many steps; 0 for none by steps.")
    checkpoint_seconds: float = _field(60.0, "Save a checkpoint every so many seconds; 0 for none by time.")
    checkpoints_kept: int = _field(2, "Whole checkpoints that stay; more than one, as the last may turn out damaged.")
    on_checkpoint_failure: Literal["stop", "continue"] = _field(
        "stop", "If a checkpoint cannot be written (full disk): stop, or continue and try again at the next one."
    )
    logging_steps: int = _field(10, "Steps between lines of the curve.")
    evaluation_batch_size: int = _field(16, "Windows in a batch of the evaluation.")
    evaluation_steps: int = _field(
        0, "Measure on the held-out text every so many steps too; 0 for only before and after training."
    )
    sample_prompts: list[str] | None = dataclasses.field(
        default=None,
        metadata={"help": "Texts that the model continues every evaluation_steps, into samples.jsonl."},
    )
    sample_tokens: int = _field(32, "Tokens of such a continuation.")
    evaluation_bytes: int = _field(
        0, "Measure on at most so many bytes of held-out documents, drawn by the seed; 0 for all."
    )
    evaluation_seed: int | None = _field(None, "Draw these documents by this seed; without, by 'seed'.")

    def check(self) -> None:
        """Raise `ValueError` for the first setting that is out of range."""
        if not self.dataset_dir:
            raise ValueError("'dataset_dir' is missing: name the folder that `scratch-gpt prepare` wrote")
        if self.stream and self.mixture:
            raise ValueError("'mixture' weighs the sources of shards, but 'stream' is read in its own order; give one")
        self._check_budget()
        self._check_choices()
        self._check_ranges()

    def _check_choices(self) -> None:
        hints = get_type_hints(type(self))
        names = (
            "objective",
            "packing",
            "optimizer",
            "schedule",
            "precision",
            "compile",
            "on_checkpoint_failure",
            "distributed",
        )
        for name, known in [*((name, get_args(hints[name])) for name in names), ("report_to", get_args(Trackers))]:
            if getattr(self, name) not in known:
                raise ValueError(f"'{name}' is '{getattr(self, name)}', expected one of {', '.join(known)}")
        if self.packing == "best_fit" and self.stream:
            raise ValueError("'packing' is best_fit, but a 'stream' is cut as it comes; set 'packing' to contiguous")
        if self.packing == "best_fit" and self.objective == "masked" and not self.separate_documents:
            raise ValueError(
                "'packing' is best_fit, whose padding a masked model without 'separate_documents' would read as text; "
                "turn 'separate_documents' on, or set 'packing' to contiguous"
            )

    def _check_ranges(self) -> None:
        minima: dict[str, float] = {
            "context_length": 2,
            "batch_size": 1,
            "gradient_accumulation_steps": 1,
            "num_processes": 0,
            "logging_steps": 1,
            "evaluation_batch_size": 1,
            "evaluation_bytes": 0,
            "warmup_steps": 0,
            "momentum_warmup_steps": 0,
            "checkpoint_steps": 0,
            "checkpoint_seconds": 0,
            "checkpoints_kept": 1,
            "learning_rate": 0,
            "muon_learning_rate": 0,
            "weight_decay": 0,
            "grad_clip": 0,
            "z_loss": 0,
            "evaluation_steps": 0,
            "sample_tokens": 1,
            "spike_threshold": 0,
            "spike_rollbacks": 0,
        }
        for name, minimum in minima.items():
            if getattr(self, name) < minimum:
                raise ValueError(f"'{name}' is {getattr(self, name)}, expected at least {minimum}")
        if self.sample_prompts and (self.objective == "masked" or not self.evaluation_steps):
            raise ValueError("'sample_prompts' are continued every 'evaluation_steps' of a causal model; set these")
        for name in (
            "ema_decay",
            "decay_fraction",
            "final_learning_rate_fraction",
            "momentum",
            "adam_beta1",
            "adam_beta2",
        ):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"'{name}' is {getattr(self, name)}, expected 0 to 1")

    def _check_budget(self) -> None:
        if self.max_steps < 0 or self.max_minutes < 0:
            raise ValueError("'max_steps' and 'max_minutes' must not be negative")
        if self.tokens:
            from hf_scratch_gpt.pretraining.dial import parse_tokens

            parse_tokens(self.tokens)
            if self.max_steps or self.max_minutes:
                other = "max_steps" if self.max_steps else "max_minutes"
                raise ValueError(f"both 'tokens' ({self.tokens}) and '{other}' are given; give one")
            return
        if self.max_steps and self.max_minutes:
            raise ValueError(
                f"both 'max_steps' ({self.max_steps}) and 'max_minutes' ({self.max_minutes}) are given; give one"
            )
        if not self.max_steps and not self.max_minutes:
            raise ValueError("neither 'max_steps' nor 'max_minutes' is given; give one, or 'tokens'")


def parse_overrides(overrides: ModelOverrides) -> dict[str, Any]:
    """Config fields as a mapping, from a mapping, a JSON object, or `key=value` texts whose values are YAML.

    Raises:
        ValueError: for a text that is neither.
    """
    return read_mapping(overrides, "model_overrides", "key=value", str.partition)
