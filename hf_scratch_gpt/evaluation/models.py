"""Loads what is to be measured: any causal model or reward model of transformers, in fp32, with its tokenizer."""

from pathlib import Path
from typing import Any

from hf_scratch_gpt.evaluation.adapters import find_base, is_adapter, labels_of, load_adapter, tokenizer_source
from hf_scratch_gpt.runs.loading import check_language_model, check_tokens_fit, check_whole, loading


def load_model(folder: str, **settings: Any) -> tuple[Any, Any]:
    """The causal model of `folder` in fp32, on the GPU if there is one, and its tokenizer.

    Raises:
        FileNotFoundError: if `folder` looks like a path and holds no model.
        OSError, ValueError: if it cannot be loaded, is no causal model, or model and tokenizer do not belong together.
    """
    from transformers import AutoModelForCausalLM

    check_language_model(folder, load_config(folder))
    return _load(AutoModelForCausalLM, folder, **settings)


def load_reward_model(folder: str) -> tuple[Any, Any]:
    """The reward model of `folder`, as `load_model`.

    Raises:
        ValueError: if it has more than one label.
    """
    from transformers import AutoModelForSequenceClassification

    check_one_label(folder)
    return _load(AutoModelForSequenceClassification, folder)


def check_one_label(folder: str) -> None:
    """Refuse what is no reward model by its config, before anything is measured.

    Raises:
        OSError, ValueError: if there is no model, or it has more than one label.
    """
    labels = labels_of(folder) if is_adapter(folder) else load_config(folder).num_labels
    if labels != 1:
        raise ValueError(f"{folder}: a reward model has one label, this one has {labels}")


def load_config(folder: str) -> Any:
    """The config of the model of `folder`.

    Raises:
        OSError, ValueError: if there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    import hf_scratch_gpt.model  # noqa: F401  registers our classes with the Auto classes

    require_folder(folder)
    source = find_base(folder) if is_adapter(folder) else folder
    with loading(source, "config"):
        return AutoConfig.from_pretrained(source)


def _load(auto_class: Any, folder: str, **settings: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer

    import hf_scratch_gpt.model  # noqa: F401  registers our classes with the Auto classes

    require_folder(folder)
    if is_adapter(folder):
        model = load_adapter(auto_class, folder, dtype=torch.float32, **settings)
    else:
        with loading(folder, "model"):
            model, info = auto_class.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True, **settings
            )
        check_whole(folder, info)
    with loading(folder, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(folder))
    check_tokens_fit(folder, model, tokenizer)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer


def require_folder(folder: str) -> None:
    """Check that `folder` holds a model, unless it can only be a Hub id.

    Raises:
        FileNotFoundError: if it does not.
        ValueError: if it is a file.
    """
    path = Path(folder)
    if path.is_file():
        raise ValueError(f"{folder}: expected a model folder, found a file")
    if path.is_dir() and not (path / "config.json").is_file() and not is_adapter(path):
        raise FileNotFoundError(f"{folder}: holds no model (it has no config.json)")
    if not path.exists() and (path.is_absolute() or folder.startswith(".") or len(path.parts) != 2):
        raise FileNotFoundError(f"{folder}: no such model folder")
