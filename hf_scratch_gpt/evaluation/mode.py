"""The mode in which models are measured: no dropout, no gradients, no autocast, products in full fp32."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from hf_scratch_gpt.runs.process import exact_products


@contextmanager
def measuring(model: Any) -> Iterator[None]:
    """Put `model` into evaluation mode without gradients or autocast, and back into its own mode afterwards."""
    was_training = model.training
    model.eval()
    # A sharded model gathers its layers into memory that its training uses again, which inference tensors forbid.
    sharded = hasattr(model, "set_requires_gradient_sync")
    try:
        no_gradients = torch.no_grad() if sharded else torch.inference_mode()
        with no_gradients, torch.autocast(model.device.type, enabled=False), exact_products():
            yield
    finally:
        model.train(was_training)
        if sharded:
            model.reshard()  # weights that stay gathered would be used again after their slices have changed


def context_length_of(model: Any) -> int | None:
    """Number of positions that `model` has for text (`max_position_embeddings`), or `None` if it does not say.

    A tuned prefix takes its share of them.
    """
    context = getattr(model.config, "max_position_embeddings", None)
    return None if context is None else context - virtual_tokens_of(model)


def virtual_tokens_of(model: Any) -> int:
    """Tokens that a PEFT model puts before every text: those of a tuned prefix, or 0."""
    config = getattr(model, "active_peft_config", None) if hasattr(model, "peft_config") else None
    return config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0
