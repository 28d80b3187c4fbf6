"""Loads what is to be examined, or says in one line why that cannot be."""

from pathlib import Path
from typing import Any

from hf_scratch_gpt.hub.doctor.outcome import in_one_line
from hf_scratch_gpt.hub.doctor.subject import Subject
from hf_scratch_gpt.runs.loading import loading, quiet

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")


def load_subject(source: str, trust_remote_code: bool = False, fresh_process: bool = True) -> Subject:
    """The causal language model of a folder or Hub id, with its tokenizer if it has one.

    Args:
        source (`str`): A model folder, or a Hub id.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Let the model's own code run.
        fresh_process (`bool`, *optional*, defaults to `True`): See `Subject`.

    Raises:
        FileNotFoundError: if there is no such folder.
        OSError: if it is not to be had from the Hub.
        ValueError: if it is no model, no causal language model, damaged, or needs code that is not trusted.
    """
    import torch
    from transformers import AutoModelForCausalLM

    _require_model_folder(source)
    config = _load_config(source, trust_remote_code)
    _require_causal(source, config)
    with loading(source, "model"):
        model, info = AutoModelForCausalLM.from_pretrained(
            source, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
        )
    missing = sorted({*info["missing_keys"], *(entry[0] for entry in info.get("mismatched_keys", ()))})
    tokenizer, no_tokenizer, error = _load_tokenizer(source, trust_remote_code)
    with quiet():
        return Subject(model, missing, tokenizer, no_tokenizer, error, trust_remote_code, fresh_process)


def _require_model_folder(source: str) -> None:
    path = Path(source)
    if path.is_file():
        raise ValueError(f"{source}: expected a model folder, found a file")
    if path.is_dir() and not (path / "config.json").is_file():
        if (path / "adapter_config.json").is_file():
            raise ValueError(f"{source}: an adapter, not a model; make one of it by `scratch-gpt merge`")
        raise ValueError(f"{source}: not a model folder (it has no config.json)")
    if not path.exists() and (path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2):
        raise FileNotFoundError(f"{source}: no such model folder")


def _load_config(source: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    import hf_scratch_gpt.model  # noqa: F401  registers our classes with the Auto classes

    try:
        with loading(source, "config"):
            return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source}: the model brings code of its own, which runs only if you ask for it; read it, then give "
            "--trust-remote-code"
        ) from error


def _require_causal(source: str, config: Any) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    own = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    known = known[0] if isinstance(known, tuple | list) else known
    named = getattr(config, "architectures", None) or []
    if config.is_encoder_decoder or (own is None and known is None):
        found = ", ".join(named) or f"'{config.model_type}'"
        raise ValueError(f"{source}: {found} is no causal language model; doctor checks decoders with a language head")
    expected = {name for name in (own and own.split(".")[-1], known and known.__name__) if name}
    if named and not expected & set(named):
        raise ValueError(
            f"{source}: holds {', '.join(named)}, expected a causal language model ({' or '.join(sorted(expected))})"
        )


def _load_tokenizer(source: str, trust_remote_code: bool) -> tuple[Any, str, str]:
    """The tokenizer, why there is none, and what is wrong with loading it (each may be empty)."""
    from transformers import AutoTokenizer

    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in _TOKENIZER_FILES):
        return None, "the folder has no tokenizer", ""
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=False), "", ""
    except Exception as error:
        if not path.is_dir() and isinstance(error, OSError):
            return None, "the repository has no tokenizer", ""
        told = in_one_line(error)
    if not trust_remote_code:
        return None, "", told
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(source, trust_remote_code=True), "", told
    except Exception:
        return None, "", told
