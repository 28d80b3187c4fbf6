"""The settings that the stages on TRL's trainers (`sft`, `reward`, `dpo`) share, with defaults that fit a laptop."""

import copy
import dataclasses
import os
import warnings
from typing import Any, ClassVar

import torch

from hf_scratch_gpt.runs import StageRun
from hf_scratch_gpt.runs.arguments import check_trackers
from hf_scratch_gpt.runs.hardware import has_fast_bf16
from hf_scratch_gpt.runs.process import set_up_stage
from hf_scratch_gpt.runs.values import nearest

_ALL_METHODS = ("lora", "dora", "none", "qlora", "prefix", "adapter")


@dataclasses.dataclass
class TuningArguments:
    """Base of a tuning stage's settings: `class Arguments(TuningArguments, trl.SFTConfig)`.

    Args:
        model_name_or_path (`str`): Run folder, model folder or Hub id of the model to tune.
        dataset (`str`): A `prepare` folder (its tasks), a local file, or a `datasets` id.
        dataset_split (`str`, *optional*, defaults to `"train"`): Split of a `datasets` id.
        eval_dataset (`str`, *optional*): Held-out data. Unset: the prepare folder's held-out tasks, or else a
            `heldout_fraction` of `dataset`.
        eval_split (`str`, *optional*): Split of `eval_dataset`; unset: `heldout` of a folder, `test` of an id.
        heldout_fraction (`float`, *optional*, defaults to `0.05`): Share of `dataset` that is held out where there is
            no other held-out data; 0 trains on all of it and measures nothing held out.
        allow_dropped_rows (`bool`, *optional*, defaults to `False`): Go on when more than 1% of the rows are longer
            than `max_length`.
        allow_rejected_rows (`bool`, *optional*, defaults to `False`): Go on when more than 1% of the rows are
            malformed; `rejected.jsonl` in the run folder lists every row that is left out. (`ppo`, whose rows are
            prompts, names the first and stops.)
        peft (`str`, *optional*, defaults to `"lora"`): `"lora"` trains low-rank adapters and merges them at the end
            (Hu et al. 2021, https://huggingface.co/papers/2106.09685); `"dora"` gives them magnitudes of their own
            (Liu et al. 2024, https://huggingface.co/papers/2402.09353); `"none"` trains all weights. `sft` has more.
        lora_r (`int`, *optional*, defaults to `16`): Rank.
        lora_alpha (`int`, *optional*, defaults to `32`): The update is scaled by `lora_alpha / lora_r`.
        lora_dropout (`float`, *optional*, defaults to `0.0`): Dropout on the adapter's input.
        lora_target_modules (`str` or `list[str]`, *optional*, defaults to `"all-linear"`): Modules that get an
            adapter; `all-linear` leaves out the head.
        lora_modules_to_save (`list[str]`, *optional*): Modules that are trained whole beside the adapters; the head
            and the embedding only where they are not tied to each other. The final
            norm, `model.norm`, scales all logits, so that it can sharpen or flatten what the model says in a few steps
            (norms alone are enough for much of tuning: Zhao et al. 2023, https://arxiv.org/abs/2312.11420). One
            learning rate serves both: `lora_alpha / lora_r` sets how much of it reaches the adapted weights.
        max_length (`int`, *optional*): Longest row in tokens, control tokens included; longer rows are dropped.
            Unset: the model's context.

    Raises:
        ValueError: for a setting out of its range.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("model_name_or_path", "dataset", "eval_dataset")
    peft_methods: ClassVar[tuple[str, ...]] = ("lora", "dora", "none")

    # TrainingArguments turns a missing folder into "trainer_output"; "" is told apart from it and refused.
    output_dir: str = dataclasses.field(default="", metadata={"help": "Folder that the stage writes."})
    model_name_or_path: str = dataclasses.field(
        default="", metadata={"help": "Run folder, model folder or Hub id of the model to tune."}
    )
    dataset: str = dataclasses.field(
        default="", metadata={"help": "A prepare folder, a local file, or a datasets id."}
    )
    dataset_split: str = dataclasses.field(default="train", metadata={"help": "Split of a datasets id."})
    eval_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "Held-out data; unset: the prepare folder's, or a share of dataset."}
    )
    eval_split: str | None = dataclasses.field(
        default=None, metadata={"help": "Split of eval_dataset; unset: heldout of a folder, test of a datasets id."}
    )
    heldout_fraction: float = dataclasses.field(
        default=0.05, metadata={"help": "Share of dataset to hold out where no other held-out data is given."}
    )
    allow_dropped_rows: bool = dataclasses.field(
        default=False, metadata={"help": "Go on when more than one row in a hundred is longer than max_length."}
    )
    allow_rejected_rows: bool = dataclasses.field(
        default=False, metadata={"help": "Go on when more than one row in a hundred is malformed."}
    )
    peft: str = dataclasses.field(
        default="lora", metadata={"help": "lora or dora (merged at the end), none (all weights)."}
    )
    lora_r: int = dataclasses.field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = dataclasses.field(default=32, metadata={"help": "Adapters are scaled by lora_alpha / lora_r."})
    lora_dropout: float = dataclasses.field(default=0.0, metadata={"help": "Dropout on the adapters' input."})
    lora_target_modules: str | list[str] = dataclasses.field(
        default_factory=lambda: ["all-linear"],
        metadata={"help": "Names of the modules that get an adapter; all-linear leaves out the head."},
    )
    lora_modules_to_save: list[str] = dataclasses.field(
        default_factory=list, metadata={"help": "Modules trained whole beside the adapters, such as model.norm."}
    )
    max_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Longest row in tokens; unset: the model's context."}
    )
    # Fields of TrainingArguments and of TRL's configs, with defaults of ours.
    bf16: bool | None = dataclasses.field(
        default=None, metadata={"help": "bf16 autocast; unset: where bf16 is faster than fp32."}
    )
    # `None` is off; transformers warns of the name where it is set.
    gradient_checkpointing: bool | None = dataclasses.field(
        default=None, metadata={"help": "Recompute activations in the backward pass: less memory, slower."}
    )
    report_to: str = dataclasses.field(
        default="none", metadata={"help": "Where to log besides curve.jsonl: none, tensorboard or trackio."}
    )
    save_steps: float = dataclasses.field(default=100, metadata={"help": "Steps between checkpoints."})
    save_total_limit: int | None = dataclasses.field(default=2, metadata={"help": "Checkpoints kept."})
    include_num_input_tokens_seen: str = dataclasses.field(
        default="non_padding", metadata={"help": "What counts for tokens/s: no, all or non_padding."}
    )
    dataloader_pin_memory: bool = dataclasses.field(
        default=False, metadata={"help": "Pin batches in memory; helps only large batches on a GPU."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.lora_target_modules, str):
            self.lora_target_modules = [self.lora_target_modules]
        self.use_cpu = bool(getattr(self, "use_cpu", False)) or not torch.accelerator.is_available()
        self.precision_is_chosen = self.bf16 is None and not getattr(self, "fp16", False)
        if self.bf16 is None:
            self.bf16 = self.precision_is_chosen and has_fast_bf16("cpu" if self.use_cpu else None)
        super().__post_init__()  # type: ignore[misc]  # of the TRL config that comes next in the class order
        self._check()

    def _check(self) -> None:
        check_trackers(self.report_to)
        if self.peft not in self.peft_methods:
            known = "; the others are for sft alone" if self.peft in _ALL_METHODS else nearest(self.peft, _ALL_METHODS)
            raise ValueError(f"'peft' is '{self.peft}', expected one of {', '.join(self.peft_methods)}{known}")
        if self.lora_r < 1:
            raise ValueError(f"'lora_r' is {self.lora_r}, expected at least 1")
        if not 0 <= self.heldout_fraction < 1:
            raise ValueError(f"'heldout_fraction' is {self.heldout_fraction}, expected a share from 0 to below 1")
        if self.max_length is not None and self.max_length < 2:
            raise ValueError(f"'max_length' is {self.max_length}, expected at least 2 tokens")

    def check_inputs(self) -> None:
        """Refuse settings without a model or data.

        Raises:
            ValueError: naming the missing setting.
        """
        for name in ("model_name_or_path", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"'{name}' is missing: {type(self).__dataclass_fields__[name].metadata['help']}")


def make_lora_config(arguments: Any, task_type: str, model: Any, modules_to_save: tuple[str, ...] = ()) -> Any:
    """The `peft.LoraConfig` of a stage's settings for `model`, or `None` for `peft: none`.

    `modules_to_save` are trained whole, beside those that the settings name.

    Raises:
        ValueError: if a module to train whole does not exist, or is the head or the embedding while these are tied: a
            copy of one would leave the other behind; or if the adapters target either: the loss multiplies with the
            head's plain weight, so an adapter on it would never train.
    """
    if arguments.peft == "none":
        return None
    from peft import LoraConfig

    targets = list(arguments.lora_target_modules)
    config = getattr(model, "config", None)
    tied = config is None or bool(getattr(config.get_text_config(), "tie_word_embeddings", False))
    for field in ("lora_target_modules", "lora_modules_to_save"):
        for name in getattr(arguments, field):
            last = name.rpartition(".")[2]
            if last == "score" or (last in ("lm_head", "embed_tokens") and field == "lora_target_modules"):
                raise ValueError(f"'{field}': '{name}' is not supported there; leave it out")
            if last in ("lm_head", "embed_tokens") and tied:
                raise ValueError(f"'{field}': '{name}' is one weight with another, they are tied; leave it out")
    known = [name for name, _ in model.named_modules() if name]
    for name in arguments.lora_modules_to_save:  # peft passes over a name that it does not find
        if not any(module.endswith(name) for module in known):
            raise ValueError(f"'lora_modules_to_save': the model has no module '{name}'{nearest(name, known)}")
    return LoraConfig(
        r=arguments.lora_r,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        use_dora=arguments.peft == "dora",
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        task_type=task_type,
        modules_to_save=[*modules_to_save, *arguments.lora_modules_to_save] or None,
    )


def _set_up(arguments: Any, run: StageRun) -> None:
    """Set the process up as the settings of the trainer say."""
    set_precision = next((name for name in ("bf16", "fp16") if getattr(arguments, name)), "fp32")
    precision = "auto" if arguments.precision_is_chosen else set_precision
    asked = None if arguments.tf32 is None else "high" if arguments.tf32 else "highest"
    device = "cpu" if arguments.use_cpu else arguments.device.type
    set_up_stage(run, precision, device, asked, bool(arguments.torch_compile))


def trainer_arguments(arguments: Any, run: StageRun, max_length: int | None) -> Any:
    """A copy of the settings for the trainer, which writes its checkpoints below the run; `run` keeps the original."""
    _set_up(arguments, run)
    # transformers calls its own deprecated property when adapters are made.
    warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
    copied = copy.copy(arguments)
    copied.output_dir = str(run.checkpoints)
    copied.max_length = max_length
    # The default log folder is below `checkpoints`, which goes when the run is finished.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(run.folder / "tensorboard"))
    return copied
