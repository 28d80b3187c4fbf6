"""What a process chooses for its machine follows from what the machine allows, and each choice can be forced."""

import json
import subprocess
import sys

import pytest
import torch

from hf_scratch_gpt.runs import hardware, process
from hf_scratch_gpt.runs.hardware import cpu_quota, usable_cores


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    threads, products = torch.get_num_threads(), torch.get_float32_matmul_precision()
    for name in ("OMP_NUM_THREADS", process.KEEP_FREED_MEMORY, process.MATMUL_PRECISION, *process._GLIBC_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(products)


def write_group(folder, **files):
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def test_a_containers_quota_is_the_smallest_limit_on_the_way_to_the_root(tmp_path):
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("0::/kubepods/pod1/container\n")
    assert cpu_quota(membership, root) is None
    write_group(root / "kubepods/pod1/container", cpu__max="max 100000")
    assert cpu_quota(membership, root) is None
    write_group(root / "kubepods/pod1", cpu__max="150000 100000")
    write_group(root / "kubepods", cpu__max="400000 100000")
    assert cpu_quota(membership, root) == 1.5
    # In a container the path may be the host's, while the root is the container's own group.
    membership.write_text("0::/docker/unseen\n")
    write_group(root, cpu__max="250000 100000")
    assert cpu_quota(membership, root) == 2.5


def test_version_1_groups_have_a_quota_too(tmp_path):
    membership, root = tmp_path / "cgroup", tmp_path / "fs"
    membership.write_text("5:memory:/docker/a\n4:cpu,cpuacct:/docker/a\n")
    write_group(root / "cpu/docker/a", cpu__cfs_quota_us="300000", cpu__cfs_period_us="200000")
    assert cpu_quota(membership, root) == 1.5
    write_group(root / "cpu/docker/a", cpu__cfs_quota_us="-1", cpu__cfs_period_us="200000")
    assert cpu_quota(membership, root) is None
    assert cpu_quota(tmp_path / "missing", root) is None


@pytest.mark.parametrize(("quota", "expected"), [(None, 8), (1.5, 2), (0.3, 1), (64.0, 8)])
def test_usable_cores_are_the_quotas_where_it_is_smaller(monkeypatch, quota, expected):
    monkeypatch.setattr(hardware.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.setattr(hardware, "cpu_quota", lambda: quota)
    assert usable_cores() == expected


def test_threads_are_shared_by_the_processes_of_a_machine_and_the_user_wins(monkeypatch):
    monkeypatch.setattr(process, "usable_cores", lambda: 6)
    assert process.choose_threads(8, {}) == (6, "6 cores")
    assert process.choose_threads(4, {}) == (4, "6 cores")  # physical cores
    assert process.choose_threads(8, {"LOCAL_WORLD_SIZE": "4"}) == (1, "6 cores for 4 processes")
    assert process.choose_threads(8, {"OMP_NUM_THREADS": "16", "LOCAL_WORLD_SIZE": "4"}) == (16, "OMP_NUM_THREADS")
    assert process.choose_threads(8, {"OMP_NUM_THREADS": "3,2"})[0] == 3
    for wrong in ("0", "many", "-1"):
        with pytest.raises(ValueError, match=rf"OMP_NUM_THREADS is '{wrong}', expected a number"):
            process.choose_threads(8, {"OMP_NUM_THREADS": wrong})


def test_bf16_is_chosen_only_where_the_cpu_has_it(monkeypatch, caplog):
    capabilities = {"avx512_bf16": True}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert process.choose_precision("auto", "cpu") == ("bf16", "AVX-512")
    assert process.choose_precision("fp32", "cpu") == ("fp32", "as set")
    capabilities["amx_bf16"] = True
    assert process.choose_precision("auto", "cpu") == ("bf16", "AMX")
    capabilities.clear()
    assert process.choose_precision("auto", "cpu") == ("fp32", "no fast bf16 here")
    assert not caplog.records
    assert process.choose_precision("bf16", "cpu") == ("bf16", "as set")
    assert "only emulates" in caplog.text
    assert process.choose_precision("fp16", "cpu") == ("fp16", "as set")
    assert "fp16, which is for GPUs" in caplog.text


def test_tf32_is_for_gpus_under_autocast_and_can_be_forced(monkeypatch):
    assert process.choose_matmul_precision("bf16", "cpu") == "highest"
    assert process.choose_matmul_precision("bf16", "cuda") == "high"
    assert process.choose_matmul_precision("fp32", "cuda") == "highest"
    assert process.choose_matmul_precision("fp32", "cuda", "high") == "high"
    monkeypatch.setenv(process.MATMUL_PRECISION, "medium")
    assert process.choose_matmul_precision("fp32", "cpu", "high") == "medium"
    monkeypatch.setenv(process.MATMUL_PRECISION, "tf32")
    with pytest.raises(ValueError, match=r"MATMUL_PRECISION is 'tf32', expected one of highest, high, medium"):
        process.choose_matmul_precision("fp32", "cpu")


def test_what_is_measured_is_computed_in_full(monkeypatch):
    monkeypatch.setenv(process.MATMUL_PRECISION, "high")
    process.set_up_process("fp32", "cpu")
    found = []

    def measure_and_fail():
        with process.exact_products():
            found.append(torch.get_float32_matmul_precision())
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"):
        measure_and_fail()
    assert found == ["highest"]
    assert torch.get_float32_matmul_precision() == "high"


def test_the_users_own_allocator_settings_are_left_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(process, "keep_freed_memory", lambda: asked.append(True) or True)
    assert process.set_up_process("fp32", "cpu").freed_memory == "kept"
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert process.set_up_process("fp32", "cpu").freed_memory == "as MALLOC_TRIM_THRESHOLD_ says"
    monkeypatch.setenv(process.KEEP_FREED_MEMORY, "0")
    assert process.set_up_process("fp32", "cpu").freed_memory == "returned"
    assert len(asked) == 1
    monkeypatch.setenv(process.KEEP_FREED_MEMORY, "1")
    assert process.set_up_process("fp32", "cpu").freed_memory == "kept"
    monkeypatch.setenv(process.KEEP_FREED_MEMORY, "yes")
    with pytest.raises(ValueError, match="KEEP_FREED_MEMORY is 'yes', expected 0 or 1"):
        process.set_up_process("fp32", "cpu")


def test_a_real_process_has_the_threads_that_it_says(tmp_path):
    script = (
        "import os, torch, json\n"
        "from hf_scratch_gpt.runs.process import set_up_process\n"
        "first = set_up_process('fp32', 'cpu')\n"
        "was = torch.get_num_threads()\n"
        "os.environ['OMP_NUM_THREADS'] = '3'  # as a recipe's `env` does, when torch is loaded already\n"
        "second = set_up_process('fp32', 'cpu', compiled=False)\n"
        "print(json.dumps([first.record(), was, second.record(), torch.get_num_threads(), str(second)]))\n"
    )
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    first, was, second, now, line = json.loads(answer)
    assert first["threads"] == was <= usable_cores()
    assert second["threads"] == now == 3
    assert line.startswith("set up: 3 threads (OMP_NUM_THREADS), freed memory ")
    assert line.endswith("fp32 (as set), not compiled, matmul precision highest")
