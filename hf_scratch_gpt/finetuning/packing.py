"""Packed rows for tuning: whole examples share a window, each blind to the others, so that little of it is padding.

A model of transformers keeps documents of a row apart where it is given positions that start again at 0, no
`attention_mask` and no cache. Whether the model at hand does is measured, not assumed: `keeps_documents_apart`.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hf_scratch_gpt.data.masking import IGNORED
from hf_scratch_gpt.data.packing import best_fit_decreasing
from hf_scratch_gpt.runs.process import exact_products

# Rounding moves a hidden state by 1e-6 of its length in fp32, and by 1e-2 where products are in bf16; a document
# that sees another moves it by about its length.
_TOLERANCE, _COARSE_TOLERANCE = 1e-3, 5e-2
# Two rows, since an attention kernel may know the boundaries in one row and not in several.
_CHECKED_LENGTHS = ((5, 9, 2), (3, 6, 7))


def pack(examples: Any, window: int, seed: int) -> Any:
    """Best-fit packing (arXiv:2404.10830) of encoded examples, as a pure function of its arguments.

    Args:
        examples (`Dataset`): With `input_ids`, `labels` and `length`, none longer than `window`.
        window (`int`): Most tokens of a row.
        seed (`int`): Decides which of the examples of one length share a row.

    Returns:
        `Dataset`: Rows with `input_ids`, `labels`, `seq_lengths` (of each example in the row) and `length`. The first
        token of each example has no label: what stands before it is another example.
    """
    from datasets import Dataset

    order = np.random.default_rng(seed).permutation(len(examples))
    lengths = np.asarray(examples["length"], np.int64)[order]
    windows = best_fit_decreasing(lengths, window)
    members: list[list[int]] = [[] for _ in range(int(windows.max()) + 1)]
    for index, chosen in zip(order.tolist(), windows.tolist(), strict=True):
        members[chosen].append(index)
    input_ids, labels = list(examples["input_ids"]), list(examples["labels"])
    rows = []
    for chosen in members:
        rows.append(
            {
                "input_ids": [token for index in chosen for token in input_ids[index]],
                "labels": [label for index in chosen for label in (IGNORED, *labels[index][1:])],
                "seq_lengths": [len(input_ids[index]) for index in chosen],
                "length": sum(len(input_ids[index]) for index in chosen),
            }
        )
    return Dataset.from_list(rows)


class PackedCollator:
    """Batches of packed rows, or of single examples: positions start again with each, and there is no mask.

    The padding that fills a row up is one more document, without labels.

    Args:
        pad_token_id (`int`): What fills rows up.
        pad_to_multiple_of (`int`, *optional*): Rows are filled up to a multiple of it.
    """

    def __init__(self, pad_token_id: int, pad_to_multiple_of: int | None = None):
        self.pad_token_id, self.multiple = pad_token_id, pad_to_multiple_of or 1

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `position_ids`, each int64 of shape (rows, longest row)."""
        width = -(-max(len(row["input_ids"]) for row in rows) // self.multiple) * self.multiple
        input_ids = torch.full((len(rows), width), self.pad_token_id)
        labels = torch.full((len(rows), width), IGNORED)
        position_ids = torch.zeros(len(rows), width, dtype=torch.long)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            input_ids[number, :length] = torch.tensor(row["input_ids"])
            labels[number, :length] = torch.tensor(row["labels"])
            parts = [*(row.get("seq_lengths") or [length]), width - length]
            position_ids[number] = torch.cat([torch.arange(part) for part in parts])
        return {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}


def padding_share(rows: Any) -> float:
    """Share of padding in rows that are all filled up to the longest."""
    lengths = list(rows["length"])
    return 1 - sum(lengths) / (len(lengths) * max(lengths))


def keeps_documents_apart(model: Any) -> bool:
    """Whether documents in a row of `model` come out as each of them does alone, measured on random tokens.

    It is not so of models without positions (Bloom), with state (Mamba), or whose attention kernel looks at one row
    only.
    """
    trunk = model.base_model
    parameters = inspect.signature(trunk.forward).parameters
    if "position_ids" not in parameters:
        return False
    device, was_training = next(trunk.parameters()).device, model.training
    documents = [[_random_ids(model, length, device) for length in lengths] for lengths in _CHECKED_LENGTHS]
    model.eval()
    try:
        # With gradients, since the attention that trains may be another than the one that measures.
        with torch.enable_grad(), torch.autocast(device.type, enabled=False), exact_products():
            packed = _hidden_states(trunk, documents)
            alone = [torch.cat([_hidden_states(trunk, [[one]])[0] for one in row]) for row in documents]
    finally:
        model.train(was_training)
    expected = torch.stack(alone)
    error = ((packed - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-6)).max().item()
    is_exact = all(weight.dtype == torch.float32 for weight in trunk.parameters())
    return error <= (_TOLERANCE if is_exact else _COARSE_TOLERANCE)


def _random_ids(model: Any, length: int, device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(length)
    return torch.randint(model.config.get_text_config().vocab_size, (length,), generator=generator).to(device)


def _hidden_states(trunk: Any, rows: list[list[torch.Tensor]]) -> torch.Tensor:
    """Last hidden states, (rows, tokens, width) in fp32, of rows that each hold some documents."""
    input_ids = torch.stack([torch.cat(row) for row in rows])
    position_ids = torch.stack([torch.cat([torch.arange(len(one)) for one in row]) for row in rows])
    output = trunk(input_ids=input_ids, position_ids=position_ids.to(input_ids.device), use_cache=False)
    return output.last_hidden_state.detach().float()
