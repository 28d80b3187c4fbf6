"""`report.json` holds what the runs measured, under the names that were promised, and nothing else."""

import json
import math
import shutil

import pytest
from reporting_road import write_evaluation, write_run, write_training

from hf_scratch_gpt.reporting import make_report, stage_table, write_report
from hf_scratch_gpt.reporting.summary import find_stages, model_names
from hf_scratch_gpt.reporting.verdicts import count, duration, percent, stage_rows

PROMISED = {
    "tokenizer": ("bytes_per_token",),
    "pretrain": (
        "parameters",
        "tokens",
        "seconds",
        "tokens_per_second",
        "heldout_bits_per_byte",
        "random_init_bits_per_byte",
    ),
    "sft": ("heldout_exact_match", "base_exact_match"),
    "classify": ("heldout_accuracy", "heldout_examples", "heldout_f1", "majority_accuracy"),
    "reward": ("heldout_accuracy", "heldout_pairs"),
    "dpo": ("gold_reward", "sft_gold_reward", "win_rate_vs_sft", "preference_accuracy"),
    "ppo": ("reward_start", "reward_end", "gold_reward", "sft_gold_reward", "kl", "share_ended"),
}


def test_every_promised_figure_is_there_as_a_number(road):
    report = make_report(road, 800.0)
    for stage, names in PROMISED.items():
        for name in names:
            assert math.isfinite(report["stages"][stage][name]), (stage, name)
    assert report["wall_seconds"] == 800.0
    assert report["peak_rss_bytes"] >= 2**30
    assert report["environment"]["cores"] == 2


def test_figures_on_questions_come_from_the_evaluation(road):
    metrics = json.loads((road / "evaluate" / "metrics.json").read_text())["metrics"]
    stages = make_report(road, 1.0)["stages"]
    models = metrics["models"]
    assert stages["sft"]["heldout_exact_match"] == models["sft"]["exact_match"]["mean"]
    assert stages["sft"]["base_exact_match"] == models["base"]["exact_match"]["mean"]
    assert stages["dpo"]["gold_reward"] == models["dpo"]["sampled_gold_reward"]["mean"]
    assert stages["dpo"]["sft_gold_reward"] == models["sft"]["sampled_gold_reward"]["mean"]
    assert stages["ppo"]["win_rate_vs_sft"] == models["ppo"]["versus_reference"]["sampled_win_rate"]["mean"]
    assert stages["ppo"]["kl"] == models["ppo"]["kl"]["mean"]
    assert stages["ppo"]["share_ended"] == models["ppo"]["sampled_share_ended"]["mean"]
    assert stages["ppo"]["gold_reward_of"] == "answers sampled at temperature 1"
    gain, base = stages["sft"]["exact_match_gain_interval"], models["base"]["versus_reference"]["exact_difference"]
    assert gain == [-base["high"], -base["low"]]
    assert stages["dpo"]["preference_accuracy"] == 0.81  # its own measurement comes first


def test_a_missing_stage_is_absent_and_its_figures_are_not_invented(tmp_path):
    write_training(tmp_path)
    shutil.rmtree(tmp_path / "ppo")
    report = make_report(tmp_path, 1.0)
    assert "ppo" not in report["stages"]
    assert "evaluate" not in report["stages"]
    assert "heldout_exact_match" not in report["stages"]["sft"]
    assert "gold_reward" not in report["stages"]["dpo"]
    assert {row.stage: row.verdict for row in stage_rows(report)}["dpo"] == "not evaluated"


def test_stages_are_told_by_what_they_say_and_not_by_their_folder(tmp_path):
    write_run(tmp_path, "dpo", {"beta": 1.0}, 1, folder="second-try")
    write_run(tmp_path, "dpo", {"beta": 2.0}, 2, folder="a-third")
    write_run(tmp_path, "dpo", {"beta": 3.0}, 9, folder="dpo.old")
    stages = find_stages(tmp_path)
    assert list(stages) == ["dpo"]
    assert stages["dpo"].folder.name == "a-third"


def test_figures_of_another_run_are_not_taken(tmp_path):
    """The evaluation names its models by their runs: a stage that was run again since is not in it."""
    write_training(tmp_path)
    write_evaluation(tmp_path)
    path = tmp_path / "ppo" / "metrics.json"
    path.write_text(path.read_text().replace('"id-ppo"', '"id-ppo-anew"'))
    assert model_names(find_stages(tmp_path))["dpo"] == "dpo"
    # The name alone would fit, but this model was measured before.
    assert "ppo" not in model_names(find_stages(tmp_path))
    assert "gold_reward" not in make_report(tmp_path, 1.0)["stages"]["ppo"]


def test_a_folder_without_runs_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished run below"):
        make_report(tmp_path, 1.0)


def test_the_table_says_when_a_stage_did_nothing(tmp_path):
    write_training(tmp_path)
    write_evaluation(tmp_path, {"base": 0.0, "sft": 0.5, "dpo": 0.5, "ppo": 0.2})
    rows = {row.stage: row for row in stage_rows(make_report(tmp_path, 1.0))}
    assert rows["sft"].state == "good"
    assert rows["dpo"].verdict == "no clear change"
    assert rows["ppo"].state == "bad"
    assert rows["ppo"].verdict.startswith("worse by")


def test_the_terminal_table_is_aligned_and_complete(road):
    lines = stage_table(make_report(road, 800.0)).splitlines()
    assert [line.split()[0] for line in lines[2:-1]] == [
        "tokenizer",
        "prepare",
        "pretrain",
        "sft",
        "classify",
        "reward",
        "dpo",
        "ppo",
        "evaluate",
    ]
    assert "1.585 – 1.667" in lines[4]
    assert "beats gzip and xz" in lines[4]
    ends = {
        line.index(number) + len(number) for line, number in zip(lines[4:7], ("1.624", "0.450", "0.981"), strict=True)
    }
    assert len(ends) == 1
    assert lines[-1].startswith("whole road: 13 min 20 s")


@pytest.mark.parametrize(
    ("interval", "verdict", "state"),
    [
        ([0.87, 0.9], "better than always 'ham': 86%", "good"),
        ([0.8, 0.9], "not clearly better than always 'ham': 86%", "neutral"),
        ([0.7, 0.8], "worse than always 'ham': 86%", "bad"),
    ],
)
def test_a_classifier_is_judged_against_the_most_frequent_label(tmp_path, interval, verdict, state):
    metrics = {
        **{"heldout_accuracy": sum(interval) / 2, "heldout_accuracy_interval": interval, "heldout_examples": 99},
        **{"majority_accuracy": 0.86, "majority_label": "ham", "f1_of": "spam", "heldout_f1": 0.5},
    }
    write_run(tmp_path, "classify", metrics, 1)
    (row,) = stage_rows(make_report(tmp_path, 1.0))
    assert (row.verdict, row.state, row.chance) == (verdict, state, 0.86)
    assert row.detail == "99 held-out texts, F1 0.500 ('spam')"


def test_report_files_are_written_and_overwritten(road):
    first = write_report(road, 1.0)
    assert json.loads((road / "report.json").read_text()) == first
    write_report(road, 2.0)
    assert json.loads((road / "report.json").read_text())["wall_seconds"] == 2.0
    assert not list(road.glob(".*tmp"))


def test_numbers_are_told_as_people_tell_them():
    assert [duration(seconds) for seconds in (8.44, 59.4, 125, 4320)] == ["8.4 s", "59 s", "2 min 05 s", "1 h 12 min"]
    assert [count(value) for value in (37, 1_234, 4_100_000)] == ["37", "1.23k", "4.1M"]
    assert [percent(value) for value in (0.0, 0.004, 0.5, 0.9958, 1.0)] == ["0%", "0.4%", "50%", "99.6%", "100%"]


def test_figures_of_training_data_say_so(road):
    stages = make_report(road, 1.0)["stages"]
    assert stages["sft"]["last_train_loss"] == 0.4
    assert stages["ppo"]["reward_start_and_end_of"].endswith("training prompts")


def test_compressors_are_beaten_on_the_same_bytes_only(road):
    path = road / "pretrain" / "metrics.json"
    run = json.loads(path.read_text())
    for heldout_bytes, words in ((300_000, "beats gzip and xz"), (100_000, "better than untrained")):
        run["metrics"]["heldout_bytes"] = heldout_bytes
        path.write_text(json.dumps(run))
        rows = {row.stage: row for row in stage_rows(make_report(road, 1.0))}
        assert rows["pretrain"].verdict == words
