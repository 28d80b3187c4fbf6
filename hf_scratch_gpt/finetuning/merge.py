"""Merge an adapter into its base model: `scratch-gpt merge ADAPTER_DIR OUTPUT_DIR [--base BASE] [--dtype DTYPE]`.

The merged model is written, loaded anew, and compared with the adapter on its base: their logits must agree within
what the weights' type can tell apart. Its folder is a run's, so that a card tells of the adapter's run and the base's.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_scratch_gpt.evaluation.adapters import (
    MERGED_ADAPTERS,
    adapter_digest,
    find_base,
    is_classifier,
    labels_of,
    load_adapter,
    read_adapter_config,
    run_of,
)
from hf_scratch_gpt.finetuning.models import (
    MERGE_TOLERANCE,
    UNMERGEABLE,
    check_model_source,
    load_model,
    logits_of,
    save_model,
)
from hf_scratch_gpt.runs import StageRun
from hf_scratch_gpt.runs.command_line import CommandParser
from hf_scratch_gpt.runs.files import remove_folder
from hf_scratch_gpt.runs.folder import STATE
from hf_scratch_gpt.runs.loading import loading

_SAMPLE_ROWS, _SAMPLE_LENGTH = 4, 16
# Largest change of a logit, as a share of the logits' scale, that rounding the weights to a type explains: a relative
# 2^-12 (fp16) and 2^-9 (bf16) a weight gave 5e-4 and 5e-3 on a model of 4 layers, and grows with depth.
TOLERANCES = {"float32": MERGE_TOLERANCE, "float16": 5e-3, "bfloat16": 4e-2}
_CALIBRATION, _LABELS = ("reward_mean", "reward_std"), ("problem_type",)


@dataclasses.dataclass
class MergeArguments:
    """Settings of `merge`.

    Args:
        adapter (`str`): Folder with `adapter_config.json`.
        output_dir (`str`): Folder that is written.
        base (`str`): The base model.
        dtype (`str`, *optional*, defaults to `"float32"`): Type of the merged weights.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("adapter_run", "base")

    adapter: str
    output_dir: str
    base: str
    dtype: str = "float32"

    @property
    def adapter_run(self) -> str:
        """The run that trained the adapter, or the adapter's own folder: what the lineage names."""
        return str(run_of(self.adapter))


def merge(adapter: str | Path, output: str | Path, base: str | None = None, dtype: str = "float32") -> Path:
    """Write the merged model of `adapter` to `output`, checked by its logits against the adapter on its base.

    Raises:
        FileNotFoundError: if the adapter or its base is missing.
        ValueError: if `adapter` is not an adapter, is one that cannot be merged or is in its base already, `output`
            exists, or the merge changes the logits.
    """
    if dtype not in TOLERANCES:
        raise ValueError(f"'dtype' is '{dtype}', expected one of {', '.join(TOLERANCES)}")
    method = read_adapter_config(adapter)["peft_type"]
    if method in UNMERGEABLE:
        raise ValueError(
            f"{adapter}: is of {UNMERGEABLE[method]}, which cannot be merged into weights; chat, evaluate and "
            "peft's AutoPeftModelForCausalLM load it as it is"
        )
    if Path(output).exists() and not (Path(output) / STATE).is_file():
        raise ValueError(f"{output}: exists already; merge into a new folder")
    base = find_base(adapter, base)
    check_model_source(base)
    model, sample, before = _merge(Path(adapter), base)
    try:
        with StageRun(MergeArguments(str(adapter), str(output), base, dtype), "merge") as stage_run:
            tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(Path(adapter), base))
            save_model(model.to(getattr(torch, dtype)), tokenizer, stage_run.folder)
            stage_run.finish(_compare(type(model), stage_run.folder, sample, before, dtype))
    except MergeError:
        remove_folder(Path(output))
        raise
    return Path(output)


class MergeError(ValueError):
    """The merged model is not what the adapter on its base is."""


def _check_not_merged(adapter: str | Path, config: Any, base: str) -> None:
    if adapter_digest(adapter) in (getattr(config, MERGED_ADAPTERS, None) or []):
        raise ValueError(f"{base}: has this adapter ({adapter}) in its weights already; it cannot be merged twice")


def _merge(adapter: Path, base: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The merged model in fp32, random token ids, and their logits under the adapter on its base."""
    with loading(base, "config"):
        config = AutoConfig.from_pretrained(base)
    _check_not_merged(adapter, config, base)
    merged_before = list(getattr(config, MERGED_ADAPTERS, None) or [])
    auto_class = AutoModelForSequenceClassification if is_classifier(adapter) else AutoModelForCausalLM
    config = _config_to_merge_into(adapter, config)
    model = load_adapter(auto_class, adapter, base, dtype=torch.float32, config=config)
    sample = _probe(model.config.get_text_config().vocab_size)
    before = logits_of(model, sample)
    merged = model.merge_and_unload(safe_merge=True)
    merged.config.update({MERGED_ADAPTERS: [*merged_before, adapter_digest(adapter)]})
    return merged, sample, before


def _compare(model_class: Any, folder: Path, sample: torch.Tensor, before: torch.Tensor, dtype: str) -> dict[str, Any]:
    """How far the logits of the model in `folder` are from those of `before`; raises if that is no rounding."""
    error = relative_error(logits_of(load_model(model_class, str(folder)), sample), before)
    if not error <= TOLERANCES[dtype]:
        raise MergeError(
            f"merging changed the logits by {error:.2g} of their scale (at most {TOLERANCES[dtype]:g} is rounding to "
            f"{dtype}): keep the adapter and load it with peft"
        )
    return {"logit_error": error, "logit_tolerance": TOLERANCES[dtype], "dtype": dtype}


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference of logits as a share of their scale, or of 1 where that is less."""
    return (found - expected).abs().max().item() / max(1.0, expected.abs().max().item())


def _config_to_merge_into(adapter: Path, config: Any) -> Any:
    """The merged model's config: its base's, with what training added, which the adapter's run tells.

    That is labels, a reward model's calibration, and what else the base's config does not have. Of an adapter that has
    left its run, only the number of labels is known, and the base's calibration would be another model's.
    """
    run = run_of(adapter)
    if is_classifier(adapter):
        config.num_labels = labels_of(adapter)
        for name in _CALIBRATION:
            if hasattr(config, name):
                delattr(config, name)
    if run != adapter and (run / "config.json").is_file():
        with loading(run, "config"):
            trained = AutoConfig.from_pretrained(run)
        known = config.to_dict()
        added = {name: value for name, value in trained.to_dict().items() if name not in known or name in _LABELS}
        if is_classifier(adapter):
            added = {**added, "id2label": trained.id2label, "label2id": trained.label2id}
        config.update(added)
    return config


def _tokenizer_folder(adapter: Path, base: str) -> str:
    """Where the tokenizer is: of the adapter's run, which may have another chat template, or of the base."""
    for folder in (adapter, run_of(adapter)):
        if (folder / "tokenizer_config.json").is_file():
            return str(folder)
    return base


def _probe(vocab_size: int) -> torch.Tensor:
    """Random token ids on which the merge is checked."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab_size, (_SAMPLE_ROWS, _SAMPLE_LENGTH), generator=generator)


def main(arguments: Sequence[str]) -> int:
    """Entry point of `scratch-gpt merge`."""
    parser = CommandParser(prog="scratch-gpt merge", description=__doc__)
    parser.add_argument("adapter", help="folder with adapter_config.json, such as RUN/adapter")
    parser.add_argument("output", help="folder to write the merged model to")
    parser.add_argument("--base", help="base model; default: the one that the adapter was trained on")
    parser.add_argument("--dtype", default="float32", help=f"type of the weights: {', '.join(TOLERANCES)}")
    options = parser.parse_args(arguments)
    print(f"merged: {merge(options.adapter, options.output, options.base, options.dtype)}")
    return 0
