"""Adapter folders: which base model they were trained on, where it is now, and both loaded as one model.

An adapter is a difference and nothing without its base. So beside PEFT's own files it has `base_model.json`: how the
base was named, the run that made it, and the digests of its weights. By these the base is found again after folders
have moved, and is told from a base that was made anew, or that has the adapter in its weights already.
"""

import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hf_scratch_gpt.evaluation.mode import virtual_tokens_of
from hf_scratch_gpt.runs import read_json, read_metrics, write_json
from hf_scratch_gpt.runs.checkpoints import hash_file
from hf_scratch_gpt.runs.identity import METRICS, describe_input
from hf_scratch_gpt.runs.loading import check_whole, loading

logger = logging.getLogger(__name__)

ADAPTER_CONFIG, ADAPTER_WEIGHTS, BASE_RECORD = "adapter_config.json", "adapter_model.safetensors", "base_model.json"
# A field of a model's config: digests of the adapters that are in its weights, its ancestors' included.
MERGED_ADAPTERS = "merged_adapters"


def is_adapter(source: str | Path) -> bool:
    """Whether `source` is the folder of an adapter without a model."""
    return (Path(source) / ADAPTER_CONFIG).is_file() and not (Path(source) / "config.json").is_file()


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """The `adapter_config.json` of an adapter folder.

    Raises:
        FileNotFoundError: if there is no such folder.
        ValueError: if it is not an adapter, or is a model that is merged already.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no such adapter folder: {folder}")
    if not (folder / ADAPTER_CONFIG).is_file():
        if (folder / "config.json").is_file():
            inner = f" (its adapter is in {folder / 'adapter'})" if (folder / "adapter").is_dir() else ""
            raise ValueError(f"{folder}: already a plain model, with nothing left to merge{inner}")
        raise ValueError(f"{folder}: not an adapter folder (it has no {ADAPTER_CONFIG})")
    config = read_json(folder / ADAPTER_CONFIG)
    if not isinstance(config, dict) or not isinstance(config.get("peft_type"), str):
        raise ValueError(f"{folder / ADAPTER_CONFIG}: names no 'peft_type', so it is not the config of an adapter")
    return config


def adapter_digest(folder: str | Path) -> str:
    """What an adapter is known by: the digest of its weights.

    Raises:
        ValueError: if it has none.
    """
    path = Path(folder) / ADAPTER_WEIGHTS
    if not path.is_file():
        raise ValueError(f"{folder}: has no weights ({ADAPTER_WEIGHTS})")
    return hash_file(path)


def weight_digests(folder: str | Path) -> dict[str, str]:
    """SHA-256 of each file of weights of a model folder; empty for what is no folder."""
    return {path.name: hash_file(path) for path in sorted(Path(folder).glob("*.safetensors"))}


def record_base(folder: str | Path, base: str) -> None:
    """Write `base_model.json` of the adapter in `folder`, which was trained on the model `base`."""
    write_json(Path(folder) / BASE_RECORD, {**describe_input(base), "weights": weight_digests(base)})


def find_base(adapter: str | Path, asked: str | None = None) -> str:
    """The base model of an adapter: the one asked for, or the recorded one, where it is now.

    Looked at are the recorded path as it is, below each folder above the adapter, and beside the adapter's run; a
    folder counts if its weights are those that the adapter was trained on. A base that is `asked` for counts anyhow,
    with a warning where its weights are others.

    Raises:
        FileNotFoundError: if it is nowhere.
        ValueError: if the config names none, or the base has been made anew.
    """
    adapter = Path(adapter)
    named = read_adapter_config(adapter).get("base_model_name_or_path")
    recorded = _read_record(adapter)
    if asked:
        if recorded and (found := weight_digests(asked)) and found != recorded:
            logger.warning("%s: was trained on other weights than those of %s", adapter, asked)
        return asked
    if not named:
        raise ValueError(f"{adapter}: its config names no base model; give it with --base")
    places = [str(place) for place in _places(adapter, named)]
    for place in places:
        if not recorded or weight_digests(place) == recorded:
            return place
    if places:
        raise ValueError(
            f"{adapter}: was trained on {named}, but the weights of {places[0]} are others, made since; give the "
            "model that it was trained on with --base"
        )
    if Path(named).is_absolute() or named.startswith((".", "~")) or named.count("/") != 1:
        raise FileNotFoundError(f"{adapter}: no such model folder as its base {named}; give it with --base")
    return named  # an id of the Hub


def _read_record(adapter: Path) -> dict[str, str]:
    """Digests of the base's weights, or nothing for an adapter that was not made here."""
    if not (adapter / BASE_RECORD).is_file():
        return {}
    record = read_json(adapter / BASE_RECORD)
    weights = record.get("weights") if isinstance(record, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"{adapter / BASE_RECORD}: damaged, it has no 'weights'")
    return weights


def _places(adapter: Path, named: str) -> Iterator[Path]:
    """Model folders that the recorded path may mean."""
    above = list(Path(adapter.absolute()).parents)
    tried = [Path(named), *(folder / named for folder in above), *(folder / Path(named).name for folder in above[:2])]
    for place in dict.fromkeys(tried):
        if (place / "config.json").is_file():
            yield place


def load_adapter(auto_class: Any, folder: str | Path, base: str | None = None, **settings: Any) -> Any:
    """The `PeftModel` of an adapter on its base, for use and not for training; settings are of `from_pretrained`.

    Raises:
        OSError, ValueError: if one of them is missing or damaged, or they do not fit each other.
    """
    from peft import PeftModel
    from transformers import GenerationConfig

    import hf_scratch_gpt.model.bottleneck_adapters  # noqa: F401  our classes for transformers and PEFT

    base = find_base(folder, base)
    if is_classifier(folder) and "config" not in settings:
        settings.setdefault("num_labels", labels_of(folder))
    with loading(base, "model"):
        model, info = auto_class.from_pretrained(base, use_safetensors=True, output_loading_info=True, **settings)
    is_new = (lambda name: not name.startswith(f"{model.base_model_prefix}.")) if is_classifier(folder) else None
    check_whole(base, info, is_new)
    if (Path(folder) / "generation_config.json").is_file() and hasattr(model, "generation_config"):
        model.generation_config = GenerationConfig.from_pretrained(folder)  # it knows the ends of turns
    return attach(PeftModel, model, folder, base)


def tokenizer_source(source: str) -> str:
    """Where the tokenizer of a model or adapter folder is: there, or else beside the adapter's base."""
    if is_adapter(source) and not (Path(source) / "tokenizer_config.json").is_file():
        return find_base(source)
    return source


def without_prefix(model: Any, rows: int) -> tuple[Any, Any, int]:
    """What decoding with a cache of its own starts from: the plain model, its cache, and the virtual tokens in it.

    PEFT's `forward` of prefix tuning puts its prefix in place of every cache that it is given. For any other model
    this is the model itself, no cache, and 0.
    """
    virtual = virtual_tokens_of(model)
    if not virtual:
        return model, None, 0
    if model.active_peft_config.peft_type != "PREFIX_TUNING":
        raise ValueError(f"decoding serves prefix tuning, found {model.active_peft_config.peft_type}")
    return model.get_base_model(), model.get_prompt(rows), virtual


def attach(peft_class: Any, model: Any, folder: str | Path, base: str) -> Any:
    """`peft_class.from_pretrained` with errors of one line.

    Raises:
        ValueError: if the adapter does not fit the model, or lacks weights.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return peft_class.from_pretrained(model, folder)
    except (UserWarning, KeyError) as error:
        raise ValueError(f"{folder}: lacks weights that its config asks for ({str(error)[:160]})") from error
    except (RuntimeError, ValueError) as error:  # torch's message for shapes that differ spans many lines
        reason = " ".join(str(error).split())
        raise ValueError(f"{folder} does not fit the base model {base}: {reason[:300]}") from error


def is_classifier(folder: str | Path) -> bool:
    """Whether an adapter is of a classifier or reward model, which has a trained head among its weights."""
    return read_adapter_config(folder).get("task_type") == "SEQ_CLS"


def labels_of(folder: str | Path) -> int:
    """Number of labels of the head that a classifier's adapter was trained with.

    Raises:
        ValueError: if it has no head among its weights.
    """
    from safetensors import SafetensorError, safe_open

    adapter_digest(folder)  # the file is there
    try:
        with safe_open(Path(folder) / ADAPTER_WEIGHTS, framework="pt") as weights:
            for name in weights.keys():  # noqa: SIM118  it is no dictionary
                if name.endswith(("score.weight", "classifier.weight")):
                    return int(weights.get_slice(name).get_shape()[0])
    except SafetensorError as error:
        raise ValueError(f"{folder}: its weights are damaged ({error})") from error
    raise ValueError(f"{folder}: its weights have no trained head ('score'), so its labels are not known")


def run_of(adapter: str | Path) -> Path:
    """The run that an adapter is of: the folder above `RUN/adapter`, or else the adapter's own."""
    folder = Path(adapter)
    above = Path(folder.absolute()).parent
    if folder.absolute().name == "adapter" and (above / METRICS).is_file() and read_metrics(above):
        return folder.parent if str(folder.parent) != "." else above
    return folder
