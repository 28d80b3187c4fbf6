"""A checkpoint is the state of its step, written beside the training; damage or a full disk costs only the last."""

import json
import os
import random
import resource
import shutil
import subprocess
import threading

import pytest
import torch
from pretraining_tiny import TINY_MODEL
from safetensors.torch import load_file
from test_pretraining_processes import assert_equal_weights, write_recipe
from test_pretraining_stage import read_curve

from hf_scratch_gpt import cli
from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.pretraining import checkpointing
from hf_scratch_gpt.pretraining.checkpointing import CheckpointWriter, TrainingState, load_checkpoint, save_checkpoint
from hf_scratch_gpt.pretraining.optimizers import make_optimizers
from hf_scratch_gpt.pretraining.pretrain import run
from hf_scratch_gpt.pretraining.setup import parse_overrides
from hf_scratch_gpt.pretraining.snapshot import Snapshot
from hf_scratch_gpt.runs import read_metrics
from hf_scratch_gpt.runs.checkpoints import find_damage, newest_checkpoint

FAULTS = ("truncated", "flipped bit", "missing", "wrong size", "empty")


class Training:
    """A tiny model with its optimizers and counters, trained by random gradients."""

    def __init__(self, seed=0, optimizer="muon", **overrides):
        torch.manual_seed(seed)
        fields = {**parse_overrides(TINY_MODEL), "vocab_size": 300, "max_position_embeddings": 32, **overrides}
        fields |= {"bos_token_id": None, "eos_token_id": None}
        self.model = ScratchGPTForCausalLM(ScratchGPTConfig.from_preset("modern-5m", **fields))
        self.optimizers = make_optimizers(self.model, optimizer)
        self.state = TrainingState()

    def step(self):
        generator = torch.Generator().manual_seed(self.state.step)
        for parameter in self.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        self.optimizers.step()
        self.state.step += 1
        return self

    def parts(self):
        return self.model, self.optimizers, self.state

    def tensors(self):
        """Every tensor that the next step depends on, copied."""
        found = {f"model.{name}": tensor.clone() for name, tensor in self.model.state_dict().items()}
        for number, part in enumerate(self.optimizers.state_dict()):
            for parameter, values in part["state"].items():
                found |= {f"{number}.{parameter}.{name}": value.clone() for name, value in values.items()}
        return found


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_loaded_run_goes_on_exactly_as_the_one_that_was_saved(tmp_path, optimizer):
    saved = Training(optimizer=optimizer).step().step()
    saved.optimizers.set_factor(0.1)
    checkpoint = save_checkpoint(tmp_path, *saved.parts())
    assert find_damage(checkpoint) is None
    loaded = Training(seed=1, optimizer=optimizer)
    loaded.state = load_checkpoint(checkpoint, loaded.model, loaded.optimizers)
    assert loaded.state == saved.state
    assert loaded.optimizers.state_dict()[0]["param_groups"] == saved.optimizers.state_dict()[0]["param_groups"]
    assert_same(saved.tensors(), loaded.tensors())
    assert_same(saved.step().tensors(), loaded.step().tensors())


def test_what_changes_after_a_save_has_begun_is_not_in_it(tmp_path, monkeypatch):
    training, may_write = Training().step(), threading.Event()
    monkeypatch.setattr(
        checkpointing,
        "write_hashed",
        lambda *arguments, original=checkpointing.write_hashed: may_write.wait(60) and original(*arguments),
    )
    before, writer = training.tensors(), CheckpointWriter(tmp_path)
    target = writer.save(*training.parts())
    training.step().step()
    assert not target.exists()
    may_write.set()
    writer.wait()
    loaded = Training(seed=1)
    assert load_checkpoint(target, loaded.model, loaded.optimizers).step == 1
    assert_same(before, loaded.tensors())


def test_a_second_save_waits_for_the_first_and_uses_its_memory_again(tmp_path):
    training, writer = Training().step(), CheckpointWriter(tmp_path, kept=1)
    first = writer.save(*training.parts())
    memory = writer._model._memory.data_ptr()
    second = writer.save(*training.step().parts())
    assert find_damage(first) is None or second.exists()  # whole, or already rotated away
    writer.wait()
    assert writer._model._memory.data_ptr() == memory
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    assert find_damage(second) is None


def test_a_snapshot_is_a_safetensors_file_of_any_shapes_and_types(tmp_path):
    tensors = {
        "odd": torch.arange(5, dtype=torch.uint8),
        "half": torch.randn(3, 1).bfloat16(),
        "wide": torch.randn(2, 3, dtype=torch.float64),
        "transposed": torch.randn(4, 3).T,
        "scalar": torch.tensor(7.0),
        "nothing": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
    }
    snapshot = Snapshot()
    snapshot.take(tensors)
    (tmp_path / "file").write_bytes(b"".join(bytes(block) for block in snapshot.blocks()))
    assert_same(tensors, load_file(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"'wave' is of type torch\.complex64"):
        snapshot.take({"wave": torch.zeros(1, dtype=torch.complex64)})


def test_a_tied_weight_is_written_once(tmp_path):
    training = Training(tie_word_embeddings=True).step()
    checkpoint = save_checkpoint(tmp_path, *training.parts())
    names = set(load_file(checkpoint / "model.safetensors"))
    assert {"model.embed_tokens.weight", "lm_head.weight"} - names == {"lm_head.weight"}
    loaded = Training(seed=1, tie_word_embeddings=True)
    load_checkpoint(checkpoint, loaded.model, loaded.optimizers)
    assert_same(training.tensors(), loaded.tensors())
    untied = Training(tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"'lm_head\.weight' is a weight that the model has and it has not"):
        load_checkpoint(checkpoint, untied.model, untied.optimizers)


def damage(path, fault, draw):
    content = bytearray(path.read_bytes())
    if fault == "missing":
        path.unlink()
        return
    if fault == "flipped bit":
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    elif fault == "truncated":
        del content[draw.randrange(1, len(content)) :]
    elif fault == "wrong size":
        content += draw.randbytes(draw.randrange(1, 100))
    path.write_bytes(b"" if fault == "empty" else content)


def test_a_hundred_damaged_checkpoints_are_named_and_the_last_good_one_is_used(tmp_path, caplog):
    training, good = Training(), tmp_path / "checkpoints"
    for _ in range(2):
        save_checkpoint(good, *training.step().parts())
    files = sorted(path.name for path in (good / "checkpoint-2").iterdir())
    assert len(files) == 5
    shutil.copytree(good / "checkpoint-2", tmp_path / "whole")
    for seed in range(100):
        draw = random.Random(seed)
        name, fault = files[seed % len(files)], FAULTS[seed // len(files) % len(FAULTS)]
        damage(good / "checkpoint-2" / name, fault, draw)
        caplog.clear()
        assert newest_checkpoint(good).name == "checkpoint-1", (name, fault, seed)
        # A manifest with a wrong size or checksum cannot be told from a file that has changed.
        assert name in caplog.text or (name, fault) == ("manifest.json", "flipped bit"), (name, fault, seed)
        assert str(good / "checkpoint-2/") in caplog.text
        shutil.copytree(tmp_path / "whole", good / "checkpoint-2", dirs_exist_ok=True)
    assert newest_checkpoint(good).name == "checkpoint-2"


def test_training_does_not_begin_on_a_damaged_or_missing_file(make_arguments, prepared_folder, tmp_path):
    names = sorted(path.relative_to(prepared_folder).as_posix() for path in prepared_folder.rglob("*.*"))
    names = [name for name in names if not name.startswith("heldout/")]  # the text is measured on, not its tokens
    assert len(names) > 6
    assert {"manifest.json", "heldout.jsonl", "tokenizer.json", "train/shard-00001.starts.npy"} <= set(names)
    for seed in range(len(FAULTS) * len(names)):
        draw = random.Random(seed)
        name, fault = names[seed % len(names)], FAULTS[seed // len(names)]
        if (name, fault) == ("manifest.json", "missing"):
            continue  # below
        dataset = shutil.copytree(prepared_folder, tmp_path / "data", dirs_exist_ok=True)
        damage(dataset / name, fault, draw)
        with pytest.raises((ValueError, FileNotFoundError), match=f"{name}.*run the stage 'prepare' again"):
            run(make_arguments(dataset_dir=str(dataset)))
        assert not list((tmp_path / "pretrain").glob("checkpoints/*"))
    dataset = shutil.copytree(prepared_folder, tmp_path / "data", dirs_exist_ok=True)
    (dataset / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no manifest\.json; expected a folder that"):
        run(make_arguments(dataset_dir=str(dataset)))


class Around(CheckpointWriter):
    """Calls `before(number)` and `after(number)` around each save that the thread makes."""

    def _write(self, *arguments):
        self.number = getattr(self, "number", 0) + 1
        self.before(self.number)
        super()._write(*arguments)
        self.after(self.number)


def around_saves(monkeypatch, before, after):
    kind = type("Hooked", (Around,), {"before": staticmethod(before), "after": staticmethod(after)})
    monkeypatch.setattr("hf_scratch_gpt.pretraining.loop.CheckpointWriter", kind)


@pytest.fixture
def small_files():
    """Lets no file of this process grow beyond some bytes, on call; the kernel then refuses the write (EFBIG)."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)  # Python ignores the signal that comes with it
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_write_that_fails_stops_the_run_with_one_line_and_the_last_good_checkpoint(
    make_arguments, tmp_path, monkeypatch, capsys, small_files
):
    changes = {"max_steps": 12, "checkpoint_steps": 3, "checkpoint_seconds": 0.0}
    whole = run(make_arguments(output_dir=str(tmp_path / "whole"), **changes))
    recipe = write_recipe(tmp_path / "recipe.yaml", make_arguments(**changes), **changes)
    with monkeypatch.context() as patch:
        around_saves(
            patch,
            before=lambda number: small_files(100_000) if number == 2 else None,
            after=lambda number: small_files(resource.RLIM_INFINITY),
        )
        assert cli.main(["pretrain", recipe]) == 2
    folder = tmp_path / "pretrain"
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert "checkpoint-6: this checkpoint could not be written at model.safetensors (File too large)" in line
    assert "the last good one is checkpoint-3" in line
    assert os.listdir(folder / "checkpoints") == ["checkpoint-3"]
    assert find_damage(folder / "checkpoints/checkpoint-3") is None
    assert json.loads((folder / ".state.json").read_text())["stop_reason"] == "a checkpoint could not be written"
    assert cli.main(["pretrain", recipe]) == 0
    assert_equal_weights(whole, folder)
    assert [stop["stop_step"] for stop in read_metrics(folder)["stops"]] in ([6], [7], [8], [9])


def test_a_run_may_go_on_without_the_checkpoint_that_could_not_be_written(
    make_arguments, tmp_path, monkeypatch, caplog, small_files
):
    around_saves(
        monkeypatch,
        before=lambda number: small_files(100_000) if number in (2, 3) else None,
        after=lambda number: small_files(resource.RLIM_INFINITY),
    )
    changes = {"max_steps": 12, "checkpoint_steps": 3, "checkpoint_seconds": 0.0}
    folder = run(make_arguments(on_checkpoint_failure="continue", **changes))
    told = [row["checkpoint_failed"] for row in read_curve(folder) if "checkpoint_failed" in row]
    told += [record.getMessage() for record in caplog.records if "could not be written" in record.getMessage()]
    assert any("checkpoint-6" in line and "the last good one is checkpoint-3" in line for line in told)
    assert read_metrics(folder)["metrics"]["steps"] == 12


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 4 MB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", folder], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_failure_that_comes_while_the_next_save_is_due_is_not_lost_in_its_success(
    make_arguments, tmp_path, monkeypatch, capsys, small_files
):
    """The write of checkpoint-6 fails only once training, at step 9, waits for it."""
    changes = {"max_steps": 12, "checkpoint_steps": 3, "checkpoint_seconds": 0.0}
    recipe = write_recipe(tmp_path / "recipe.yaml", make_arguments(**changes), **changes)
    waited = threading.Event()

    def fail_late(number):
        if number == 2:
            waited.wait(60)
            small_files(100_000)

    def wait(self):
        if getattr(self, "number", 0) == 2:
            waited.set()
        CheckpointWriter.wait(self)

    with monkeypatch.context() as patch:
        around_saves(patch, before=fail_late, after=lambda number: small_files(resource.RLIM_INFINITY))
        patch.setattr(Around, "wait", wait, raising=False)
        assert cli.main(["pretrain", recipe]) == 2
    assert "the last good one is checkpoint-3" in capsys.readouterr().err


@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_full_disk_keeps_the_last_good_checkpoint(
    make_arguments, tmp_path, small_disk, monkeypatch, capsys, caplog, policy
):
    changes = {"max_steps": 12, "checkpoint_steps": 3, "checkpoint_seconds": 0.0, "logging_steps": 1}
    changes |= {"output_dir": str(small_disk / "run"), "on_checkpoint_failure": policy}
    recipe = write_recipe(tmp_path / "recipe.yaml", make_arguments(**changes), **changes)
    ballast, seen = small_disk / "ballast", []

    def fill(number):
        if number != 2:
            return
        with open(ballast, "wb", buffering=0) as file:  # to the last byte: the curve does not fit either
            try:
                while True:
                    file.write(bytes(4096))
            except OSError as error:
                seen.append(error.strerror)

    def free(number):
        if number == 2:
            seen.append(sorted(os.listdir(small_disk / "run/checkpoints")))
            seen.append(newest_checkpoint(small_disk / "run/checkpoints").name)
            ballast.unlink()

    with monkeypatch.context() as patch:
        around_saves(patch, before=fill, after=free)
        status = cli.main(["pretrain", recipe])
    assert seen == ["No space left on device", ["checkpoint-3"], "checkpoint-3"]
    told = capsys.readouterr().err + caplog.text
    assert "(the disk is full); the last good one is checkpoint-3" in told
    assert status == (2 if policy == "stop" else 0)
    assert cli.main(["pretrain", recipe]) == 0
    assert read_metrics(small_disk / "run")["metrics"]["steps"] == 12
