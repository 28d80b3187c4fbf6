"""What a run tells of its speed while it trains: rates, utilisation, waiting, memory; all from counters it has."""

import dataclasses
from typing import Any

from hf_scratch_gpt.pretraining.compute import training_flops
from hf_scratch_gpt.runs.hardware import peak_memory_bytes, peak_product_flops


@dataclasses.dataclass(frozen=True)
class Counters:
    """What has gone by so far in this process.

    Args:
        steps (`int`): Optimizer steps, those that were undone included.
        seconds (`float`): Spent in them.
        data_seconds (`float`): Of these, waiting for batches.
        padding (`int`): Tokens of the windows, over all processes, that were padding.
    """

    steps: int = 0
    seconds: float = 0.0
    data_seconds: float = 0.0
    padding: int = 0


@dataclasses.dataclass(frozen=True)
class Telemetry:
    """Turns counters into rates.

    Args:
        tokens_per_step (`int`): Over all processes, padding included.
        flops_per_token (`int`): Of training, as `training_flops` counts them.
        peak_flops (`float`): FLOPs a second that each process's device reaches in a large product of matrices, in the
            precision of the run; measured.
        processes (`int`): Number of them.
        device: Of this process.
    """

    tokens_per_step: int
    flops_per_token: int
    peak_flops: float
    processes: int
    device: Any

    def rates(self, before: Counters, now: Counters) -> dict[str, float]:
        """Between two moments: tokens and FLOPs a second over all processes, MFU and data-wait share (0 to 1).

        Padding counts in none of them: time that goes into it is lost.
        `memory_bytes` is the peak so far: of the GPU's allocator, or on a CPU of the process's resident memory. MFU is
        model FLOPs utilisation (PaLM, https://arxiv.org/abs/2204.02311, appendix B), of the measured peak.
        """
        steps, seconds = now.steps - before.steps, max(now.seconds - before.seconds, 1e-9)
        tokens_per_second = (steps * self.tokens_per_step - (now.padding - before.padding)) / seconds
        return {
            "tokens_per_second": tokens_per_second,
            **self.utilisation(tokens_per_second),
            "data_share": (now.data_seconds - before.data_seconds) / seconds,
            "memory_bytes": peak_memory_bytes(self.device),
        }

    def utilisation(self, tokens_per_second: float) -> dict[str, float]:
        """FLOPs a second and MFU at that many tokens a second."""
        flops_per_second = tokens_per_second * self.flops_per_token
        return {"flops_per_second": flops_per_second, "mfu": flops_per_second / (self.peak_flops * self.processes)}

    def summary(self, tokens_per_second: float) -> dict[str, float]:
        """The figures for `metrics.json`."""
        return {
            **self.utilisation(tokens_per_second),
            "flops_per_token": self.flops_per_token,
            "peak_flops_per_second": self.peak_flops,
            "peak_memory_bytes": peak_memory_bytes(self.device),
        }


def make_telemetry(
    model: Any, tokens_per_step: int, context_length: int, precision: str, processes: int, device: Any
) -> Telemetry:
    """Count the model's FLOPs and measure the device, which takes some tenths of a second.

    Args:
        model: The bare model, before anything shards it.
        tokens_per_step (`int`): Over all processes.
        context_length (`int`): Tokens of a window.
        precision (`str`): Of its products: `"fp32"`, `"bf16"` or `"fp16"`.
        processes (`int`): Number of them.
        device: Of this process.
    """
    import torch

    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    flops = training_flops(model.config, linear, context_length)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    peak = peak_product_flops(device.type, dtype)
    return Telemetry(tokens_per_step, flops, peak, processes, device)
