"""How fast this machine trains and measures a model, from a few steps: what a plan of minutes rests on."""

import dataclasses
import time
from typing import Any

from hf_scratch_gpt.pretraining.arguments import PretrainArguments

_SECONDS = 0.3
_LEAST_STEPS = 3


@dataclasses.dataclass(frozen=True)
class Speed:
    """Tokens a second, uncompiled.

    Args:
        training (`float`): Forward, backward and optimizer step at the recipe's batch.
        measuring (`float`): Forward in fp32, as held-out text is measured.
    """

    training: float
    measuring: float


def measure_speed(arguments: PretrainArguments, dataset: Any) -> Speed:
    """Time a few steps of the model of `arguments` on tokens drawn at random; takes under a second, or three steps."""
    import torch

    from hf_scratch_gpt.pretraining import setup
    from hf_scratch_gpt.pretraining.optimizers import make_optimizers
    from hf_scratch_gpt.runs.process import choose_precision

    device = setup.make_accelerator(arguments).device
    model = setup.make_model(arguments, dataset).to(device)
    setup.use_fast_attention(model, device.type)
    precision, _ = choose_precision(arguments.precision, device.type)
    loss_module = setup.LanguageModelLoss(model, precision == "bf16", arguments.z_loss, precision == "fp16")
    optimizers = make_optimizers(model, arguments.optimizer)
    rows = arguments.batch_size // arguments.gradient_accumulation_steps
    shape = (rows, arguments.context_length)
    draw = torch.Generator().manual_seed(0)
    input_ids = torch.randint(dataset.manifest["vocab_size"], shape, generator=draw).to(device)
    positions = torch.arange(arguments.context_length, device=device).expand(shape)

    def train() -> None:
        for _ in range(arguments.gradient_accumulation_steps):
            loss_module(input_ids=input_ids, position_ids=positions).backward()
        optimizers.step()
        optimizers.zero_grad()

    def measure() -> None:
        with torch.no_grad():
            model(input_ids=input_ids, use_cache=False)

    tokens = input_ids.numel()
    with setup.cpu_training_of(model, device.type, precision == "bf16", sharded=False):
        training = tokens * arguments.gradient_accumulation_steps / _seconds(train, device)
    return Speed(training, measuring=tokens / _seconds(measure, device))


def _seconds(work: Any, device: Any) -> float:
    """Mean seconds of `work` after a first call, which warms up."""
    import torch

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    work()
    wait()
    begin, count = time.perf_counter(), 0
    while count < _LEAST_STEPS or time.perf_counter() - begin < _SECONDS:
        work()
        wait()
        count += 1
    return (time.perf_counter() - begin) / count
