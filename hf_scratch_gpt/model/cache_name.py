# SPDX-License-Identifier: Apache-2.0
"""The name of the key-value cache, which transformers 5.24 changed from `past_key_values` to `cache`.

It is the name of the argument that `generate` passes to `forward` and of the field that it reads in what comes back,
and of the argument of the mask functions and of the checkpointed layers. This is the only place that decides which of
the two the installed transformers uses. The file travels to the Hub beside the model.
"""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import Cache
from transformers.generation.continuous_batching.cache import PagedAttentionCache
from transformers.modeling_outputs import BaseModelOutputWithPast

OLD_NAME, NEW_NAME = "past_key_values", "cache"
# Asked of the code and not of a version's number, which a development version shares with its neighbours.
_RENAMED = NEW_NAME in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
CACHE_NAME = NEW_NAME if _RENAMED else OLD_NAME


def given_cache(cache: Cache | None, past_key_values: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The cache that `forward` was given, under either name.

    Args:
        cache: What it was given as `cache`.
        past_key_values: What it was given as `past_key_values`.
        others (`dict`): Its other keyword arguments, which go down to the attention function. Before 5.24 the paged
            cache of continuous batching goes there too, as `cache`: it is put back.

    Raises:
        ValueError: if a cache was given under both names or under a third one.
    """
    if cache is not None and past_key_values is not None:
        # Also from `generate` with the other name than its own, beside which it makes a cache under its own.
        raise ValueError(
            f"`{NEW_NAME}` and `{OLD_NAME}` are two names of one argument, and both were given; "
            f"give `{CACHE_NAME}` alone, as transformers calls it here"
        )
    for name, value in others.items():
        if isinstance(value, Cache):
            raise ValueError(f"`{name}` is a key-value cache, expected as `{CACHE_NAME}`; rename the argument")
    cache = past_key_values if cache is None else cache
    if CACHE_NAME == OLD_NAME and isinstance(cache, PagedAttentionCache):
        others[NEW_NAME] = cache
        return None
    return cache


def is_paged(cache: Cache | None, others: dict[str, Any]) -> bool:
    """Whether a row holds many requests with one paged cache (continuous batching); takes what `given_cache` left."""
    return isinstance(others.get(NEW_NAME, cache), PagedAttentionCache)


def cache_argument(model: Any) -> str:
    """The name under which any model's `forward` takes its cache; a wrapper's is that of the model inside.

    Raises:
        ValueError: if it takes none.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model  # an adapter's wrapper passes all on
    # Of the class: a hook that replaces an instance's own `forward` may hide what that names.
    parameters: Mapping[str, inspect.Parameter] = inspect.signature(type(inner).forward).parameters
    for name in (CACHE_NAME, OLD_NAME, NEW_NAME):
        if name in parameters:
            return name
    raise ValueError(
        f"{type(inner).__name__}.forward names no `{CACHE_NAME}`, so it would write every token without the ones "
        "before; use a model with a key-value cache"
    )


def cache_of(output: Any) -> Any:
    """The cache in what any model's `forward` returned.

    Raises:
        ValueError: if there is none.
    """
    cache = getattr(output, CACHE_NAME, None)
    if cache is None:
        raise ValueError(f"the model returned no `{CACHE_NAME}` although `use_cache` was true; use a model that does")
    return cache
