"""Loading the model to tune, and writing the tuned one: merged, checked and complete."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

import hf_scratch_gpt.model  # noqa: F401  # registers our classes with the Auto classes
from hf_scratch_gpt.evaluation.adapters import MERGED_ADAPTERS, adapter_digest, attach, is_adapter, record_base
from hf_scratch_gpt.runs.loading import check_tokens_fit, check_whole, check_writes_text, loading, quiet
from hf_scratch_gpt.runs.process import exact_products

ADAPTER_FOLDER = "adapter"
# By PEFT's name: what cannot be merged into the weights, in words.
UNMERGEABLE = {"PREFIX_TUNING": "prefix tuning", "BOTTLENECK": "bottleneck adapters"}
# Merging adds the low-rank update to the weight before instead of after the product: equal up to fp32 rounding, which
# was 1e-6 of the logits' scale; a forward that is still in bf16 autocast shows as 3e-3.
MERGE_TOLERANCE = 1e-4


def check_model_source(source: str) -> None:
    """Refuse a local folder that holds no model before the library takes it for a Hub id.

    Raises:
        FileNotFoundError: if it looks like a path and is missing.
        ValueError: if it is a file, or a folder without config.json.
    """
    path = Path(source)
    if path.is_file():
        raise ValueError(f"{source}: expected a model folder, found a file")
    if path.is_dir():
        if is_adapter(path):
            raise ValueError(f"{source}: an adapter without a model; tune its base, or what `scratch-gpt merge` makes")
        if not (path / "config.json").is_file():
            raise ValueError(f"{source}: not a model folder (it has no config.json)")
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise FileNotFoundError(f"no such model folder: {source}")


def load_tokenizer(source: str) -> Any:
    """The tokenizer beside a model, fit for tuning.

    Raises:
        ValueError: if it has no chat template, no end token, or pads with an end token, which would hide the ends of
            answers from the loss and from reward models.
    """
    check_model_source(source)
    with loading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer.chat_template is None:
        raise ValueError(f"{source}: its tokenizer has no chat template; conversations cannot be rendered")
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{source}: its tokenizer has no end token (eos_token)")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"{source}: its tokenizer needs a pad token of its own, distinct from the end token")
    return tokenizer


def load_model(auto_class: Any, source: str, tokenizer: Any = None, **options: Any) -> Any:
    """`auto_class.from_pretrained(source)` in fp32 on the CPU, aligned with `tokenizer`; remote code stays off.

    `options` of `from_pretrained` may say otherwise, such as a quantisation.

    Raises:
        OSError, ValueError: if it cannot be loaded, lacks weights (a classifier's head may be new), or has fewer
            embeddings than the tokenizer has tokens.
    """
    check_model_source(source)
    with loading(source, "model"):
        model, info = auto_class.from_pretrained(
            source, **{"dtype": torch.float32, "use_safetensors": True, "output_loading_info": True, **options}
        )
    head_may_be_new = auto_class is AutoModelForSequenceClassification
    trunk = f"{model.base_model_prefix}."  # whose pooler, between it and the head, encoders may be saved without
    check_whole(
        source, info, lambda name: head_may_be_new and (not name.startswith(trunk) or f"{trunk}pooler." in name)
    )
    if tokenizer is not None:
        check_tokens_fit(source, model, tokenizer)
        align_tokens(model, tokenizer)
    return model


def save_model(model: Any, tokenizer: Any, folder: str | Path) -> None:
    """Write a plain model with its tokenizer, and a generation config that knows the tokenizer's end tokens."""
    align_tokens(model, tokenizer)
    with quiet():
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation_config_for(tokenizer).save_pretrained(folder)


def context_length(source: str, asked: int | None) -> int:
    """Longest row in tokens: `max_length` if given, else the model's context.

    Raises:
        ValueError: if `max_length` exceeds the context, or the model is a masked language model.
    """
    check_model_source(source)
    with loading(source, "config"):
        config = AutoConfig.from_pretrained(source)
    check_writes_text(source, config)
    context = getattr(config, "max_position_embeddings", None)
    if asked is None:
        if context is None:
            raise ValueError(f"{source}: its config names no max_position_embeddings; set max_length")
        return context
    if context is not None and asked > context:
        raise ValueError(f"'max_length' is {asked}, but {source} has a context of {context} tokens")
    return asked


def generation_config_for(tokenizer: Any) -> GenerationConfig:
    """Generation stops at the turn's end and at the document's; padding is its own token."""
    ends = [tokenizer.eos_token_id]
    document_end = tokenizer.get_vocab().get("<|endoftext|>")
    if document_end is not None and document_end not in ends:
        ends.append(document_end)
    return GenerationConfig(eos_token_id=ends, pad_token_id=tokenizer.pad_token_id)


def logits_of(model: Any, input_ids: torch.Tensor) -> torch.Tensor:
    """Logits (fp32, on the CPU) in evaluation mode, without autocast, dropout or gradients."""
    was_training = model.training
    model.eval()
    with torch.no_grad(), torch.autocast(input_ids.device.type, enabled=False), exact_products():
        logits = model(input_ids=input_ids).logits.float().cpu()
    model.train(was_training)
    return logits


def merge_adapter(model: Any, input_ids: torch.Tensor) -> Any:
    """Merge a `PeftModel`'s adapter into its base and prove by the logits of `input_ids` that nothing else changed.

    Raises:
        ValueError: if a merged weight is not finite, or the logits move by more than `MERGE_TOLERANCE` of their scale.
    """
    input_ids = input_ids.to(model.device)
    before = logits_of(model, input_ids)
    merged = model.merge_and_unload(safe_merge=True)
    after = logits_of(merged, input_ids)
    error = (after - before).abs().max().item() / max(1.0, before.abs().max().item())
    if not error <= MERGE_TOLERANCE:
        raise ValueError(
            f"merging changed the logits by {error:.2g} of their scale (at most {MERGE_TOLERANCE:g} is rounding): "
            "keep the adapter and load it with peft"
        )
    return merged


def save_tuned(model: Any, tokenizer: Any, folder: str | Path, sample: list[list[int]]) -> Any:
    """Write a complete model folder: the merged model, its tokenizer and generation config, and `adapter/` if any.

    An adapter that cannot be merged is the folder itself, without a model: the base that it names is that.

    Args:
        model: The trained model, a `PeftModel` or a plain one.
        tokenizer: Saved beside it.
        folder: Where to.
        sample: Rows of token ids on which the merge is checked.

    Returns:
        The plain model that was saved, or the `PeftModel` of what cannot be merged.

    Raises:
        ValueError: if the merge changes the logits.
    """
    folder = Path(folder)
    if hasattr(model, "peft_config"):
        if model.active_peft_config.peft_type in UNMERGEABLE:
            return _save_unmerged(model, tokenizer, folder)
        save_adapter(model, folder / ADAPTER_FOLDER)
        merged_before = list(getattr(model.config, MERGED_ADAPTERS, None) or [])
        model = merge_adapter(_on_exact_base(model, folder / ADAPTER_FOLDER), _rectangle(sample))
        model.config.update({MERGED_ADAPTERS: [*merged_before, adapter_digest(folder / ADAPTER_FOLDER)]})
    vars(model).pop("forward", None)  # TRL bound its own to the instance
    if hasattr(model.config, "use_cache"):
        model.config.use_cache = True  # the Trainer switched it off for training
    save_model(model, tokenizer, folder)
    return model


def save_adapter(model: Any, folder: Path) -> None:
    """Write a `PeftModel`'s adapter, and what its base is known by."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)  # peft's card template, unfilled
    record_base(folder, model.active_peft_config.base_model_name_or_path)


def _save_unmerged(model: Any, tokenizer: Any, folder: Path) -> Any:
    base = model.get_base_model()
    vars(base).pop("forward", None)  # TRL bound its own to the instance
    if hasattr(base.config, "use_cache"):
        base.config.use_cache = True  # the Trainer switched it off for training
    align_tokens(base, tokenizer)
    save_adapter(model, folder)
    tokenizer.save_pretrained(folder)
    generation_config_for(tokenizer).save_pretrained(folder)
    return model


def _on_exact_base(model: Any, adapter: Path) -> Any:
    """The same adapter on its base in fp32, if it was trained on a base in 4 bits: into that nothing can be merged."""
    if not getattr(model, "is_loaded_in_4bit", False):
        return model
    from peft import PeftModel

    source = model.active_peft_config.base_model_name_or_path
    return attach(PeftModel, load_model(AutoModelForCausalLM, source), adapter, source)


def align_tokens(model: Any, tokenizer: Any) -> None:
    """Let the model's configs name the tokenizer's end and padding tokens."""
    config = model.config.get_text_config()
    config.eos_token_id, config.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    if getattr(model, "generation_config", None) is not None:
        model.generation_config = generation_config_for(tokenizer)


def _rectangle(rows: list[list[int]]) -> torch.Tensor:
    """Rows cut to the shortest one's length."""
    shortest = min(len(row) for row in rows)
    return torch.tensor([row[:shortest] for row in rows])
