"""Everything that a pretraining run needs before its first step: launcher, data, model, precision, compilation."""

import contextlib
import dataclasses
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_scratch_gpt.pretraining.arguments import PretrainArguments, parse_overrides
from hf_scratch_gpt.pretraining.distributed import check_launch, check_processes, launched_processes
from hf_scratch_gpt.runs.arguments import check_trackers
from hf_scratch_gpt.runs.loading import loading

logger = logging.getLogger(__name__)

_TOKENIZER_FILE = "tokenizer.json"
_DOCUMENT_END, _TURN_END = "<|endoftext|>", "<|im_end|>"
_OUTPUT_PROJECTIONS = ("o_proj", "down_proj")
_COMPILE_PAYS_AFTER_SECONDS = 200.0  # two cores take some 40 s to compile a small model, and then save a fifth
_ASSUMED_CPU_FLOPS = 1e11  # two recent cores in fp32; only to guess how long `max_steps` will take


def make_accelerator(arguments: PretrainArguments) -> Any:
    """The `Accelerator` of this run, checked against what the launcher started.

    Its mixed precision stays off: the loss module enters autocast itself, so that the recipe's `precision` decides.

    Raises:
        ValueError: if the launch is not what the recipe expects or would run as something else, or a tracker is not
            installed.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    tracker = None if arguments.report_to == "none" else arguments.report_to
    check_trackers(tracker)
    check_launch(arguments)
    if launched_processes() == 1:  # a stage that ran in this process before may have left its own settings behind
        AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(
        mixed_precision="no",
        log_with=tracker,
        project_config=ProjectConfiguration(logging_dir=str(Path(arguments.output_dir) / "logs")),
    )
    check_processes(accelerator)
    shares = accelerator.num_processes * arguments.gradient_accumulation_steps
    if arguments.batch_size % shares:
        raise ValueError(
            f"'batch_size' {arguments.batch_size} does not divide by {accelerator.num_processes} processes x "
            f"{arguments.gradient_accumulation_steps} gradient_accumulation_steps; choose a multiple of {shares}"
        )
    return accelerator


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A folder of `scratch-gpt prepare`.

    Args:
        folder (`Path`): The folder.
        manifest (`dict`): Its `manifest.json`.
        tokenizer: Its tokenizer.
        heldout (`list[str]`): The raw held-out documents; may be empty.
    """

    folder: Path
    manifest: dict[str, Any]
    tokenizer: Any
    heldout: list[str]


def load_dataset(folder: str | Path, context_length: int) -> Dataset:
    """Read and check the manifest, the tokenizer and the held-out text of a prepared folder.

    Raises:
        FileNotFoundError: if the folder or one of its files is missing.
        ValueError: if a file is damaged, the tokenizer is not the one of the shards, or the corpus is shorter than one
            window.
    """
    from transformers import AutoTokenizer

    from hf_scratch_gpt.data.manifest import MANIFEST, check_files, read_manifest
    from hf_scratch_gpt.data.shards import tokenizer_fingerprint

    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(f"{folder}: has no {MANIFEST}; expected a folder that `scratch-gpt prepare` wrote")
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    if "train" not in manifest["splits"] or "vocab_size" not in manifest:
        raise ValueError(f"{folder / 'manifest.json'}: has no train split or no vocab_size; run prepare again")
    tokens = manifest["splits"]["train"]["tokens"]
    if tokens < context_length:
        raise ValueError(
            f"{folder}: the training text has {tokens} tokens, fewer than one window of {context_length}; "
            "add text or lower 'context_length'"
        )
    with loading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) != manifest["vocab_size"]:
        raise ValueError(
            f"{folder}: the shards were made with {manifest['vocab_size']} tokens, its tokenizer has "
            f"{len(tokenizer)}; run prepare again"
        )
    if manifest.get("tokenizer_fingerprint", tokenizer_fingerprint(tokenizer)) != tokenizer_fingerprint(tokenizer):
        raise ValueError(f"{folder}: its tokenizer is not the one that the shards were made with; run prepare again")
    return Dataset(folder, manifest, tokenizer, _read_documents(folder / "heldout.jsonl"))


def _read_documents(path: Path) -> list[str]:
    import json

    documents = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                documents.append(json.loads(line)["text"])
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f'{path}, line {number}: expected {{"text": ...}} ({error!r})') from error
    return documents


def make_config(arguments: PretrainArguments, dataset: Dataset) -> Any:
    """The model's config: preset, then overrides, then what the tokenizer and the run fix.

    The context it claims (`max_position_embeddings`) is the one it is trained for unless an override says otherwise.

    Raises:
        ValueError: if the vocabulary is smaller than the tokenizer's, or the context shorter than the windows.
    """
    from hf_scratch_gpt.model import ScratchGPTConfig

    overrides = parse_overrides(arguments.model_overrides)
    vocab_size = dataset.manifest["vocab_size"]
    tokenizer = dataset.tokenizer
    is_causal = arguments.objective == "causal"
    if overrides.get("is_causal", is_causal) != is_causal:
        raise ValueError(
            f"model_overrides: is_causal {overrides['is_causal']} contradicts the objective '{arguments.objective}'; "
            "leave it out, the objective decides"
        )
    fixed = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    overrides = {"vocab_size": vocab_size, **fixed, **overrides, "is_causal": is_causal}
    config = ScratchGPTConfig.from_preset(arguments.preset, **overrides)
    if config.vocab_size < vocab_size:
        raise ValueError(
            f"the model's vocab_size is {config.vocab_size}, the tokenizer in {dataset.folder} has {vocab_size} tokens"
        )
    if arguments.context_length > config.max_position_embeddings:
        raise ValueError(
            f"'context_length' {arguments.context_length} is larger than the model's max_position_embeddings "
            f"{config.max_position_embeddings}; lower it, or override max_position_embeddings"
        )
    if "max_position_embeddings" not in overrides:
        overrides["max_position_embeddings"] = arguments.context_length
        config = ScratchGPTConfig.from_preset(arguments.preset, **overrides)
    return config


def end_token_ids(tokenizer: Any) -> list[int]:
    """Ids that end a generation: the end of a turn and the end of a document."""
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[token] for token in (_TURN_END, _DOCUMENT_END) if token in vocabulary]
    return ids or [tokenizer.eos_token_id]


def make_model(arguments: PretrainArguments, dataset: Dataset) -> Any:
    """A freshly initialised model in fp32, the same for the same seed; a causal one has its generation config."""
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, GenerationConfig, set_seed
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # saving would show one of its own
    config = make_config(arguments, dataset)
    set_seed(arguments.seed)
    auto_class = AutoModelForCausalLM if config.is_causal else AutoModelForMaskedLM
    model = auto_class.from_config(config, dtype=torch.float32)
    if arguments.zero_init_output_projections:
        zero_output_projections(model)
    if config.is_causal:
        ends, pad = end_token_ids(dataset.tokenizer), dataset.tokenizer.pad_token_id
        model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad, bos_token_id=None)
    return model.train()


def use_fast_attention(model: Any, device: str) -> None:
    """On a CPU, train with attention in blocks: torch's own kernel takes three times as long in bf16."""
    if device == "cpu":
        from hf_scratch_gpt.model.blocked_attention import IMPLEMENTATION

        model.set_attn_implementation(IMPLEMENTATION)


def cpu_training_of(model: Any, device: str, bf16: bool, sharded: bool) -> contextlib.AbstractContextManager[None]:
    """On a CPU in bf16, the model's faster ways to train for as long as it is entered; elsewhere nothing."""
    if device != "cpu" or not bf16 or sharded:  # a sharded weight's gradient has to meet FSDP's own hooks
        return contextlib.nullcontext()
    from hf_scratch_gpt.model.cpu_training import cpu_training

    return cpu_training(model)


def zero_output_projections(model: nn.Module) -> None:
    """Set the last matrix of each attention and feed-forward block to zero, so that a layer starts as the identity.

    A sure small gain in the records of small-GPT training (modded-nanogpt); the idea is muP's (arXiv:2203.03466).

    Raises:
        ValueError: if the model has no such matrices.
    """
    found = 0
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in _OUTPUT_PROJECTIONS and isinstance(module, nn.Linear):
            nn.init.zeros_(module.weight)
            found += 1
    if not found:
        raise ValueError(
            "zero_init_output_projections is on, but the model has no matrices named o_proj or down_proj; turn it off"
        )


class LanguageModelLoss(nn.Module):
    """A language model with its loss as one module, so that both compile and are wrapped together.

    Args:
        model: The causal or masked language model.
        bf16 (`bool`): Run the model under bf16 autocast; the loss itself is in fp32 either way.
        fp16 (`bool`, *optional*, defaults to `False`): Under fp16 autocast instead; see `LossScale`.
        z_loss (`float`, *optional*, defaults to `0.0`): Coefficient of the squared logarithm of the softmax's
            normaliser, which keeps logits from drifting (PaLM, https://arxiv.org/abs/2204.02311, section 5).
    """

    def __init__(self, model: nn.Module, bf16: bool, z_loss: float = 0.0, fp16: bool = False):
        super().__init__()
        self.model = model
        self.bf16 = bf16
        self.fp16 = fp16
        self.z_loss = z_loss

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """Summed cross entropy in nats of `labels` where they are not -100; without, of each next token of a window.

        All are of shape (batch, length); a label is what is predicted at its place. With `z_loss`, that coefficient
        times log(Z)^2 is added for each target.
        """
        # A causal model would shift labels once more; `shift_labels` is transformers' name for those that are.
        targets = {"labels": input_ids} if labels is None else {"labels": labels, "shift_labels": labels}
        dtype = torch.float16 if self.fp16 else torch.bfloat16
        with torch.autocast(input_ids.device.type, dtype=dtype, enabled=self.bf16 or self.fp16):
            return self.model(
                input_ids=input_ids,
                attention_mask=self._masks(position_ids),
                position_ids=position_ids,
                **targets,
                skip_logits=True,
                z_loss=self.z_loss,
                use_cache=False,
            ).loss

    def _masks(self, position_ids: Tensor | None) -> dict[str, Tensor] | None:
        """The mask of packed documents for attention in blocks, made once; elsewhere the model makes its own."""
        from hf_scratch_gpt.model.blocked_attention import IMPLEMENTATION
        from hf_scratch_gpt.model.cpu_training import document_mask

        config = self.model.config
        if position_ids is None or config._attn_implementation != IMPLEMENTATION or not config.is_causal:
            return None
        if set(config.layer_types) != {"full_attention"}:
            return None
        return {"full_attention": document_mask(position_ids)}


def wants_compile(arguments: PretrainArguments, parameters: int, device: str) -> bool:
    """Whether to try torch.compile. `auto`: on a GPU, or on a CPU with a C++ compiler if the run is long enough."""
    if arguments.compile != "auto":
        return arguments.compile == "true"
    if device == "cuda":
        return True
    seconds = arguments.max_minutes * 60
    if arguments.max_steps:
        tokens = arguments.max_steps * arguments.batch_size * arguments.context_length
        seconds = 6 * parameters * tokens / _ASSUMED_CPU_FLOPS
    if seconds < _COMPILE_PAYS_AFTER_SECONDS:
        return False
    names = [os.environ.get("CXX"), "g++", "clang++", "cl"]
    if not any(name and shutil.which(name) for name in names):
        logger.warning("no C++ compiler was found, so training is not compiled and about a fifth slower")
        return False
    return True


def try_compile(module: LanguageModelLoss, batch: dict[str, Tensor], required: bool) -> bool:
    """Compile `module` in place and prove it by one forward and backward pass over `batch`; leaves no gradients.

    Returns:
        Whether it is compiled: if compiling fails and is not `required`, it warns and the module runs as it is.

    Raises:
        ValueError: if it fails and is `required`.
    """
    # torch prints a page of its own warnings (cache sizes, max-autotune) that a user can do nothing about.
    logging.getLogger("torch._inductor").setLevel(logging.ERROR)
    module.compile()
    try:
        module(**batch).backward()
    except Exception as error:  # whatever the toolchain raises
        module._compiled_call_impl = None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if required:
            raise ValueError(f"compile is 'true', but torch.compile failed: {reason}") from error
        logger.warning("torch.compile failed, so training runs uncompiled and slower: %s", reason)
        return False
    finally:
        module.zero_grad(set_to_none=True)
    return True
