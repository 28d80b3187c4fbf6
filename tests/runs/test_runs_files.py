"""Atomic writes: whatever happens to the writer, a reader sees the old content or the new, never a part."""

import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_scratch_gpt.runs.files import read_json, remove_folder, replace_folder, write_json, write_text

ENDLESS_WRITER = """
import sys
from hf_scratch_gpt.runs.files import write_json
number = 0
while True:
    number += 1
    write_json(sys.argv[1], {"number": number, "filling": [number] * 20_000})
"""
ENDLESS_FOLDER_WRITER = """
import sys
from hf_scratch_gpt.runs.files import replace_folder
number = 0
while True:
    number += 1
    with replace_folder(sys.argv[1]) as folder:
        for name in "abcdef":
            (folder / name).write_text(str(number))
"""
LIMITED_WRITER = """
import resource, signal, sys
from hf_scratch_gpt.runs.files import write_text
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    write_text(sys.argv[1], "new" * 1000)
except OSError as error:
    print(error.strerror)
"""


def start(script, *arguments):
    return subprocess.Popen([sys.executable, "-c", script, *map(str, arguments)], start_new_session=True)


def kill_soon_after(process, exists, generator):
    deadline = time.monotonic() + 120
    while not exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    time.sleep(generator.uniform(0, 0.05))
    process.send_signal(signal.SIGKILL)
    process.wait()


def test_a_json_file_is_valid_after_every_kill_of_its_writer(tmp_path):
    path, generator, numbers = tmp_path / "état.json", random.Random(0), []
    for _ in range(8):
        kill_soon_after(start(ENDLESS_WRITER, path), path.exists, generator)
        value = json.loads(path.read_text(encoding="utf-8"))
        assert value["filling"] == [value["number"]] * 20_000
        numbers.append(value["number"])
        path.unlink()
    assert len(numbers) == 8


def test_a_replaced_folder_is_absent_or_complete_after_every_kill(tmp_path):
    target, generator = tmp_path / "folder", random.Random(1)
    for _ in range(8):
        kill_soon_after(start(ENDLESS_FOLDER_WRITER, target), target.exists, generator)
        if target.exists():
            contents = [(target / name).read_text() for name in "abcdef"]
            assert len(set(contents)) == 1
            assert sorted(os.listdir(target)) == list("abcdef")
    with replace_folder(target) as folder:  # what the kills left behind is in nobody's way
        (folder / "a").write_text("end")
    assert os.listdir(target) == ["a"]
    assert (target / "a").read_text() == "end"


def test_an_exception_in_the_block_keeps_the_old_folder(tmp_path):
    target = tmp_path / "folder"
    with replace_folder(target) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(FileExistsError), replace_folder(target) as folder:  # noqa: PT012
        (folder / "weights").write_text("new")
        folder.mkdir()
    assert (target / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["folder"]


def test_a_file_size_limit_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    path = tmp_path / "text"
    write_text(path, "old")
    done = subprocess.run([sys.executable, "-c", LIMITED_WRITER, path], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "File too large"
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["text"]


@pytest.fixture
def tiny_disk(tmp_path):
    """A real file system of 64 KiB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_old_file(tiny_disk):
    path = tiny_disk / "metrics.json"
    write_json(path, {"loss": 1.0})
    with pytest.raises(OSError, match="No space left"):
        write_json(path, {"filling": ["x" * 100] * 1000})
    assert read_json(path) == {"loss": 1.0}
    assert os.listdir(tiny_disk) == ["metrics.json"]


def test_a_full_disk_keeps_the_old_folder(tiny_disk):
    with replace_folder(tiny_disk / "model") as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(OSError, match="No space left"), replace_folder(tiny_disk / "model") as folder:
        (folder / "weights").write_bytes(bytes(100_000))
    assert (tiny_disk / "model" / "weights").read_text() == "old"


def test_text_that_utf8_cannot_hold_keeps_the_old_file_and_leaves_no_litter(tmp_path):
    path = tmp_path / "text"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \udc00")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["text"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(), children, max_size=3),
    max_leaves=10,
)


@settings(max_examples=50, deadline=None)
@given(value=json_values)
def test_json_round_trips(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "value.json"
    assert read_json(write_json(path, value)) == value


@pytest.mark.parametrize(
    ("value", "named"),
    [({"a": {"b": float("nan")}}, "'a.b' is nan"), ({"curve": [1.0, float("inf")]}, "'curve.1' is inf")],
)
def test_a_number_that_json_lacks_is_refused_by_name(tmp_path, value, named):
    with pytest.raises(ValueError, match=named):
        write_json(tmp_path / "metrics.json", value)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("content", "told"), [(b"{\n'a': 1}", "line 2"), (b'{"a": "\xff"}', "not UTF-8 at byte 7")])
def test_a_damaged_json_file_is_named_with_the_place(tmp_path, content, told):
    path = tmp_path / "metrics.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=told) as caught:
        read_json(path)
    assert str(path) in str(caught.value)


def test_a_removed_folder_is_gone_and_its_siblings_stay(tmp_path):
    (tmp_path / "a" / "deep").mkdir(parents=True)
    (tmp_path / "b").mkdir()
    remove_folder(tmp_path / "a")
    assert os.listdir(tmp_path) == ["b"]
