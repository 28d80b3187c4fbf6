import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_scratch_gpt.pretraining.schedules import SCHEDULES, Budget, decay_factor, warmup_factor


def test_wsd_stays_then_falls_linearly():
    factors = [decay_factor(progress, "wsd", 0.4) for progress in (0.0, 0.3, 0.6, 0.8, 0.9, 1.0)]
    assert factors == pytest.approx([1, 1, 1, 0.5, 0.25, 0])


def test_cosine_and_linear_by_hand():
    assert decay_factor(0.5, "cosine") == pytest.approx(0.5)
    assert decay_factor(1 / 3, "cosine") == pytest.approx(0.75)
    assert decay_factor(0.25, "linear", final_fraction=0.2) == pytest.approx(0.2 + 0.8 * 0.75)


@given(st.floats(-0.5, 1.5), st.floats(0, 1), st.sampled_from(SCHEDULES), st.floats(0, 1), st.floats(0, 1))
def test_decay_never_rises_and_stays_within_bounds(progress, step, schedule, decay_fraction, final):
    now = decay_factor(progress, schedule, decay_fraction, final)
    later = decay_factor(progress + step, schedule, decay_fraction, final)
    assert final - 1e-9 <= later <= now + 1e-9 <= 1 + 2e-9


def test_warmup_is_never_zero_and_ends_at_one():
    assert [warmup_factor(step, 4) for step in range(6)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert warmup_factor(0, 0) == 1


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match="'wsb'"):
        decay_factor(0.5, "wsb")


def test_a_step_budget_does_not_look_at_the_clock():
    budget = Budget(steps=10)
    assert budget.progress(5, elapsed=1e9) == 0.5
    assert not budget.spent(9, 1e9, 1e9)
    assert budget.spent(10, 0.0, 0.0)


def test_a_time_budget_stops_before_a_step_that_would_pass_it():
    budget = Budget(seconds=100)
    assert not budget.spent(3, elapsed=97.9, step_seconds=2)
    assert budget.spent(3, elapsed=98.1, step_seconds=2)
    assert budget.progress(3, elapsed=60, started=20) == pytest.approx(0.5)
