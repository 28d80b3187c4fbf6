"""Export to ONNX through transformers' own exporter, one graph with its cache: `write_onnx`.

The graph reads any number of rows and tokens after any number of cached ones, so the same file reads a prompt (with an
empty cache) and writes on, a token at a time. It computes in fp32 whatever dtype the weights were saved in: ONNX
Runtime has no bf16 on the CPU. The folder is what `transformers.exporters` loads back (`ExportedModel`).
"""

import contextlib
import copy
import importlib.util
import io
import logging
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from hf_scratch_gpt.runs.loading import quiet

FILE_NAME = "model.onnx"
# Their frequencies follow from the length of the input, which a graph of any length does not know.
_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
# Of the sample that is traced; an axis of 1 would be taken for a fixed one.
_ROWS, _PAST, _TOKENS = 2, 3, 4


def write_onnx(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """Write `model.onnx` with its weights, config, generation config and tokenizer into `folder`, and check it.

    Args:
        model (`ScratchGPTForCausalLM`): On the CPU, in evaluation mode; it is not changed.
        tokenizer (`PreTrainedTokenizerBase` or `None`): Saved beside the graph.
        folder (`Path`): An empty folder.

    Returns:
        `dict[str, Any]`: `checked_with`, and, where ONNX Runtime ran the file, `largest_logit_difference` (a share of
        the logits' largest absolute value where that is above 1); else `not_checked_with`.

    Raises:
        ValueError: if a graph of any length cannot express the model (the message names the field), if its logits
            differ, or if the exporter's packages are missing.
    """
    _check_packages()
    _check_config(model.config)
    model = copy.deepcopy(model).float().eval()
    model.config.dtype = torch.float32
    with _silence():
        exported = _export(model)
        exported.generation_config = model.generation_config
        exported.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    import onnx

    onnx.checker.check_model(str(Path(folder) / FILE_NAME))
    figures = {"checked_with": f"onnx {version('onnx')}"}
    if importlib.util.find_spec("onnxruntime") is None:
        return figures | {"not_checked_with": "onnxruntime (it is not installed)"}
    from hf_scratch_gpt.hub.conversion.onnx_runtime import compare_with_onnxruntime

    figures["checked_with"] += f", onnxruntime {version('onnxruntime')}"
    return figures | compare_with_onnxruntime(Path(folder) / FILE_NAME, model)


def _check_packages() -> None:
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"export to onnx needs {' and '.join(missing)}: pip install 'hf_scratch_gpt[export]'")


def _check_config(config: Any) -> None:
    if not config.is_causal:
        raise ValueError("ONNX export writes a language model with a cache; `is_causal` = False has none")
    rope_type = (config.rope_parameters or {}).get("rope_type", "default")
    if rope_type not in _ROPE_TYPES:
        raise ValueError(
            f"ONNX cannot express `rope_parameters['rope_type']` = {rope_type!r}, whose frequencies depend on the "
            f"length of the input; one graph of any length has one of: {', '.join(_ROPE_TYPES)}"
        )


def _export(model: Any) -> Any:
    """The `ExportedModel` of a cached forward in which rows, cached tokens and new tokens are free."""
    from transformers import DynamicCache
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    from hf_scratch_gpt.model.cache_name import CACHE_NAME

    config = model.config
    rows, past_tokens, tokens = (torch.export.Dim(name) for name in ("rows", "past_tokens", "tokens"))
    # Without the config all layers keep their whole past, and the mask alone draws the window: that traces.
    cache = DynamicCache()
    for layer in range(config.num_hidden_layers):
        past = torch.zeros(_ROWS, config.num_key_value_heads, _PAST, config.head_dim)
        cache.update(past, past.clone(), layer)
    mask = torch.ones(_ROWS, _PAST + _TOKENS, dtype=torch.long)
    mask[0, 0] = 0  # padding, lest the trace learn that there is none
    inputs = {
        "input_ids": torch.zeros(_ROWS, _TOKENS, dtype=torch.long),
        "attention_mask": mask,
        CACHE_NAME: cache,
        "use_cache": True,
    }
    shapes = {
        "input_ids": {0: rows, 1: tokens},
        "attention_mask": {0: rows, 1: torch.export.Dim.AUTO},
        CACHE_NAME: [{0: rows, 2: past_tokens}] * (2 * config.num_hidden_layers),
    }
    exported = OnnxExporter().export(model, inputs, OnnxConfig(dynamic=True, dynamic_shapes=shapes))
    _forget_sources(exported.program)
    return exported


def _forget_sources(program: Any) -> None:
    """Take out of the graph the source lines that each node came from: this machine's paths, and most of its size."""
    for graph in program.graphs():
        for node in graph:
            node.metadata_props.clear()
            for value in node.outputs:
                value.metadata_props.clear()
        for value in [*graph.inputs, *graph.initializers.values()]:
            value.metadata_props.clear()
    program.metadata_props.clear()
    program.graph.metadata_props.clear()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Without torch.onnx's progress on standard output, and its notes on packages and versions of its own."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with quiet(), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
