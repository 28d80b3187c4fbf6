"""`scratch-gpt plan` chooses the cheapest way that fits, says when nothing does, and the README's table is its own."""

import json
import re
from pathlib import Path

import pytest
from planned_tiny import tiny_config

from hf_scratch_gpt.cli import main
from hf_scratch_gpt.model import ScratchGPTConfig
from hf_scratch_gpt.pretraining import memory, plan
from hf_scratch_gpt.pretraining.plan import GIB, Request

README = Path(__file__).resolve().parents[2] / "README.md"


def planned(capsys, *arguments):
    assert main(["plan", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_plan_tells_all_in_text(capsys):
    assert main(["plan", "gpt3-6.7b", "--gpus", "64", "--hbm", "80"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("gpt3-6.7b: 6,658,404,352 parameters, 32 layers, width 4,096\n")
    for told in (
        "Training on 64 GPUs of 80 GiB in bf16 with AdamW fits:",
        "256 sequences of 2,048 tokens = 64 GPUs x micro-batch ",
        "sharding        gradients and optimizer states",
        "Inference in bf16: weights 12.40 GiB, keys and values of a sequence of 2,048 tokens 0.56 GiB",
        "compute-optimal budget: 133.17B tokens (20 a parameter)",
        "hours at 40% of 64 x 989 TFLOPS",
        "host memory     74.41 GiB more in the main process",  # 12 bytes a parameter
    ):
        assert told in printed


def test_the_numbers_of_a_plan_belong_together(capsys):
    told = planned(capsys, "gpt2-355m", "--gpus", "4", "--batch-size", "64", "--mfu", "0.5", "--peak-tflops", "100")
    setup, peak = told["setup"], told["peak"]
    assert 4 * setup["micro_batch"] * told["accumulation_steps"] == told["batch_size"] == 64
    assert setup["accumulates"] == (told["accumulation_steps"] > 1)
    parts = ("weights", "gradients", "optimizer", "activations", "logits", "snapshot")
    assert peak["total"] == sum(peak[part] for part in parts)
    assert peak["total"] == max(moment["total"] for moment in told["moments"].values())
    assert told["fits"]
    assert peak["total"] <= told["usable_memory_of_a_device"] == int(0.9 * 80 * GIB)
    assert told["inference"]["weights"] == 2 * 354_823_168
    assert told["hours"] == pytest.approx(told["compute_optimal_flops"] / (4 * 100e12 * 0.5) / 3600)


def test_the_snapshot_of_a_checkpoint_counts_where_training_has_the_hosts_memory(capsys):
    on_gpu, on_cpu = (planned(capsys, "gpt2-124m", "--device", device) for device in ("cuda", "cpu"))
    assert on_gpu["snapshot_in_host_memory"] == on_cpu["snapshot_in_host_memory"] == 12 * on_gpu["parameters"]
    assert on_gpu["peak"]["snapshot"] == 0
    assert on_cpu["peak"]["snapshot"] == 12 * on_cpu["parameters"]
    assert main(["plan", "gpt2-124m", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "    snapshot           1.39 GiB\n" in printed
    assert "host memory" not in printed


def request(gibibytes, gpus=8, **settings):
    return Request(gpus, int(gibibytes * GIB), 2048, 8 * gpus, **settings)


def test_with_less_memory_the_way_gets_dearer_and_the_micro_batch_smaller():
    config = ScratchGPTConfig.from_preset("gpt3-1.3b")
    size = memory.measure_model(config)
    ways, last = [], None
    for gibibytes in (300, 80, 40, 24, 16, 12, 8, 5):
        setup, peak, fits = plan.choose(config, size, request(gibibytes))
        way = (setup.checkpointing, memory.SHARDINGS.index(setup.sharding))
        assert not fits or peak.total <= 0.9 * gibibytes * GIB
        if last is not None and last[0] == way:
            assert setup.micro_batch <= last[1]
        last = way, setup.micro_batch
        ways.append(way)
    assert ways == sorted(ways)
    assert ways[0] == (False, 0)
    assert ways[-1] == (True, 2)


def test_one_micro_batch_more_would_not_fit():
    config = ScratchGPTConfig.from_preset("gpt3-1.3b")
    size = memory.measure_model(config)
    setup, _, fits = plan.choose(config, size, request(80))
    assert fits
    assert setup.micro_batch < 8
    larger = request(80, micro_batch=2 * setup.micro_batch, sharding=setup.sharding, checkpointing=setup.checkpointing)
    assert not plan.choose(config, size, larger)[2]


def test_the_devices_that_are_needed_are_enough_and_half_are_not(capsys):
    told = planned(capsys, "gpt3-13b", "--gpus", "1")
    needed = told["devices_needed"]
    assert not told["fits"]
    assert needed > 1
    assert planned(capsys, "gpt3-13b", "--gpus", str(needed), "--batch-size", str(needed))["fits"]
    assert not planned(capsys, "gpt3-13b", "--gpus", str(needed // 2), "--batch-size", str(needed // 2))["fits"]
    assert main(["plan", "gpt3-13b"]) == 0
    assert f"{needed} such devices are enough" in capsys.readouterr().out


def test_what_no_number_of_devices_can_train_is_said(capsys):
    assert main(["plan", "gpt3-175b", "--hbm", "2"]) == 0
    printed = capsys.readouterr().out
    assert "does NOT fit" in printed
    assert "no number of devices is enough for one sequence" in printed


def test_muon_is_never_spread_and_needs_less_than_adamw_on_one_device(capsys):
    muon, adamw = (planned(capsys, "gpt3-13b", "--gpus", "64", "--optimizer", name) for name in ("muon", "adamw"))
    assert muon["setup"]["sharding"] == "none"
    assert not muon["fits"]
    assert adamw["setup"]["sharding"] != "none"
    assert adamw["fits"]
    enough = muon["devices_needed_with_adamw"]
    assert muon["devices_needed"] is None
    assert main(["plan", "gpt3-13b", "--optimizer", "muon"]) == 0
    assert f"--optimizer adamw, which can be spread: {enough} such devices are enough" in capsys.readouterr().out


def test_a_folder_is_planned_as_its_preset(tmp_path, capsys):
    ScratchGPTConfig.from_preset("gpt2-124m").save_pretrained(tmp_path)
    of_folder, of_preset = planned(capsys, str(tmp_path)), planned(capsys, "gpt2-124m")
    assert of_folder.pop("model") == str(tmp_path)
    assert of_preset.pop("model") == "gpt2-124m"
    assert of_folder == of_preset


def test_given_choices_are_kept(capsys):
    told = planned(
        capsys,
        *("modern-135m", "--gpus", "2", "--micro-batch", "2", "--sharding", "full", "--checkpointing"),
        *("--precision", "fp32", "--no-separate-documents", "--sequence-length", "512", "--device", "cpu"),
        *("--model-overrides", "num_hidden_layers=3"),
    )
    setup = told["setup"]
    given = {"micro_batch": 2, "sharding": "full", "checkpointing": True, "bf16": False, "packed": False}
    assert given.items() <= setup.items()
    assert (setup["sequence_length"], setup["device"], told["layers"]) == (512, "cpu", 3)
    assert told["hours"] is None  # nobody said how fast a CPU is


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["gpt2-1.5"], "no preset or model folder 'gpt2-1.5'; did you mean 'gpt2-1.5b'?; presets: gpt1, gpt2-124m"),
        ([], "scratch-gpt plan: name a preset or a model folder, or give --all for a table of all presets"),
        (["gpt1", "--all"], "scratch-gpt plan: name a preset or a model folder, or give --all"),
        (["gpt1", "--gpu", "2"], "command line: unexpected '--gpu'; did you mean 'gpus'?"),
        (["gpt1", "--gpus", "0"], "--gpus is 0; give a number above 0"),
        (["gpt1", "--gpus", "two"], "scratch-gpt plan: argument --gpus: invalid int value: 'two'"),
        (["gpt1", "--hbm", "-1"], "--hbm is -1.0; give a number above 0"),
        (["gpt1", "--hbm", "nan"], "--hbm is nan; give a number above 0"),
        (["gpt1", "--mfu", "40"], "--mfu is 40.0; it is a share of the peak, from 0 to 1"),
        (["gpt1", "--sequence-length", "513"], "--sequence-length is 513; gpt1 has 512 learned positions: lower it"),
        (["gpt1", "--gpus", "3", "--batch-size", "4"], "--batch-size is 4, which does not divide by 3 GPUs; choose a"),
        (["gpt1", "--sharding", "full"], "--sharding is full, and there is one GPU to spread over; raise --gpus"),
        (["gpt1", "--gpus", "2", "--sharding", "full", "--optimizer", "muon"], "--sharding is full; Muon needs whole"),
        (["gpt1", "--optimizer", "sgd"], "scratch-gpt plan: argument --optimizer: invalid choice: 'sgd'"),
        (["gpt1", "--model-overrides", "hiden_size=4"], "`hiden_size` is no field of ScratchGPTConfig, did you mean"),
        (["tests", "--model-overrides", "hidden_size=4"], "--model-overrides change a preset; tests is a folder"),
    ],
)
def test_a_mistake_is_one_line(arguments, line, capsys, monkeypatch):
    monkeypatch.chdir(README.parent)
    assert main(["plan", *arguments]) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"scratch-gpt: error: {line}")


def test_a_folder_that_holds_no_model_of_ours_is_one_line(tmp_path, capsys):
    assert main(["plan", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"scratch-gpt: error: {tmp_path}: holds no model (it has no config.json)\n"
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert main(["plan", str(tmp_path)]) == 2
    (printed,) = capsys.readouterr().err.splitlines()
    assert printed.startswith(f"scratch-gpt: error: {tmp_path}: its model type is 'llama'; ")


def test_layers_of_one_sequence_that_fits_barely_are_not_said_to_fit():
    config = tiny_config("gpt2-124m")
    size = memory.measure_model(config)
    setup = memory.TrainingSetup(1, 128, packed=True, checkpointing=True)
    exact = memory.peak(config, size, setup).total
    options = {"sequence_length": 128, "batch_size": 1, "checkpointing": True}
    assert plan.choose(config, size, Request(1, int(exact / 0.9) + 2, **options))[2]
    assert not plan.choose(config, size, Request(1, int(exact / 0.9) - 2, **options))[2]


def test_the_readmes_table_is_what_the_command_prints(capsys):
    section = re.search(r"<!-- presets -->\n(.*?)\n<!-- /presets -->", README.read_text(encoding="utf-8"), re.DOTALL)
    assert section is not None
    assert main(["plan", "--all"]) == 0
    assert section.group(1) == capsys.readouterr().out.rstrip("\n")
