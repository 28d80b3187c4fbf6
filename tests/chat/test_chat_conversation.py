"""A conversation is trimmed by whole turns, keeps its system message, and loses nothing to a long message."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_scratch_gpt.chat.conversation import Conversation


def count_characters(messages):
    """An encoder of which lengths can be computed by hand: a token a character, two more a message."""
    return [0] * sum(len(message["content"]) + 2 for message in messages)


def roles(messages):
    return [message["role"] for message in messages]


def test_the_oldest_turns_go_first_and_the_system_message_stays():
    conversation = Conversation(count_characters, context_length=40, system="sys")
    for number in range(5):
        prompt = conversation.ask(f"q{number}", max_new_tokens=10)
        conversation.record(prompt, f"a{number}")
    # system 5, question 4, limit 30: room for two turns of 8.
    assert [message["content"] for message in prompt.messages] == ["sys", "q2", "a2", "q3", "a3", "q4"]
    assert (prompt.dropped_turns, len(prompt.token_ids), prompt.room) == (1, 25, 10)


@given(
    texts=st.lists(st.tuples(st.text(min_size=1, max_size=60), st.text(max_size=60)), max_size=12),
    context=st.integers(4, 200),
    max_new_tokens=st.integers(1, 300),
    system=st.none() | st.text(min_size=1, max_size=20),
)
def test_every_prompt_fits_and_is_the_longest_whole_tail_of_the_history(texts, context, max_new_tokens, system):
    conversation = Conversation(count_characters, context, system)
    for question, answer in texts:
        before = conversation.messages
        try:
            prompt = conversation.ask(question, max_new_tokens)
        except ValueError:
            assert conversation.messages == before
            continue
        assert conversation.messages == before
        head = before[: 1 if system else 0]
        assert prompt.messages[: len(head)] == head
        tail = prompt.messages[len(head) :]
        assert roles(tail) == ["user", "assistant"] * (len(tail) // 2) + ["user"]
        assert [*before, tail[-1]][-len(tail) :] == tail
        assert len(prompt.token_ids) + prompt.room <= context
        assert prompt.room >= min(max_new_tokens, max(1, context // 4))
        if prompt.dropped_turns:  # one turn more would not have fitted
            first = len(head) + 2 * (prompt.dropped_turns - 1)
            longer = count_characters([*head, *before[first:], tail[-1]])
            assert len(longer) + min(max_new_tokens, max(1, context // 4)) > context
        conversation.record(prompt, answer)
        assert conversation.messages == [*prompt.messages, {"role": "assistant", "content": answer}]


def test_a_message_longer_than_the_context_is_counted_and_nothing_is_lost():
    conversation = Conversation(count_characters, context_length=40, system="sys")
    conversation.record(conversation.ask("q", 10), "a")
    before = conversation.messages
    with pytest.raises(
        ValueError, match=r"message with the system message has 57 tokens, and 30 fit \(the context is 40"
    ):
        conversation.ask("x" * 50, 10)
    assert conversation.messages == before
    assert len(conversation.ask("x" * 20, 10).token_ids) == 27


def test_without_a_limit_nothing_is_trimmed():
    conversation = Conversation(count_characters)
    for _ in range(50):
        conversation.record(conversation.ask("question" * 20, 10), "answer")
    assert len(conversation.messages) == 100


def test_reset_forgets_the_turns_only():
    conversation = Conversation(count_characters, 100, "sys")
    conversation.record(conversation.ask("q", 10), "a")
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "sys"}]


@pytest.mark.parametrize(
    ("text", "told"), [("", "empty"), (" \n", "empty"), ("a\udcff", "not valid UTF-8 at character 1")]
)
def test_a_message_that_is_no_text_is_refused(text, told):
    with pytest.raises(ValueError, match=told):
        Conversation(count_characters).ask(text, 10)
