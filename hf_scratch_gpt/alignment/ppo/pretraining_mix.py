"""PPO-ptx: windows of pretraining text mixed into PPO's updates (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).

Which windows a step has is a pure function of the seed and the step, as in pretraining itself, so resume stays exact
and the number of processes changes nothing.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_scratch_gpt.alignment.ppo.prompts import context_length
from hf_scratch_gpt.data.loader import TokenShards, batch_windows, windows_per_epoch
from hf_scratch_gpt.data.shards import encode_documents, separator_id, tokenizer_fingerprint

_LONGEST_DEFAULT = 512


class TextTokens:
    """Documents in memory, one after another with separators between: what the loader reads of `TokenShards`.

    Raises:
        ValueError: if there is no text.
    """

    split = "text"

    def __init__(self, texts: Iterable[str], tokenizer: Any, name: str = "ptx_dataset"):
        self.folder, self.separator_id = name, separator_id(tokenizer)
        parts: list[np.ndarray] = []
        for ids in encode_documents(tokenizer, texts):
            parts += [ids, np.array([self.separator_id], ids.dtype)]
        if not any(len(ids) > 1 for ids in parts):
            raise ValueError(f"{name}: has no text")
        self._tokens = np.concatenate(parts)

    def __len__(self) -> int:
        return len(self._tokens)

    def read(self, start: int, count: int) -> np.ndarray:
        """Tokens `start` to `start + count`."""
        return self._tokens[start : start + count]


def read_texts(rows: Iterable[Any], name: str = "ptx_dataset") -> Iterable[str]:
    """The texts of rows that are text, or have a column `text`.

    Raises:
        ValueError: for a row that has none, naming it.
    """
    for number, row in enumerate(rows):
        text = row.get("text") if isinstance(row, dict) else row
        if not isinstance(text, str):
            found = f"columns: {', '.join(map(str, row))}" if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{name}, row {number}: no text in a column 'text' ({found})")
        yield text


def _open_source(source: Any, tokenizer: Any) -> Any:
    if not isinstance(source, str | Path):
        return TextTokens(read_texts(source), tokenizer)
    path = Path(source)
    if (path / "manifest.json").is_file():
        shards = TokenShards(path)
        own = tokenizer_fingerprint(tokenizer)
        if shards.manifest.get("tokenizer_fingerprint", own) != own:
            raise ValueError(f"{path}: was prepared with another tokenizer than the policy's; give its text instead")
        return shards
    if not path.is_file():
        raise FileNotFoundError(f"{path}: neither a folder that 'prepare' wrote nor a file of rows with 'text'")
    from hf_scratch_gpt.data.rows import read_rows

    return TextTokens(read_texts((row for _, row in read_rows(path)), str(path)), tokenizer, str(path))


class PretrainingMix:
    """Pretraining text for the steps of PPO.

    Args:
        source: A folder that `prepare` wrote, a file of rows with `text`, or such rows.
        tokenizer: The policy's.
        model: The policy; its context bounds a window.
        args ([`PPOConfig`]): `ptx_length`, `ptx_batch_size` and the process's number.

    Raises:
        ValueError: if there is too little text, or it is of another tokenizer.
        FileNotFoundError: if the source is missing.
    """

    def __init__(self, source: Any, tokenizer: Any, model: Any, args: Any):
        self.args, context = args, context_length(model)
        if args.ptx_length is not None and context is not None and args.ptx_length > context:
            raise ValueError(f"'ptx_length' is {args.ptx_length}, but the model's context is {context} tokens")
        self._tokens = _open_source(source, tokenizer)
        most = min(_LONGEST_DEFAULT, context or _LONGEST_DEFAULT)
        self.length: int = args.ptx_length or min(most, len(self._tokens))
        windows_per_epoch(self._tokens, self.length)  # refuses a source that is too short

    def batch(self, micro_step: int) -> dict[str, Tensor]:
        """`input_ids` and `position_ids` (windows, length) of this process, by the number of the micro-batch."""
        args = self.args
        return batch_windows(
            self._tokens, self.length, args.ptx_batch_size, args.seed, micro_step, args.process_index, args.world_size
        )


def next_token_loss(policy: Any, windows: dict[str, Tensor]) -> Tensor:
    """Mean next-token loss of a batch of windows, in nats a token, computed in fp32."""
    logits = policy(**windows, use_cache=False).logits[:, :-1]
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows["input_ids"][:, 1:].flatten())


def to_device(windows: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The windows on `device`."""
    return {name: value.to(device) for name, value in windows.items()}
