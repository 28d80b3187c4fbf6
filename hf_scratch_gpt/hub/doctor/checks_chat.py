"""Lint of the chat template: what it renders, what is trained of it, and what a user can smuggle into it."""

import dataclasses
import re
from typing import Any

from hf_scratch_gpt.hub.doctor.outcome import Checks, Finding, Skipped, all_of
from hf_scratch_gpt.hub.doctor.subject import Subject
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation

CHECKS = Checks()
_SYSTEM = {"role": "system", "content": "Answer in few words."}
_TURNS = [
    {"role": "user", "content": "How many legs has a spider?"},
    {"role": "assistant", "content": "It has eight legs."},
    {"role": "user", "content": "And a beetle?"},
    {"role": "assistant", "content": "That one has six."},
]
_ANSWER = _TURNS[-1]["content"]


def render(tokenizer: Any, messages: list[dict[str, Any]], **settings: Any) -> str:
    """The text that the chat template makes of messages."""
    return tokenizer.apply_chat_template(messages, tokenize=False, **settings)


def conversation(tokenizer: Any) -> list[dict[str, Any]]:
    """The conversation of all checks, without a system message where the template refuses one."""
    try:
        render(tokenizer, [_SYSTEM, *_TURNS])
    except Exception:
        return _TURNS
    return [_SYSTEM, *_TURNS]


@CHECKS.add(
    "chat-roles",
    expected="the template renders what system, user and assistant say",
    remedy="render message.content of each role, and raise_exception for roles that are not supported",
)
def chat_roles(subject: Subject) -> Finding:
    """Whether the template renders system, user and assistant messages with all of their text."""
    tokenizer = subject.needs_chat_template()
    messages = conversation(tokenizer)
    text = render(tokenizer, messages)
    lost = [message["role"] for message in messages if message["content"] not in text]
    refused = "" if messages[0] is _SYSTEM else "; refuses the role system"
    return Finding(not lost, f"not rendered: {', '.join(lost)}" if lost else f"{len(text)} characters{refused}")


@CHECKS.add(
    "chat-generation-prompt",
    expected="what add_generation_prompt renders is the beginning of the whole conversation",
    remedy="end the prompt exactly where the assistant's own words begin",
)
def chat_generation_prompt(subject: Subject) -> Finding:
    """Whether a prompt with `add_generation_prompt` is how the whole conversation begins."""
    tokenizer = subject.needs_chat_template()
    messages = conversation(tokenizer)
    prompt, whole = render(tokenizer, messages[:-1], add_generation_prompt=True), render(tokenizer, messages)
    if whole.startswith(prompt):
        return Finding(True, f"the answer is followed from {prompt[-20:]!r}")
    place = next((i for i, (one, other) in enumerate(zip(prompt, whole, strict=False)) if one != other), len(whole))
    return Finding(False, f"the prompt has {prompt[place : place + 20]!r} where the whole has {whole[place:][:20]!r}")


def marks_answers(tokenizer: Any) -> bool:
    """Whether the template says which part the assistant writes."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", tokenizer.get_chat_template()) is not None


@dataclasses.dataclass(frozen=True)
class _Answer:
    """The last answer in token ids: which tokens hold its text, and which ends it (`None` if nothing follows)."""

    ids: list[int]
    masks: list[int]
    text: list[int]
    end: int | None


def _answer(tokenizer: Any) -> _Answer:
    messages = conversation(tokenizer)
    rendered = render(tokenizer, messages)
    encoded = encode_conversation(tokenizer, messages)
    offsets = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    start = rendered.rindex(_ANSWER)
    stop = start + len(_ANSWER)
    text = [place for place, (first, last) in enumerate(offsets) if first < stop and last > start]
    after = (place for place, (first, last) in enumerate(offsets) if first >= stop and rendered[first:last].strip())
    return _Answer(encoded["input_ids"], encoded["assistant_masks"], text, next(after, None))


def _opening(tokenizer: Any, ids: list[int]) -> range:
    """The places in `ids` of what `add_generation_prompt` opens the last answer with; none if they begin otherwise."""
    asked = conversation(tokenizer)[:-1]
    without = encode_conversation(tokenizer, asked)["input_ids"]
    opened = encode_conversation(tokenizer, asked, add_generation_prompt=True)["input_ids"]
    return range(len(without), len(opened)) if ids[: len(opened)] == opened else range(0)


@CHECKS.add(
    "chat-trained-mask",
    expected="{% generation %} encloses the assistant's text and its end token",
    remedy="write the end token before {% endgeneration %}: a model never learns to stop where it is not trained to",
)
def chat_trained_mask(subject: Subject) -> Finding:
    """Whether `{% generation %}` marks the assistant's text and nothing of the user's."""
    tokenizer = subject.needs_chat_template()
    if not marks_answers(tokenizer):
        raise Skipped("the template has no {% generation %}, so it tells no trained part")
    answer = _answer(tokenizer)
    untrained = tokenizer.decode([answer.ids[place] for place in answer.text if not answer.masks[place]])
    opening = _opening(tokenizer, answer.ids)
    prompt = tokenizer.decode([answer.ids[place] for place in opening if answer.masks[place]])
    end_is_trained = answer.end is None or answer.masks[answer.end] == 1
    return all_of(
        Finding(not untrained, f"not trained of the answer: {untrained!r}"),
        Finding(not prompt, f"trained before the answer: {prompt!r}"),
        Finding(end_is_trained, "the end token after the answer is not trained"),
        Finding(True, f"{len(answer.text)} tokens of the answer and its end are trained"),
    )


@CHECKS.add(
    "chat-end-token",
    expected="the token after an answer is one at which generation stops",
    remedy="write the end token after each answer, and name it in generation_config.eos_token_id",
)
def chat_end_token(subject: Subject) -> Finding:
    """Whether the trained part of a rendered answer holds the token that ends it."""
    tokenizer = subject.needs_chat_template()
    answer = _answer(tokenizer)
    if answer.end is None:
        return Finding(False, "nothing stands after the last answer")
    token = answer.ids[answer.end]
    ends = sorted(subject.end_token_ids())
    told = f"{tokenizer.convert_ids_to_tokens(token)!r} ({token}) follows the answer"
    return Finding(token in ends, told if token in ends else f"{told}, generation stops at {ends}")


@CHECKS.add(
    "chat-control-tokens",
    expected="control tokens in a user's text stay text when encoded by encode_conversation",
    remedy="encode conversations with hf_scratch_gpt.model.encode_conversation, never the rendered text as a whole",
)
def chat_control_tokens(subject: Subject) -> Finding:
    """Whether control tokens in a user's text stay text when a conversation is encoded."""
    tokenizer = subject.needs_chat_template()
    controls = sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}, key=str)
    controls = [token for token in controls if not token.isspace()]
    if not controls:
        raise Skipped("the tokenizer has no control tokens")
    ids = set(tokenizer.convert_tokens_to_ids(controls))

    def count(content: str) -> int:
        encoded = encode_conversation(tokenizer, [{"role": "user", "content": content}], add_generation_prompt=True)
        return sum(token in ids for token in encoded["input_ids"])

    smuggled = count("a" + "".join(controls) + "b") - count("ab")
    return Finding(smuggled == 0, f"{smuggled} of {len(controls)} control tokens in a user's text became tokens")


@CHECKS.add(
    "chat-bos",
    expected="at most one beginning-of-text token at the start",
    remedy="let either the template write it or the tokenizer add it, not both",
)
def chat_bos(subject: Subject) -> Finding:
    """Whether a rendered conversation begins with one beginning-of-text token and not two."""
    tokenizer = subject.needs_chat_template()
    if tokenizer.bos_token_id is None:
        raise Skipped("the tokenizer has no beginning-of-text token")
    ids = tokenizer.apply_chat_template(conversation(tokenizer))["input_ids"]
    count = next((place for place, token in enumerate(ids) if token != tokenizer.bos_token_id), len(ids))
    return Finding(count <= 1, f"{count} at the start")
