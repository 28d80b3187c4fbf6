"""`scratch-gpt scaling` on a real ladder of three sizes and a few steps, killed on its way and taken up again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from hf_scratch_gpt import cli
from hf_scratch_gpt.reporting.scaling_page import make_page, plan_text

MODEL = {
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "hidden_size": 32,
    "intermediate_size": 96,
    "head_dim": 16,
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe of `pretrain` over a prepared folder of a few words."""
    root = tmp_path_factory.mktemp("scaling")
    text = root / "text"
    text.mkdir()
    words = ["the", "list", "of", "names", "and", "a", "function", "that", "returns", "each", "value", "in"]
    for number in range(60):
        line = " ".join(words[(number * step) % len(words)] for step in range(40))
        (text / f"{number}.txt").write_text(f"{number} {line}\n" * 5, encoding="utf-8")
    tokenizer, prepared = root / "tokenizer", root / "prepare"
    shared = ["--sources", str(text), "--heldout_fraction", "0.2"]
    assert cli.main(["tokenizer", *shared, "--vocab_size", "300", "--output_dir", str(tokenizer)]) == 0
    assert cli.main(["prepare", *shared, "--tokenizer_dir", str(tokenizer), "--output_dir", str(prepared)]) == 0
    settings = {
        "output_dir": str(root / "pretrain"),
        "dataset_dir": str(prepared),
        "model_overrides": MODEL,
        "context_length": 32,
        "batch_size": 4,
        "max_steps": 10,
        "precision": "fp32",
        "compile": "false",
        "evaluation_bytes": 3000,
    }
    path = root / "pretrain.yaml"
    path.write_text(yaml.safe_dump(settings), encoding="utf-8")
    return path


def _command(recipe: Path, folder: Path, *flags: str) -> list[str]:
    sizes = ["--sizes", "3.1k", "12k,28k", "--tokens-per-parameter", "0.1"]  # 16, 32 and 48 wide
    return ["scaling", str(recipe), *sizes, *flags, "--output-dir", str(folder)]


def _read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def _kill_when(process: subprocess.Popen, done) -> None:
    for _ in range(3000):
        if done() or process.poll() is not None:
            break
        time.sleep(0.02)
    assert process.poll() is None, "it ended before it could be killed"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_ladder_that_was_killed_goes_on_and_trains_no_model_twice(recipe, tmp_path, capsys):
    folder = tmp_path / "ladder"
    command = _command(recipe, folder, "--target", "50k")
    process = subprocess.Popen([sys.executable, "-m", "hf_scratch_gpt", *command], stdout=subprocess.DEVNULL)
    _kill_when(process, lambda: len(list(folder.glob("*/metrics.json"))) >= 2)
    finished = {path.parent.name: _read(path)["run_id"] for path in folder.glob("*/metrics.json")}
    plan = (folder / "plan.json").read_bytes()
    assert cli.main(command) == 0
    assert (folder / "plan.json").read_bytes() == plan
    again = {path.parent.name: _read(path)["run_id"] for path in folder.glob("*/metrics.json")}
    assert len(again) == 3 * 2 + 1
    assert finished.items() <= again.items()

    record, output = _read(folder / "scaling.json"), capsys.readouterr().out
    prediction = _read(folder / "prediction.json")
    assert record["prediction"] == prediction
    assert prediction["made_before_check"] is True
    check = next(folder.glob("check-*"))
    assert prediction["made_at"] <= _read(check / "metrics.json")["started_at"]
    measured = _read(check / "metrics.json")["metrics"]["heldout_bits_per_byte"]
    assert record["check"]["bits_per_byte"] == measured
    assert record["error"] == pytest.approx(prediction["check"]["bits_per_byte"] / measured - 1)
    assert f"error of the prediction: {record['error']:+.2%}" in output
    assert len({run["seed"] for run in record["runs"]}) == 2
    ratios = [run["tokens"] / run["size"] for run in [*record["runs"], record["check"]]]
    assert all(abs(ratio - 0.1) < 64 / 3100 for ratio in ratios)  # to half an optimizer step of the smallest
    page = (folder / "scaling.html").read_text(encoding="utf-8")
    assert page.count('class="dot after"') == 6 + 1  # the runs and the legend
    assert f"{100 * record['error']:+.2f}%" in page

    # A third call finds all of it done; another target is predicted without a step of training.
    assert cli.main(_command(recipe, folder, "--target", "60k")) == 0
    assert {path.parent.name: _read(path)["run_id"] for path in folder.glob("*/metrics.json")} == again
    later = _read(folder / "prediction.json")
    assert later["target"]["size"] == 60_000
    assert (later["made_before_check"], later["made_at"]) == (True, prediction["made_at"])
    _changed_ladder_admits_that_its_prediction_came_late(recipe, folder, capsys)


def _changed_ladder_admits_that_its_prediction_came_late(recipe, folder, capsys):
    path = folder / "prediction.json"
    earlier = _read(path)
    earlier["law"]["exponent"] += 0.01
    path.write_text(json.dumps(earlier), encoding="utf-8")
    assert cli.main(_command(recipe, folder)) == 0
    assert _read(path)["made_before_check"] is False
    assert "had begun when this was predicted" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--sizes", "3k", "12k"], "--sizes names 2 sizes"),
        (["--target", "1M"], "a fit is not trusted beyond 10 times"),
        (["--check-factor", "11"], "--check-factor is 11"),
        (["--sizes", "tiny", "2k", "3k"], "'tiny' is not a number of parameters"),
        (["--objective", "masked"], "only a causal model's bits per byte"),
        (["--bugdet", "3"], "unknown setting 'bugdet'"),
    ],
)
def test_mistakes_are_one_line(recipe, tmp_path, capsys, flags, message):
    assert cli.main(_command(recipe, tmp_path / "ladder", *flags)) == 2
    error = capsys.readouterr().err.strip()
    assert message in error
    assert "\n" not in error
    assert not (tmp_path / "ladder").exists()


def _record() -> dict:
    size = {"width": 8, "parameters": 5000, "non_embedding": 1000, "size": 1000}
    run = {**size, "seed": 1, "folder": "<b>", "tokens": 100, "seconds": 1.0, "learning_rate": 0.1, "batch_size": 4}
    run |= {"bits_per_byte": 2.0, "nats_a_token": 4.0, "skipped_updates": 0}
    told = {"size": 4000, "bits_per_byte": 1.8, "low": 1.7, "high": 1.9, "nats_a_token": 3.6, "extrapolation": 4.0}
    law = {"coefficient": 4.0, "exponent": 0.1, "exponent_low": 0.09, "exponent_high": 0.11, "backtest": None}
    law |= {"ceiling": 5.0, "without_ceiling": {"bits_per_byte": 1.9, "deviation": 0.01, "backtest": None}}
    plan = {"count": "total", "tokens_a_parameter": 20.0, "seeds": [1], "ladder": [size], "check": size}
    prediction = {"check": told, "target": None, "law": law, "warnings": ["a & b"], "made_before_check": True}
    check = {**run, "size": 4000}
    return {
        "plan": plan,
        "runs": [run, {**run, "size": 2000, "bits_per_byte": 1.9}],
        "prediction": {**prediction, "made_at": "now"},
        "check": check,
        "error": -0.1,
        "inside_interval": False,
    }


def test_the_page_escapes_text_and_tells_what_it_was_given():
    page = make_page(Path("<script>"), _record())
    assert "<script>" not in page
    assert "a &amp; b" in page
    assert "-10.00%" in page
    assert "outside the interval" in page


def test_what_makes_a_law_doubtful_is_said_before_anything_is_trained():
    plan = {"count": "total", "tokens_a_parameter": 20.0, "seeds": [1], "budget_minutes": None, "left_out": [9000]}
    entry = {"size": 1000, "parameters": 1000, "width": 8, "steps": 200, "expected_seconds": 3.0}
    plan |= {"ladder": [entry, {**entry, "size": 2500}], "check": {**entry, "size": 10_000}}
    plan["training_tokens"] = 200_000
    assert "warning" not in plan_text(plan)
    assert "left out, as they do not fit: 9k" in plan_text(plan)
    assert "200,000 tokens of text 1.1 times" in plan_text({**plan, "check": {**entry, "size": 11_000}})
    short = [{**entry, "steps": 199}, plan["ladder"][1]]
    assert "takes 199 optimizer steps, fewer than 200" in plan_text({**plan, "ladder": short})
    narrow = [entry, {**entry, "size": 2400}]
    assert "2.4 times the parameters of its smallest" in plan_text({**plan, "ladder": narrow})
