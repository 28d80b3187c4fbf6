"""What `tokens` chooses from a model's size, what it leaves alone, and that a run says what was chosen."""

import math

import pytest

from hf_scratch_gpt.model import ScratchGPTConfig
from hf_scratch_gpt.pretraining import dial
from hf_scratch_gpt.pretraining.memory import measure_model
from hf_scratch_gpt.pretraining.pretrain import Arguments, run
from hf_scratch_gpt.runs import parse_arguments, read_metrics
from hf_scratch_gpt.runs.arguments import read_recipe


def test_the_step_law_gives_its_papers_figures():
    # 1B parameters and 100B tokens: the paper's figure has its optimum near 2e-3 and 1.1M tokens a step
    assert dial.adamw_learning_rate(1e9, 1e11) == pytest.approx(1.6e-3, rel=0.05)
    assert dial.batch_tokens(1e11) == pytest.approx(1.1e6, rel=0.05)


def test_the_rates_are_those_that_were_tuned_where_they_were_tuned():
    assert dial.rate_beside_muon(256) == pytest.approx(8e-3)
    assert dial.rate_beside_muon(1024) == pytest.approx(4e-3)
    assert dial.muon_learning_rate(4096) == pytest.approx(0.01)
    assert dial.muon_learning_rate(16_384) == dial.muon_learning_rate(524_288) == 0.02


@pytest.mark.parametrize("millions", [30, 50, 124, 400, 2000])
def test_a_size_gets_a_shape_of_that_size(millions):
    fields = dial.modern_shape(millions * 1e6, 32_768)
    config = ScratchGPTConfig.from_preset("modern-30m", vocab_size=32_768, **fields)
    assert measure_model(config).parameters == pytest.approx(millions * 1e6, rel=0.052)
    assert fields["head_dim"] * fields["num_attention_heads"] == fields["hidden_size"]
    assert 1 / 3 < fields["hidden_size"] / fields["num_hidden_layers"] / 32 < 3


def test_tokens_are_read():
    read = {"auto": None, "Auto": None, "2000000": 2_000_000, "2M": 2_000_000, "1.5b": 1_500_000_000, "30k": 30_000}
    assert {text: dial.parse_tokens(text) for text in read} == read
    for text in ("many", "0", "-1", "1e6"):
        with pytest.raises(ValueError, match="'tokens' is"):
            dial.parse_tokens(text)


@pytest.mark.parametrize("other", [{"max_steps": 5}, {"max_minutes": 1.0}])
def test_tokens_are_a_budget_beside_no_other(make_arguments, other):
    with pytest.raises(ValueError, match=f"both 'tokens' .* and '{next(iter(other))}' are given"):
        make_arguments(**{"max_steps": 0, "tokens": "auto", **other}).check()


def test_a_number_of_tokens_sets_the_steps_and_nothing_else(make_arguments):
    arguments = make_arguments(max_steps=0, tokens="1280")
    chosen, _ = dial.with_chosen_settings(arguments)
    assert vars(chosen) == {**vars(arguments), "tokens": "", "max_steps": 1280 // (4 * 32)}


def _parse(prepared_folder, tmp_path, *flags):
    shared = ["--dataset_dir", str(prepared_folder), "--output_dir", str(tmp_path / "run"), "--tokens", "auto"]
    return parse_arguments(Arguments, [*shared, "--context_length", "32", *flags])


def test_the_text_bounds_the_tokens_and_all_follows_from_them(prepared_folder, tmp_path):
    from hf_scratch_gpt.pretraining.setup import load_dataset

    arguments = _parse(prepared_folder, tmp_path)
    chosen, lines = dial.with_chosen_settings(arguments)
    tokens = 4 * load_dataset(prepared_folder, 32).manifest["splits"]["train"]["tokens"]
    batch = chosen.batch_size * 32
    assert math.sqrt(0.5) <= batch / dial.batch_tokens(tokens) <= math.sqrt(2)
    assert chosen.max_steps == round(tokens / batch)
    assert chosen.learning_rate == pytest.approx(8e-3)  # the preset is 256 wide
    assert chosen.muon_learning_rate == pytest.approx(dial.muon_learning_rate(batch), rel=0.01)
    assert chosen.tokens == ""
    assert any(line.startswith(f"tokens {tokens:,}: 4.0 passes over the text") for line in lines)
    chosen.check()


def test_what_is_stated_stays_even_where_it_is_the_default(prepared_folder, tmp_path):
    default = Arguments()
    flags = ["--batch_size", str(default.batch_size), "--learning_rate", "3e-3", "--optimizer", "adamw"]
    chosen, lines = dial.with_chosen_settings(_parse(prepared_folder, tmp_path, *flags, "--warmup_steps", "3"))
    assert (chosen.batch_size, chosen.learning_rate, chosen.warmup_steps) == (default.batch_size, 3e-3, 3)
    assert chosen.gradient_accumulation_steps == 1
    assert sum("as stated" in line for line in lines) == 3


def test_adamw_alone_has_the_step_laws_rate(prepared_folder, tmp_path):
    chosen, _ = dial.with_chosen_settings(_parse(prepared_folder, tmp_path, "--optimizer", "adamw"))
    config = ScratchGPTConfig.from_preset("modern-5m", vocab_size=8)
    hidden = measure_model(config).parameters - 8 * 256
    tokens = chosen.max_steps * chosen.batch_size * 32
    assert chosen.learning_rate == pytest.approx(dial.adamw_learning_rate(hidden, tokens), rel=0.02)
    assert chosen.muon_learning_rate == Arguments().muon_learning_rate


def test_a_size_that_is_no_preset_is_had_with_the_dial_only(prepared_folder, tmp_path):
    chosen, lines = dial.with_chosen_settings(_parse(prepared_folder, tmp_path, "--preset", "modern-3m"))
    assert chosen.model_overrides["hidden_size"] == 128 * round(chosen.model_overrides["hidden_size"] / 128)
    assert lines[0].startswith("model modern-3m: ")
    with pytest.raises(ValueError, match="no model of 3,000,000 parameters has a vocabulary of 32,768"):
        dial.modern_shape(3e6, 32_768)
    with pytest.raises(ValueError, match="begins at modern-1m"):
        dial.with_chosen_settings(_parse(prepared_folder, tmp_path, "--preset", "modern-0.5m"))
    with pytest.raises(ValueError, match="no preset 'modern-small'"):
        dial.with_chosen_settings(_parse(prepared_folder, tmp_path, "--preset", "modern-small"))


def test_large_logits_are_split(monkeypatch):
    # 64 windows of 1,024 tokens with 32,768 logits in fp32 are 8 GiB
    assert dial._batch(65_536, 1024, 32_768) == (64, 8)
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert dial._batch(65_536, 1024, 32_768) == (64, 1)


def test_a_runs_recipe_says_what_was_chosen_and_the_second_call_finds_it_done(make_arguments, capsys):
    arguments = make_arguments(max_steps=0, tokens="512")
    folder = run(arguments)
    metrics = read_metrics(folder)
    assert metrics["metrics"]["tokens"] == 512
    recipe = read_recipe(folder / "recipe.yaml")
    assert recipe["max_steps"] == 4
    assert "tokens" not in recipe
    assert "pretrain: 4 steps: 512 tokens" in capsys.readouterr().out
    run(arguments)
    assert read_metrics(folder)["run_id"] == metrics["run_id"]
