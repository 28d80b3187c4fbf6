"""The prompts of PPO: read from a data set, encoded so that their text can never become a control token."""

import logging
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_LARGEST_DROPPED_SHARE = 0.01
Message = dict[str, Any]


@dataclass
class Prompt:
    """One prompt: `content` as the data set has it (a list of messages, or text), its ids, and the other columns."""

    content: list[Message] | str
    input_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def is_conversation(self) -> bool:
        """Whether the prompt is a list of messages and not plain text."""
        return not isinstance(self.content, str)


def context_length(model: Any) -> int | None:
    """The most tokens that the model takes, or `None` if its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def longest_prompt(model: Any, max_length: int | None, max_new_tokens: int) -> int | None:
    """The most tokens that a prompt may have beside a longest response, or `None` for no limit.

    Raises:
        ValueError: if `max_length` exceeds the model's context, or nothing is left for a prompt.
    """
    context = context_length(model)
    if context is not None and max_length is not None and max_length > context:
        raise ValueError(f"'max_length' is {max_length}, but the model's context is {context} tokens")
    limit = max_length if max_length is not None else context
    if limit is not None and limit <= max_new_tokens:
        raise ValueError(f"'max_new_tokens' is {max_new_tokens}, which leaves no room for a prompt in {limit} tokens")
    return None if limit is None else limit - max_new_tokens


def encode_prompt(tokenizer: Any, content: list[Message] | str) -> list[int]:
    """Ids of a prompt: a conversation with the template's opening of the assistant's turn, or text as it is."""
    from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation, encode_text

    if not isinstance(content, str):
        return list(encode_conversation(tokenizer, content, add_generation_prompt=True)["input_ids"])
    begin = tokenizer.bos_token_id
    opens_with_begin = begin is not None and tokenizer("")["input_ids"][:1] == [begin]
    return ([begin] if opens_with_begin else []) + list(encode_text(tokenizer, content))


def template_tail(tokenizer: Any) -> list[int]:
    """The ids that the chat template writes after the end token of the assistant's last turn (ChatML: a new line).

    A reward model that was trained on whole conversations has its score read after them.
    """
    from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation

    sample = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    ids = list(encode_conversation(tokenizer, sample)["input_ids"])
    last = max((index for index, number in enumerate(ids) if number == tokenizer.eos_token_id), default=len(ids) - 1)
    return ids[last + 1 :]


def _check_row(row: dict[str, Any], number: int, what: str) -> list[Message] | str:
    if "prompt" not in row:
        raise ValueError(f"{what}, row {number}: no column 'prompt' (columns: {', '.join(map(str, row)) or 'none'})")
    content = row["prompt"]
    if isinstance(content, str):
        if not content:
            raise ValueError(f"{what}, row {number}: 'prompt' is empty")
        return content
    is_messages = isinstance(content, list) and content and all(isinstance(message, dict) for message in content)
    if not is_messages or not all({"role", "content"} <= set(message) for message in content):
        raise ValueError(
            f"{what}, row {number}: 'prompt' is {type(content).__name__}, expected text or a list of messages with "
            "'role' and 'content'"
        )
    return content


def read_prompts(
    rows: Iterable[dict[str, Any]], tokenizer: Any, longest: int | None, what: str = "train_dataset"
) -> list[Prompt]:
    """Encode the rows of a prompt data set; `what` names it in messages.

    Args:
        longest (`int`, *optional*): Most tokens that a prompt may have: the context less the longest response.

    Raises:
        ValueError: if there is no row, a row has no usable prompt, or prompts are too long. Up to 1% of too long
            prompts are dropped with a warning instead.
    """
    prompts, too_long = [], []
    number = -1
    for number, row in enumerate(rows):
        content = _check_row(row, number, what)
        if not isinstance(content, str) and not tokenizer.chat_template:
            raise ValueError(
                f"{what}, row {number}: 'prompt' is a conversation, but the policy's tokenizer has no chat template; "
                "set one, or give prompts as text"
            )
        prompt = Prompt(content, encode_prompt(tokenizer, content), {k: v for k, v in row.items() if k != "prompt"})
        if not prompt.input_ids:
            raise ValueError(f"{what}, row {number}: 'prompt' has no tokens")
        if longest is not None and len(prompt.input_ids) > longest:
            too_long.append((number, len(prompt.input_ids)))
        else:
            prompts.append(prompt)
    if number < 0:
        raise ValueError(f"{what}: has no rows")
    if len(too_long) > _LARGEST_DROPPED_SHARE * (number + 1):
        row_number, length = too_long[0]
        raise ValueError(
            f"{what}, row {row_number}: the prompt has {length} tokens, but the model's context leaves {longest} "
            f"beside 'max_new_tokens' ({len(too_long)} of {number + 1} rows are too long); shorten them or lower "
            "'max_new_tokens'"
        )
    if too_long:
        logger.warning("%s: %d of %d prompts are too long and are left out", what, len(too_long), number + 1)
    return prompts


def left_pad(sequences: list[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask (B, longest), padded on the left."""
    longest = max(map(len, sequences))
    ids = torch.full((len(sequences), longest), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, longest - len(sequence) :] = torch.tensor(sequence, dtype=torch.long)
        mask[row, longest - len(sequence) :] = 1
    return ids, mask
