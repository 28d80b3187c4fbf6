"""Checks of the attention interface: what reaches it, and whether its implementations agree."""

from collections.abc import Callable
from typing import Any

import torch

from hf_scratch_gpt.hub.doctor.outcome import Checks, Finding, Skipped, compare, in_one_line
from hf_scratch_gpt.hub.doctor.subject import Subject

CHECKS = Checks()
_PROBE = "scratch_gpt_doctor_probe"


def _with_probe(subject: Subject, look: Callable[[dict[str, Any]], None], **inputs: Any) -> None:
    """Run the model with an attention function that shows its keyword arguments to `look`, and attends to nothing."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    def probe(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        look(kwargs)
        batch, heads, tokens, _ = query.shape
        return query.new_zeros(batch, tokens, heads, value.shape[-1]), None

    ALL_ATTENTION_FUNCTIONS.register(_PROBE, probe)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_PROBE, sdpa_mask)
    try:
        with subject.attention(_PROBE):
            subject.logits(subject.ids, **inputs)
    finally:
        del ALL_ATTENTION_FUNCTIONS._global_mapping[_PROBE]
        del ALL_MASK_ATTENTION_FUNCTIONS._global_mapping[_PROBE]


@CHECKS.add(
    "attention-kwargs",
    expected="a keyword argument of forward() reaches the attention call of every layer",
    remedy="take **kwargs in forward(), trunk, layer and attention, and pass them down: packing and vLLM need it",
)
def attention_kwargs(subject: Subject) -> Finding:
    """Whether what is given to `forward` as keyword arguments reaches the attention function."""
    if not subject.model._supports_attention_backend:
        raise Skipped("the model does not declare `_supports_attention_backend`")
    calls: list[bool] = []
    _with_probe(subject, lambda kwargs: calls.append(kwargs.get("doctor_marker") == 17), doctor_marker=17)
    return Finding(bool(calls) and all(calls), f"the argument reached {sum(calls)} of {len(calls)} attention calls")


@CHECKS.add(
    "eager-sdpa",
    expected="eager attention = SDPA, with and without padding",
    remedy="compare scaling, mask, softmax in fp32 and grouped keys in eager_attention_forward with SDPA's",
)
def eager_sdpa(subject: Subject) -> Finding:
    """Whether written-out attention and torch's fused attention give the same logits."""
    if not subject.model._supports_sdpa:
        raise Skipped("the model does not declare `_supports_sdpa`")
    return _equal(subject, "eager", "sdpa")


@CHECKS.add(
    "flex-attention",
    expected="flex attention = the implementation that the model loads with, with and without padding",
    remedy="hand the mask that create_causal_mask makes to the attention function unchanged",
)
def flex_attention(subject: Subject) -> Finding:
    """Whether flex attention, where the model declares it, gives the logits of the others."""
    if not subject.model._supports_flex_attn:
        raise Skipped("the model does not declare `_supports_flex_attn`")
    _try_flex()
    # Compiling takes half a minute, and would prove torch's code generator.
    with torch.compiler.set_stance("force_eager"):
        try:
            return _equal(subject, "flex_attention", subject.model.config._attn_implementation)
        except ValueError as error:
            if "CPU" not in str(error):
                raise
            raise Skipped(f"flex attention of this model needs an accelerator ({in_one_line(error)})") from error


def _try_flex() -> None:
    """Whether torch's own flex attention runs here, without any model.

    Raises:
        Skipped: if it does not.
    """
    try:
        from torch.nn.attention.flex_attention import flex_attention

        query = torch.zeros(1, 1, 16, 16)
        flex_attention(query, query, query)
    except Exception as error:
        raise Skipped(f"torch's flex attention does not run on this machine ({type(error).__name__})") from error


def _equal(subject: Subject, one: str, other: str) -> Finding:
    if not subject.model._can_set_attn_implementation():
        raise Skipped("the model does not switch between attention implementations after loading")
    padding = torch.ones_like(subject.ids)
    padding[0, :3] = 0
    logits: dict[str, torch.Tensor] = {}
    for name in (one, other):
        with subject.attention(name):
            alone = subject.logits(subject.ids)
            padded = subject.logits(subject.ids, attention_mask=padding)
        # What stands at the padding is read by nobody.
        logits[name] = torch.cat([alone[:, 3:], padded[:, 3:]])
    return compare(logits[one], logits[other], subject.spread)
