"""A conversation's state: the messages, trimmed by whole turns so that the next answer fits into the context."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation, encode_text

Message = dict[str, Any]
# Of a context too small for `max_new_tokens`, the answer gets this share and the conversation the rest.
ANSWER_SHARE = 4


def make_encoder(tokenizer: Any) -> Callable[[list[Message]], list[int]]:
    """What turns messages into the token ids that the model continues; a message cannot become a control token.

    A tokenizer without a chat template is a base model's: its conversation is one text that it continues.
    """
    if tokenizer.chat_template:
        return lambda messages: encode_conversation(tokenizer, messages, add_generation_prompt=True)["input_ids"]
    return lambda messages: encode_text(tokenizer, "".join(message["content"] for message in messages))


@dataclass(frozen=True)
class Prompt:
    """What the model is to answer.

    Args:
        messages (`list[Message]`): The system message, the turns kept, and the user's new message.
        token_ids (`list[int]`): These messages as the model reads them.
        dropped_turns (`int`): How many of the oldest turns no longer fit.
        room (`int`): Number of tokens that the answer may have.
    """

    messages: list[Message]
    token_ids: list[int]
    dropped_turns: int
    room: int


@dataclass
class Conversation:
    """The messages of one conversation with a model.

    Args:
        encode (`Callable`): Messages to token ids, as `make_encoder` makes it.
        context_length (`int`, *optional*): Number of positions of the model; `None` for no limit.
        system (`str`, *optional*): System message, never trimmed.
    """

    encode: Callable[[list[Message]], list[int]]
    context_length: int | None = None
    system: str | None = None
    turns: list[list[Message]] = field(default_factory=list)

    @property
    def messages(self) -> list[Message]:
        """System message and turns, in order."""
        head = [{"role": "system", "content": self.system}] if self.system else []
        return head + [message for turn in self.turns for message in turn]

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns.clear()

    def ask(self, text: str, max_new_tokens: int) -> Prompt:
        """The prompt for the user's message `text`, the oldest turns left out as far as needed. Changes nothing.

        Raises:
            ValueError: if the message does not fit even without any turn before it; says how many tokens it has and
                how many fit. Also if the message is empty or is not valid Unicode, or the template refuses it.
        """
        check_text(text)
        head = self.messages[: 1 if self.system else 0]
        question = {"role": "user", "content": text}
        limit = self._prompt_limit(max_new_tokens)
        for dropped in range(len(self.turns) + 1):
            kept = [message for turn in self.turns[dropped:] for message in turn]
            messages = [*head, *kept, question]
            token_ids = self.encode(messages)
            if limit is None:
                return Prompt(messages, token_ids, 0, max_new_tokens)
            if len(token_ids) <= limit:
                assert self.context_length is not None
                room = min(max_new_tokens, self.context_length - len(token_ids))
                return Prompt(messages, token_ids, dropped, room)
        raise ValueError(self._too_long(len(token_ids), limit))

    def record(self, prompt: Prompt, answer: str) -> None:
        """Take a prompt of `ask` and the model's answer into the history, and forget the turns that it left out."""
        del self.turns[: prompt.dropped_turns]
        self.turns.append([prompt.messages[-1], {"role": "assistant", "content": answer}])

    def _prompt_limit(self, max_new_tokens: int) -> int | None:
        if self.context_length is None:
            return None
        return self.context_length - min(max_new_tokens, max(1, self.context_length // ANSWER_SHARE))

    def _too_long(self, length: int, limit: int | None) -> str:
        with_system = " with the system message" if self.system else ""
        return (
            f"the message{with_system} has {length} tokens, and {limit} fit (the context is {self.context_length}, "
            "the rest is kept for the answer); shorten it. The conversation so far is unchanged"
        )


def check_text(text: str) -> None:
    """Check that a message is one.

    Raises:
        ValueError: if it is empty or not valid Unicode.
    """
    if not text.strip():
        raise ValueError("the message is empty")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the message is not valid UTF-8 at character {error.start}") from error
