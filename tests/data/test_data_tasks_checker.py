import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_scratch_gpt.data.tasks import chance_level, gold_reward, is_exact, report_prompts

texts = st.text(max_size=40)


def row(answer, family="words", id="a"):
    return {"id": id, "family": family, "answer": answer}


def test_exactness_forgives_white_space_and_one_full_stop_only():
    wanted = row("Copy a file.")
    assert all(is_exact(wanted, text) for text in ("Copy a file.", " Copy  a\nfile ", "Copy a file"))
    for text in (
        "",
        "copy a file.",
        "Copy a file..",
        "Copy a file!",
        "`Copy a file.`",
        "Copy a file. It",
        "Copy file.",
    ):
        assert not is_exact(wanted, text), text


@given(texts, texts)
def test_the_reward_is_one_if_and_only_if_exact(answer, completion):
    reward = gold_reward(row(answer), completion)
    assert 0 <= reward <= 1
    assert (reward == 1) == is_exact(row(answer), completion)
    assert reward == 1 or reward <= 0.5
    assert gold_reward(row(answer), answer) == 1


def test_partial_reward_is_half_the_squared_f1_of_words_in_order():
    # longest common subsequence "copy, b" of 3 and 2 words: F1 = 2 * 2 / 5
    assert gold_reward(row("copy(a, b)"), "copy(b)") == pytest.approx(0.5 * 0.8**2)
    assert gold_reward(row("copy(a, b)"), "b a copy") == pytest.approx(0.5 * (2 / 6) ** 2)
    assert gold_reward(row("12"), "13") == 0
    assert gold_reward(row("()"), "[]") == 0


def test_arbitrary_text_earns_next_to_nothing():
    answer = row("Recursively copy a directory tree and return the destination directory.")
    for text in ("the the the the the", "I do not know what the question is about.", "return", "a " * 50):
        assert gold_reward(answer, text) < 0.05, text


def test_chance_is_what_the_best_constant_answer_a_family_gets():
    rows = [row("None", "default"), row("None", "default"), row("0", "default"), row("1", "arithmetic")]
    assert chance_level(rows) == 3 / 4
    with pytest.raises(ValueError, match="no task rows"):
        chance_level([])


def test_report_prompts_take_each_family_in_turn_whatever_the_order():
    rows = [row("x", family, f"{family}-{number}") for family in ("b", "a") for number in range(2)]
    for order in (rows, rows[::-1]):
        assert [picked["id"] for picked in report_prompts(order, 3)] == ["a-0", "b-0", "a-1"]
    assert len(report_prompts(rows, 10)) == 4
