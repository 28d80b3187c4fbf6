"""Loads what is to be measured: any causal model or reward model of transformers, in fp32, with its tokenizer."""

from pathlib import Path
from typing import Any


def load_model(folder: str, **settings: Any) -> tuple[Any, Any]:
    """The causal model of `folder` in fp32, on the GPU if there is one, and its tokenizer.

    Raises:
        FileNotFoundError: if `folder` looks like a path and holds no model.
    """
    from transformers import AutoModelForCausalLM

    return _load(AutoModelForCausalLM, folder, **settings)


def load_reward_model(folder: str) -> tuple[Any, Any]:
    """The reward model of `folder`, as `load_model`.

    Raises:
        ValueError: if it has more than one label.
    """
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = _load(AutoModelForSequenceClassification, folder)
    if model.config.num_labels != 1:
        raise ValueError(f"{folder}: a reward model has one label, this one has {model.config.num_labels}")
    return model, tokenizer


def _load(auto_class: Any, folder: str, **settings: Any) -> tuple[Any, Any]:
    import torch
    from transformers import AutoTokenizer
    from transformers.utils import logging as transformers_logging

    import hf_scratch_gpt.model  # noqa: F401  registers our classes with the Auto classes

    require_folder(folder)
    transformers_logging.disable_progress_bar()  # a bar of its own for each file read
    model = auto_class.from_pretrained(folder, dtype=torch.float32, **settings)
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), AutoTokenizer.from_pretrained(folder)


def require_folder(folder: str) -> None:
    """Check that `folder` holds a model, unless it can only be a Hub id.

    Raises:
        FileNotFoundError: if it does not.
    """
    path = Path(folder)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(f"{folder}: holds no model (it has no config.json)")
    if not path.exists() and (path.is_absolute() or folder.startswith(".") or len(path.parts) != 2):
        raise FileNotFoundError(f"{folder}: no such model folder")
