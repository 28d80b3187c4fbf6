"""A checkpoint counts only when every file is what its manifest says."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.runs.checkpoints import find_damage, newest_checkpoint, step_of, write_manifest

FILES = {"model.safetensors": bytes(range(256)) * 40, "optimizer.pt": b"state" * 100, "deep/rng_state.pth": b"rng"}


def make_checkpoint(folder):
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    write_manifest(folder)
    return folder


def test_a_whole_checkpoint_has_no_damage(tmp_path):
    assert find_damage(make_checkpoint(tmp_path)) is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("fault", ["missing", "empty", "truncated", "extended", "zeroed"])
def test_each_fault_of_each_file_is_found_and_named(tmp_path, name, fault):
    path = make_checkpoint(tmp_path) / name
    content = FILES[name]
    faulty = {"empty": b"", "truncated": content[:-1], "extended": content + b"x", "zeroed": bytes(len(content))}
    path.unlink() if fault == "missing" else path.write_bytes(faulty[fault])
    assert str(path) in find_damage(tmp_path)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_single_flipped_bit_anywhere_is_found(tmp_path_factory, data):
    folder = make_checkpoint(tmp_path_factory.mktemp("flip"))
    name = data.draw(st.sampled_from([*FILES, "manifest.json"]))
    content = bytearray((folder / name).read_bytes())
    position = data.draw(st.integers(0, len(content) - 1))
    content[position] ^= 1 << data.draw(st.integers(0, 7))
    (folder / name).write_bytes(content)
    damage = find_damage(folder)
    if name != "manifest.json":
        assert name in damage
    elif damage is None:  # white space between entries and the case of no letter carry nothing
        assert bytes(content).translate(None, b" \t\r\n") == (
            (write_manifest(folder).read_bytes()).translate(None, b" \t\r\n")
        )


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"null", b'{"a": 1}', b'{"a": {"size": 1}}', b"\xff\xfe"])
def test_a_manifest_of_the_wrong_shape_is_damage_not_a_crash(tmp_path, content):
    (make_checkpoint(tmp_path) / "manifest.json").write_bytes(content)
    assert "manifest.json" in find_damage(tmp_path)


def test_a_save_that_did_not_finish_has_no_manifest(tmp_path):
    (make_checkpoint(tmp_path) / "manifest.json").unlink()
    assert "the save did not finish" in find_damage(tmp_path)


def test_the_newest_whole_checkpoint_is_chosen_by_number_and_damaged_ones_are_told(tmp_path, caplog):
    for step in (5, 20, 100):
        make_checkpoint(tmp_path / f"checkpoint-{step}")
    assert newest_checkpoint(tmp_path).name == "checkpoint-100"
    (tmp_path / "checkpoint-100" / "optimizer.pt").write_bytes(b"")
    (tmp_path / "checkpoint-200").mkdir()
    (tmp_path / "checkpoint-²").mkdir()
    assert newest_checkpoint(tmp_path).name == "checkpoint-20"
    assert "optimizer.pt: 0 bytes, expected 500" in caplog.text
    assert newest_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize(("name", "step"), [("checkpoint-12", 12), ("checkpoint-x", -1), ("12", 12), ("a-²", -1)])
def test_the_step_is_read_from_the_name(tmp_path, name, step):
    assert step_of(tmp_path / name) == step
