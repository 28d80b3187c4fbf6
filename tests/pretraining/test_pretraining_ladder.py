"""How a ladder's models get their shapes, rates and tokens, what a budget leaves of it, and what is refused."""

import dataclasses

import pytest

from hf_scratch_gpt.pretraining.ladder import (
    LadderShapes,
    Rung,
    parse_size,
    scaled_batch,
    scaled_learning_rate,
    short_size,
)
from hf_scratch_gpt.pretraining.scaling_run import Ladder, LadderRequest, _Timed
from hf_scratch_gpt.pretraining.setup import load_dataset


@pytest.fixture
def shapes(make_arguments, prepared_folder):
    """The tiny recipe's shapes by non-embedding parameters."""
    return LadderShapes(make_arguments(), load_dataset(prepared_folder, 32), "non-embedding")


def test_sizes_are_read_and_written():
    assert [parse_size(text) for text in ("250000", "250k", "1.5M", "2B")] == [250_000, 250_000, 1_500_000, 2e9]
    assert [short_size(size) for size in (999, 12_288, 110_592, 1_769_472, 999_900)] == [
        "999",
        "12.3k",
        "111k",
        "1.77M",
        "1M",
    ]
    for text in ("large", "-3k", "0", "1e5"):
        with pytest.raises(ValueError, match="is not a number of parameters"):
            parse_size(text)


def test_only_the_width_changes_and_the_ratios_stay(shapes):
    overrides = shapes.overrides(64)  # the recipe's model is 32 wide
    assert overrides["hidden_size"] == 64
    assert overrides["intermediate_size"] == 128
    assert overrides["head_dim"] == 32
    assert (overrides["num_attention_heads"], overrides["num_key_value_heads"]) == (2, 1)
    assert overrides["num_hidden_layers"] == 2


def test_parameters_are_counted_by_hand(shapes):
    vocabulary, width = shapes.config.vocab_size, 32
    attention = width * 32 + 2 * width * 16 + 32 * width + 2 * 16  # q, k and v, o, the norms of q and k
    layer = attention + 3 * width * 64 + 2 * width
    rung = shapes.rung(width)
    assert rung.embedding == vocabulary * width
    assert rung.size("non-embedding") == 2 * layer + width
    assert rung.size("total") == 2 * layer + width + vocabulary * width
    assert shapes.recipe_rung == rung


def test_the_nearest_rung_is_the_nearest_of_all_widths(shapes):
    rungs = [shapes.rung(width) for width in range(8, 200, 8)]
    for size in (100, 5_000, 17_000, 60_000, 200_000):
        distances = [max(rung.size("non-embedding") / size, size / rung.size("non-embedding")) for rung in rungs]
        assert shapes.nearest(size) == rungs[distances.index(min(distances))]


def test_rates_follow_their_rules(make_arguments):
    muon, adamw = make_arguments(learning_rate=0.01), make_arguments(learning_rate=0.01, optimizer="adamw")
    assert scaled_learning_rate(muon, 1 / 4) == pytest.approx(0.02)
    assert scaled_learning_rate(adamw, 1 / 4) == pytest.approx(0.04)
    assert scaled_learning_rate(muon, 1) == scaled_learning_rate(adamw, 1) == 0.01


def test_a_smaller_run_is_the_recipes_run_shrunken(make_arguments, prepared_folder):
    arguments = make_arguments(batch_size=16, gradient_accumulation_steps=2, warmup_steps=20, muon_learning_rate=0.01)
    shapes = LadderShapes(arguments, load_dataset(prepared_folder, 32), "total")
    most = 16 * 32 * 400
    whole = shapes.settings(shapes.recipe_rung, most, 1, "elsewhere", most)
    assert (whole.batch_size, whole.gradient_accumulation_steps, whole.max_steps, whole.warmup_steps) == (
        16,
        2,
        400,
        20,
    )
    assert whole.muon_learning_rate == 0.01
    small = shapes.settings(shapes.rung(16), most / 16, 1, "elsewhere", most)
    assert small.batch_size == 3  # 16 x (1 / 16)^0.571 is 3.3
    assert small.gradient_accumulation_steps == 1
    assert small.max_steps == round(most / 16 / (3 * 32))
    assert small.warmup_steps == small.max_steps // 20  # a twentieth of the steps, as in the whole run
    assert small.muon_learning_rate == pytest.approx(0.01 * (3 / 16) ** 0.5, rel=1e-5)
    assert small.learning_rate == pytest.approx(arguments.learning_rate * 2**0.5, rel=1e-5)
    assert scaled_batch(arguments, 0.9) == (16, 2)  # 15.07, in parts of no more than the recipe's 8


def test_the_recipes_own_width_is_trained_by_the_recipes_own_rates(shapes):
    arguments = shapes.arguments
    settings = shapes.settings(shapes.recipe_rung, 128 * 40, 7, "elsewhere")
    assert settings.max_steps == 40
    assert (settings.learning_rate, settings.muon_learning_rate) == (
        arguments.learning_rate,
        arguments.muon_learning_rate,
    )
    assert (settings.seed, settings.evaluation_seed) == (7, arguments.seed)
    assert settings.warmup_steps == 2
    settings.check()


def _request(make_arguments, tmp_path, **changes) -> LadderRequest:
    return dataclasses.replace(LadderRequest(make_arguments(), tmp_path / "ladder", (4e3, 16e3, 34e3)), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sizes": (4e3, 16e3)}, "names 2 sizes, expected at least 3"),
        ({"sizes": (16e3, 16.1e3, 16.2e3)}, "make 1 different models"),
        ({"target": 350e3}, "not trusted beyond 10 times"),
        ({"check_factor": 10.5}, "expected more than 1 and at most 10"),
        ({"check_factor": 1.0}, "expected more than 1"),
        ({"check_factor": 1.01}, "no larger model"),
        ({"minutes": 0.0}, "--budget is 0.0"),
        ({"minutes": 1e-4}, "raise it or name smaller sizes"),
        ({"seeds": 0}, "--seeds is 0"),
    ],
)
def test_what_cannot_serve_is_refused_in_one_line(make_arguments, tmp_path, changes, message, monkeypatch):
    monkeypatch.setattr("hf_scratch_gpt.pretraining.speed._SECONDS", 0.0)
    with pytest.raises(ValueError, match=message) as caught:
        Ladder(_request(make_arguments, tmp_path, **changes)).plan()
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ladder").exists()


def _timed(size: int, seconds_a_ratio: float) -> _Timed:
    return _Timed(Rung(8, size, 0), seconds_a_ratio, 10.0)


def test_a_budget_lowers_the_tokens_first_and_then_drops_the_largest_size(make_arguments, tmp_path, monkeypatch):
    ladder = Ladder(_request(make_arguments, tmp_path, minutes=10.0))
    sizes = [_timed(1000, 1.0), _timed(2000, 2.0), _timed(4000, 4.0), _timed(8000, 8.0)]
    check = _timed(32000, 40.0)
    # 2 x (1 + 2 + 4 + 8) + 40 = 70 seconds for each token a parameter, 9 x 10 whatever happens: 510 are left.
    kept, _, ratio, left_out = ladder._fit_budget(sizes, check)
    assert (kept, ratio, left_out) == (sizes, 7.29, [])
    ladder.request = dataclasses.replace(ladder.request, minutes=60.0)
    assert ladder._fit_budget(sizes, check)[2] == 20.0
    ladder.request = dataclasses.replace(ladder.request, minutes=5.0)
    monkeypatch.setattr(ladder, "_check_rung", lambda rungs: rungs[-1])
    monkeypatch.setattr(ladder, "_time", lambda rung: _timed(16000, 16.0))
    # 210 are left for 70 a token: 3, too few. Without the largest, (300 - 70) / (14 + 16).
    kept, _, ratio, left_out = ladder._fit_budget(sizes, check)
    assert (kept, ratio, left_out) == (sizes[:3], 7.67, sizes[3:])
