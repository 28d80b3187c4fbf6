"""How a process sets itself up for its machine: one place that chooses, one line that says what was chosen.

- Threads of a product: the cores that the process may use (affinity, a container's CPU quota), shared by a machine's
  processes. Forced by `OMP_NUM_THREADS`.
- Freed memory: kept where the C library is glibc. Forced by `SCRATCH_GPT_KEEP_FREED_MEMORY` (0 or 1) or by glibc's own
  variables (`MALLOC_MMAP_MAX_` and the like).
- Precision: bf16 where the hardware is faster in it. Forced by `precision` of `pretrain`, `bf16` or `fp16` of the
  other stages.
- Products in fp32: in full; TF32 on a GPU under bf16 or fp16, where what is left in fp32 need not be finer. Forced by
  `SCRATCH_GPT_MATMUL_PRECISION` (highest, high, medium), or by `tf32` of the stages on TRL's trainers.
- Compilation: where it pays back within the run. Forced by `compile` of `pretrain`; the other stages compile only with
  `torch_compile`.

A recipe's `env` may set the variables. What is measured or checked is computed in full fp32 whatever is chosen here
(`exact_products`).
"""

import contextlib
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any

from hf_scratch_gpt.runs.hardware import bf16_unit, keep_freed_memory, usable_cores

logger = logging.getLogger(__name__)

KEEP_FREED_MEMORY, MATMUL_PRECISION = "SCRATCH_GPT_KEEP_FREED_MEMORY", "SCRATCH_GPT_MATMUL_PRECISION"
MATMUL_PRECISIONS = ("highest", "high", "medium")
PRECISIONS = ("fp32", "bf16", "fp16")
_GLIBC_VARIABLES = ("MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


@dataclasses.dataclass(frozen=True)
class ProcessSetup:
    """What was chosen for this process, and why; goes into `metrics.json` as `setup`.

    Args:
        device (`str`): `"cpu"`, `"cuda"`, ...
        threads (`int`): Threads of one product on the CPU.
        threads_by (`str`): What decided it.
        freed_memory (`str`): `"kept"` where glibc was told to keep large freed buffers, `"returned"` to the kernel, or
            the environment's variable that decides.
        precision (`str`): `"fp32"`, or `"bf16"` or `"fp16"` for autocast.
        precision_by (`str`): What decided it: the unit of the hardware, or `"as set"` by the recipe.
        matmul_precision (`str`): Of products in fp32, as in `torch.set_float32_matmul_precision`.
        compiled (`bool`, *optional*): Whether training is compiled; `None` where nothing is trained.
    """

    device: str
    threads: int
    threads_by: str
    freed_memory: str
    precision: str
    precision_by: str
    matmul_precision: str
    compiled: bool | None = None

    def record(self) -> dict[str, Any]:
        """As plain JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        plural = "" if self.threads == 1 else "s"
        parts = [
            f"{self.threads} thread{plural} ({self.threads_by})",
            f"freed memory {self.freed_memory}",
            f"{self.precision} ({self.precision_by})",
        ]
        if self.compiled is not None:
            parts.append("compiled" if self.compiled else "not compiled")
        return f"set up: {', '.join(parts)}, matmul precision {self.matmul_precision}"


def set_up_process(
    precision: str, device: str, matmul_precision: str | None = None, compiled: bool | None = None
) -> ProcessSetup:
    """Choose threads, allocator and precisions for this process, and apply all but the precision of autocast.

    Args:
        precision (`str`): What the recipe asks for: `"auto"`, `"fp32"`, `"bf16"` or `"fp16"`.
        device (`str`): Type of the device that the stage computes on.
        matmul_precision (`str`, *optional*): What the recipe asks for; the environment wins over it.
        compiled (`bool`, *optional*): For the record.

    Raises:
        ValueError: naming an environment variable that holds no such value.
    """
    import torch

    threads, threads_by = choose_threads(torch.get_num_threads())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)
    chosen, precision_by = choose_precision(precision, device)
    matmul_precision = choose_matmul_precision(chosen, device, matmul_precision)
    torch.set_float32_matmul_precision(matmul_precision)
    memory = _set_up_allocator(os.environ)
    return ProcessSetup(device, threads, threads_by, memory, chosen, precision_by, matmul_precision, compiled)


def reset_libraries() -> None:
    """Between two stages of one process: Accelerate keeps one global state, and the next may want another precision.

    transformers' settings hold on to that state, so those of the next stage are made after this.
    """
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def set_up_stage(
    run: Any,
    precision: str,
    device: str | None = None,
    matmul_precision: str | None = None,
    compiled: bool | None = None,
) -> ProcessSetup:
    """`set_up_process` for a stage: noted in its metrics, and told in one line.

    Args:
        run (`StageRun`): The stage's.
        device (`str`, *optional*): Type of the device; by default the accelerator if there is one, else the CPU.
        precision, matmul_precision, compiled: See `set_up_process`.
    """
    if device is None:
        import torch

        found = torch.accelerator.current_accelerator(check_available=True)
        device = "cpu" if found is None else found.type
    setup = set_up_process(precision, device, matmul_precision, compiled)
    tell_setup(run, setup)
    return setup


def tell_setup(run: Any, setup: ProcessSetup) -> None:
    """Note `setup` for the metrics of `run` (a `StageRun`), and print it in the main process."""
    run.setup = setup.record()
    if run.is_main:
        print(f"{run.stage}: {setup}", flush=True)


def choose_threads(available: int, environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Threads of a product, and what decided: `OMP_NUM_THREADS`, or the cores shared by this machine's processes.

    Args:
        available (`int`): Threads that torch would use: one a physical core. More than that is never chosen.
        environment: `None` for this process's own.

    Raises:
        ValueError: if `OMP_NUM_THREADS` is no positive number.
    """
    environment = os.environ if environment is None else environment
    forced = environment.get("OMP_NUM_THREADS", "").strip()
    if forced:
        first = forced.split(",")[0]  # OpenMP takes a list, of which the first is the outermost level's
        if not first.isdecimal() or int(first) < 1:
            raise ValueError(f"the environment's OMP_NUM_THREADS is '{forced}', expected a number of threads")
        return int(first), "OMP_NUM_THREADS"
    cores, processes = usable_cores(), max(1, int(environment.get("LOCAL_WORLD_SIZE", "1")))
    threads = max(1, min(available, cores // processes))
    if processes > 1:
        return threads, f"{cores} cores for {processes} processes"
    return threads, f"{cores} core{'' if cores == 1 else 's'}"


def choose_precision(asked: str, device: str) -> tuple[str, str]:
    """The precision of autocast and what decided; warns of one that was asked for and will be slow.

    Args:
        asked (`str`): `"auto"`, `"fp32"`, `"bf16"` or `"fp16"`.
        device (`str`): Type of the device.
    """
    unit = bf16_unit(device)
    if asked == "auto":
        return ("bf16", unit) if unit else ("fp32", "no fast bf16 here")
    if asked == "bf16" and not unit:
        logger.warning("precision is bf16, which this machine only emulates: fp32 would be faster")
    if asked == "fp16" and device == "cpu":
        better = "bf16" if unit else "fp32"
        logger.warning("precision is fp16, which is for GPUs without bf16: on this CPU %s would be faster", better)
    return asked, "as set"


def choose_matmul_precision(precision: str, device: str, asked: str | None = None) -> str:
    """Precision of products in fp32: what the environment says, else what was `asked`, else the device's.

    Under autocast on a GPU, what is left in fp32 may as well be TF32 (`"high"`). Otherwise it stays fp32 in full:
    on a CPU it must be reproducible bit for bit, and who asks for fp32 gets it.

    Raises:
        ValueError: if the environment's variable holds none of torch's names.
    """
    forced = os.environ.get(MATMUL_PRECISION)
    if forced:
        if forced not in MATMUL_PRECISIONS:
            raise ValueError(
                f"the environment's {MATMUL_PRECISION} is '{forced}', expected one of {', '.join(MATMUL_PRECISIONS)}"
            )
        return forced
    return asked or ("high" if device == "cuda" and precision != "fp32" else "highest")


def _set_up_allocator(environment: Mapping[str, str]) -> str:
    """Let glibc keep freed memory unless the user decided for this process; says what becomes of it."""
    forced = environment.get(KEEP_FREED_MEMORY, "")
    if forced not in ("", "0", "1"):
        raise ValueError(f"the environment's {KEEP_FREED_MEMORY} is '{forced}', expected 0 or 1")
    by_user = next((name for name in _GLIBC_VARIABLES if environment.get(name)), None)
    if by_user and not forced:
        return f"as {by_user} says"
    return "kept" if forced != "0" and keep_freed_memory() else "returned"


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Compute products of fp32 matrices in full fp32 in the block, whatever training was set up for.

    TF32 keeps 10 bits of a mantissa: enough for a gradient, and a thousand times the tolerance of a merged adapter.
    """
    import torch

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
