"""What the machine is, and how a process sets itself up for it."""

import contextlib
import ctypes
import functools
import gc
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any


def peak_rss_bytes() -> int:
    """Highest resident memory of this process so far, in bytes; 0 where the platform does not tell."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_memory_bytes(device: Any) -> int:
    """Most memory so far: of the CUDA allocator for a CUDA `torch.device`, else this process's resident memory."""
    if device.type == "cuda":
        import torch

        return torch.cuda.max_memory_allocated(device)
    return peak_rss_bytes()


@functools.lru_cache
def peak_product_flops(device_type: str, dtype: Any, seconds: float = 0.2) -> float:
    """FLOPs a second of a large square product of matrices on this device: the best of what fits into `seconds`.

    Measured once a process. It is what a utilisation should be held against: a data sheet's figure is of clocks and
    libraries that this machine may not have. Draws from no random generator.

    Args:
        device_type (`str`): `"cpu"` or `"cuda"`; the current device.
        dtype (`torch.dtype`): Of the matrices.
        seconds (`float`, *optional*, defaults to `0.2`): How long to repeat it; three times at least.
    """
    import torch

    size = 8192 if device_type == "cuda" else 1024
    wait = torch.cuda.synchronize if device_type == "cuda" else lambda: None
    matrix = torch.linspace(-1, 1, size * size, device=device_type).view(size, size).to(dtype)
    _ = matrix @ matrix  # the first product loads the library
    wait()
    times: list[float] = []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        _ = matrix @ matrix
        wait()
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def bf16_unit(device: str | None = None) -> str | None:
    """What computes bf16 products faster than fp32 here: `"CUDA"`, `"AMX"` or `"AVX-512"`, or `None`.

    Elsewhere a CPU emulates bf16 and is many times slower than in fp32.

    Args:
        device (`str`, *optional*): Type of the device; by default the GPU if there is one, else the CPU.
    """
    import torch

    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return "CUDA" if torch.cuda.is_bf16_supported(including_emulation=False) else None
    if device not in (None, "cpu"):
        return None
    capabilities = torch.cpu.get_capabilities()
    if capabilities.get("amx_bf16"):
        return "AMX"
    return "AVX-512" if capabilities.get("avx512_bf16") else None


def has_fast_bf16(device: str | None = None) -> bool:
    """Whether `bf16_unit` finds one."""
    return bf16_unit(device) is not None


def keep_freed_memory() -> bool:
    """Tell glibc to keep large freed buffers instead of returning them to the kernel; returns whether it took.

    By default each large tensor is mapped and page-faulted in anew, which costs a third of the time of a small
    model's eager training step on a CPU. M_MMAP_MAX and M_TRIM_THRESHOLD are glibc's numbers for `mallopt(3)`.
    """
    if not sys.platform.startswith("linux"):
        return False
    m_trim_threshold, m_mmap_max = -1, -4
    try:
        libc = ctypes.CDLL("libc.so.6")
        return bool(libc.mallopt(m_mmap_max, 0) and libc.mallopt(m_trim_threshold, 2**31 - 1))
    except (OSError, AttributeError):  # another C library
        return False


def release_freed_memory() -> None:
    """Give memory that is no longer used back to the kernel, which glibc does not after `keep_freed_memory`.

    Batches of many shapes leave holes that no later tensor fits: eight stages in one process came to 7 GiB, of which
    the largest stage alone needed less than 5.
    """
    gc.collect()
    if sys.platform.startswith("linux"):
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL("libc.so.6").malloc_trim(0)


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
        return names[0] if names else platform.processor()
    except OSError:
        return platform.processor() or platform.machine()


def rank_and_world_size() -> tuple[int, int]:
    """This process's rank and the number of processes: from torch.distributed if it is up, else from the launcher."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def node_count(world_size: int) -> int:
    """Machines of a launch of `world_size` processes, from the launcher's `LOCAL_WORLD_SIZE`."""
    return max(1, world_size // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", str(world_size)))))


def usable_cores() -> int:
    """Cores that this process may use: those it may run on, but no more than a container's quota, rounded up."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cpu_quota()
    return cores if quota is None else min(cores, max(1, math.ceil(quota)))


def cpu_quota(membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPU time that this process's control groups allow, in cores (1.5: three seconds every two), or `None`.

    The smallest limit on the way from its group to the root counts, of both versions of control groups
    (https://docs.kernel.org/admin-guide/cgroup-v2.html, `cpu.max`; https://docs.kernel.org/scheduler/sched-bwc.html).
    `docker run --cpus 2` and Kubernetes' limits set it, and leave all of the machine's cores visible.

    Args:
        membership (`Path`): The process's groups.
        root (`Path`): Where the groups are mounted.
    """
    try:
        lines = membership.read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError):
        return None
    quotas = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root if not controllers else root / "cpu"
        place = mount / group.lstrip("/")
        # In a container the group may be named as the host sees it, and the root be what is mounted.
        while place.is_relative_to(mount):
            quotas.append(_quota_of(place))
            place = place.parent
    return min((quota for quota in quotas if quota is not None), default=None)


def _quota_of(group: Path) -> float | None:
    try:
        if (group / "cpu.max").is_file():
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
        else:
            quota = (group / "cpu.cfs_quota_us").read_text(encoding="ascii").strip()
            period = (group / "cpu.cfs_period_us").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return None
    return None if quota in ("max", "-1") else int(quota) / int(period)


def describe_environment() -> dict[str, Any]:
    """Versions and hardware, for `metrics.json` and the report. Holds no user or host name."""
    from importlib import metadata

    from hf_scratch_gpt import __version__

    packages = ("torch", "transformers", "tokenizers", "datasets", "accelerate", "peft", "trl")
    environment: dict[str, Any] = {
        "hf_scratch_gpt": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_name(),
        "cores": usable_cores(),
    }
    environment.update({name: metadata.version(name) for name in packages})
    if "torch" in sys.modules:
        environment["fast_bf16"] = has_fast_bf16()
        torch = sys.modules["torch"]
        if torch.cuda.is_available():
            environment["gpus"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return environment
