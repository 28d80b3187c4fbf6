"""Checks of the forward pass: cache, padding, positions, packing, and what TRL reads instead of it."""

import torch
from torch import nn

from hf_scratch_gpt.hub.doctor.outcome import TOLERANCE, Checks, Finding, Skipped, all_of, compare
from hf_scratch_gpt.hub.doctor.subject import LEAST_INFLUENCE, Subject
from hf_scratch_gpt.model.cache_name import cache_argument, cache_of

CHECKS = Checks()


@CHECKS.add(
    "looks-back",
    expected=f"the first token changes later logits by at least {LEAST_INFLUENCE} of their spread",
    remedy="look for an attention mask or a residual path that cuts earlier tokens off",
)
def looks_back(subject: Subject) -> Finding:
    """Whether the first token matters to later logits at all; without it other checks could find nothing."""
    if subject.forward_error:
        return Finding(False, subject.forward_error)
    stirred = " (random numbers added to untrained weights, in memory)" if subject.stirred else ""
    measured = f"the first token changes later logits by {subject.influence:.2f} of their spread{stirred}"
    return Finding(subject.influence >= LEAST_INFLUENCE, measured)


@CHECKS.add(
    "eval-deterministic",
    expected="two forwards in eval() are equal",
    remedy="make dropout depend on `self.training` (nn.Dropout, or p=0.0 when not training)",
)
def eval_deterministic(subject: Subject) -> Finding:
    """Whether two forwards in evaluation mode are equal."""
    return compare(subject.logits(subject.ids), subject.logits(subject.ids), subject.spread, tolerance=1e-5)


def _in_chunks(subject: Subject, sizes: list[int]) -> torch.Tensor:
    """Logits of `ids` read in chunks through the model's own cache."""
    try:
        argument = cache_argument(subject.model)
    except ValueError as error:
        raise Skipped("forward() takes no cache") from error
    pieces, cache = [], None
    with torch.no_grad():
        for chunk in subject.ids.split(sizes, dim=1):
            output = subject.model(chunk, use_cache=True, **{argument: cache})
            cache = cache_of(output)
            pieces.append(output.logits.float())
    return torch.cat(pieces, dim=1)


@CHECKS.add(
    "cache-steps",
    expected="logits token by token with the cache = logits of the whole",
    remedy="start positions at the cache's `get_seq_length()` and return the updated cache",
)
def cache_steps(subject: Subject) -> Finding:
    """Whether reading token by token through the cache gives the logits of reading all at once."""
    return compare(_in_chunks(subject, [1] * subject.ids.shape[1]), subject.reference, subject.spread)


@CHECKS.add(
    "cache-chunks",
    expected="logits of two chunks with the cache = logits of the whole",
    remedy="count past tokens in positions and in the causal mask: queries of the second chunk see all of the first",
)
def cache_chunks(subject: Subject) -> Finding:
    """Whether reading in two chunks through the cache gives the logits of reading all at once."""
    length = subject.ids.shape[1]
    return compare(_in_chunks(subject, [length // 2 + 1, length - length // 2 - 1]), subject.reference, subject.spread)


@CHECKS.add(
    "left-padding",
    expected="a row padded on the left has the logits that it has alone",
    remedy="apply attention_mask in every layer, and use the position_ids that generate() computes from it",
)
def left_padding(subject: Subject) -> Finding:
    """Whether padding on the left changes nothing for the real tokens."""
    padding = 5
    room = subject.ids.shape[1] - padding
    rows = subject.random_ids(2, subject.ids.shape[1], seed=1)
    rows[0, padding:] = subject.ids[0, :room]
    mask = torch.ones_like(rows)
    mask[0, :padding] = 0
    inputs = {"attention_mask": mask}
    if subject.takes("position_ids"):
        inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    padded = subject.logits(rows, **inputs)[0, padding:]
    alone = subject.logits(subject.ids[:1, :room])[0]
    return compare(padded, alone, subject.spread)


def _needs_positions(subject: Subject) -> None:
    if subject.takes("position_ids"):
        return
    if getattr(subject.config, "rope_parameters", None) is None and subject.context is None:
        raise Skipped("forward() takes no position_ids, and the config declares no positions")
    raise TypeError("forward() takes no position_ids, though the config declares positions")


@CHECKS.add(
    "position-ids",
    expected=f"position_ids 0, 1, 2, … change nothing; a gap in them changes logits by more than {TOLERANCE}",
    remedy="pass the caller's position_ids to the rotary or learned embedding instead of making new ones",
)
def position_ids(subject: Subject) -> Finding:
    """Whether positions that are given change the logits as positions should."""
    _needs_positions(subject)
    # With a mask, as a gap without one begins another packed document.
    rows, mask = subject.ids, torch.ones_like(subject.ids)
    length = rows.shape[1]
    half = length // 2
    plain = torch.arange(length)[None].expand_as(rows)
    same = compare(subject.logits(rows, attention_mask=mask, position_ids=plain), subject.reference, subject.spread)
    gap = 7 if subject.context is None else min(7, subject.context - length)
    shifted = plain + gap * (plain >= half)
    if gap < 1:  # the whole context is in use: let the second half begin again
        shifted = plain % half
    moved = subject.logits(rows, attention_mask=mask, position_ids=shifted)
    effect = ((moved - subject.reference)[:, half:].abs().max() / subject.spread).item()
    return all_of(same, Finding(effect > TOLERANCE, f"a gap changes logits by {effect:.1e} of their spread"))


@CHECKS.add(
    "packed-documents",
    expected="documents in one row (position_ids that restart, no mask) = each document alone",
    remedy="build masks with create_causal_mask(..., position_ids=...), and add no attention_mask of your own",
)
def packed_documents(subject: Subject) -> Finding:
    """Whether documents in one row, told apart by their positions, are computed as if each stood alone."""
    if not subject.model._supports_attention_backend:
        raise Skipped("the model does not declare `_supports_attention_backend`, on which packing rests")
    _needs_positions(subject)
    length = subject.ids.shape[1]
    sizes = [length // 3, length // 2, length - length // 3 - length // 2]
    positions = torch.cat([torch.arange(size) for size in sizes])[None]
    row = subject.ids[:1]
    packed = subject.logits(row, position_ids=positions)
    alone = torch.cat([subject.logits(document) for document in row.split(sizes, dim=1)], dim=1)
    return compare(packed, alone, subject.spread)


@CHECKS.add(
    "logits-to-keep",
    expected="logits_to_keep (1, 3, or a tensor of places) gives these positions' logits only",
    remedy="slice hidden states by logits_to_keep before the head: transformers' slice_logits_to_keep",
)
def logits_to_keep(subject: Subject) -> Finding:
    """Whether `logits_to_keep`, a number or a tensor of places, gives those places' logits only."""
    if not subject.takes("logits_to_keep"):
        raise Skipped("forward() has no logits_to_keep: generate() computes all logits of a prompt")
    findings = []
    for keep in (1, 3, torch.tensor([0, 5])):
        expected = subject.reference[:, -keep:] if isinstance(keep, int) else subject.reference[:, keep]
        findings.append(compare(subject.logits(subject.ids, logits_to_keep=keep), expected, subject.spread))
    return all_of(*findings)


def trl_logit_scale(config: object) -> float:
    """The factor on logits that TRL takes from a config (`trl.trainer.utils.add_fused_lm_head`)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if (scale := getattr(config, name, None)) is not None:
            return scale
    if (scaling := getattr(config, "logits_scaling", None)) is not None:
        return scaling if getattr(config, "model_type", None) == "hyperclovax" else 1 / scaling
    return 1.0


@CHECKS.add(
    "trl-fused-head",
    expected="base_model(...).last_hidden_state through the head, scaled and capped as TRL does = forward's logits",
    remedy="return hidden states after the final norm, use a plain nn.Linear head, cap logits by "
    "config.final_logit_softcapping and scale them by config.logit_scale: TRL reads no other names",
)
def trl_fused_head(subject: Subject) -> Finding:
    """SFT, DPO and GRPO of TRL bypass `forward` so; whatever else it does to logits is not trained."""
    head = subject.model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return Finding(False, f"get_output_embeddings() gives {type(head).__name__}, not a plain nn.Linear")
    if subject.model.base_model is subject.model:
        return Finding(False, "base_model is the model itself: `base_model_prefix` names no attribute")
    with torch.no_grad():
        hidden = subject.model.base_model(subject.ids, use_cache=False).last_hidden_state
        logits = nn.functional.linear(hidden, head.weight, head.bias).float() * trl_logit_scale(subject.config)
        if (cap := getattr(subject.config, "final_logit_softcapping", None)) is not None:
            logits = cap * torch.tanh(logits / cap)
    return compare(logits, subject.reference, subject.spread)
