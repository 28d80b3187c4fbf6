"""What is asked of a row of the pretraining benchmarks, and what all rows report in the same way."""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from pretrain_shapes import Shape
from pretrain_watch import Watch
from torch import nn


@dataclasses.dataclass
class Request:
    """What to measure.

    Args:
        row (`str`): Name of the row, one of `ROWS`.
        shape (`dict`): Fields of `Shape`.
        dataset_dir (`str`): Folder of `scratch-gpt prepare`.
        work (`str`): Folder for what the row writes.
        batch_size (`int`): Windows of an optimizer step.
        accumulation (`int`): Parts that each batch is computed in.
        warmup (`int`): Steps before those that count for the speed.
        steps (`int`): Steps that count; unless
        seconds (`float`): seconds of training to train for, with a curve.
        interval (`float`): Seconds of training between points of the curve.
        curve_bytes, heldout_bytes (`int`): Held-out text that the curve and the final figure are measured on.
        expected_steps (`int`): About how many steps fit into `seconds`, for schedules that count steps.
        learning_rate (`float`): AdamW's, of a baseline.
        lr_warmup (`int`): Steps over which baselines raise the rate.
        seed (`int`): Of weights and batches.
        dropout (`float`): Of GPT2LMHeadModel.
        device (`str`): `"cpu"` or `"cuda"`.
        ours (`dict`): Settings of the stage `pretrain` over those of the benchmark.
    """

    row: str
    shape: dict[str, int]
    dataset_dir: str
    work: str
    batch_size: int
    accumulation: int = 1
    warmup: int = 1
    steps: int = 0
    seconds: float = 0.0
    interval: float = 10.0
    curve_bytes: int = 50_000
    heldout_bytes: int = 0
    expected_steps: int = 0
    learning_rate: float = 0.0
    lr_warmup: int = 20
    seed: int = 0
    dropout: float = 0.0
    device: str = "cpu"
    ours: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def size(self) -> Shape:
        """The shape as an object."""
        return Shape(**self.shape)

    @property
    def total_steps(self) -> int:
        """Steps of a row that counts steps."""
        return self.steps + self.warmup


class HeldOut:
    """The held-out text of a prepared folder, and bits per byte of a model on it.

    Args:
        request (`Request`): Names the folder.
    """

    def __init__(self, request: Request):
        from hf_scratch_gpt.evaluation.questions import pick_texts
        from hf_scratch_gpt.pretraining.setup import load_dataset

        context_length = request.size.context_length
        dataset = load_dataset(request.dataset_dir, context_length)
        self.tokenizer, self.context_length = dataset.tokenizer, context_length
        # The same documents for all rows and seeds.
        self.all = pick_texts(dataset.heldout, request.heldout_bytes, 0)
        self.some = pick_texts(dataset.heldout, request.curve_bytes, 0)

    def measure(self, model: Any, documents: list[str]) -> float:
        """Bits per byte of `documents` under a causal model of transformers (or `AsCausalModel`), in fp32."""
        from hf_scratch_gpt.evaluation.text import bits_per_byte

        return bits_per_byte(model, self.tokenizer, documents, self.context_length).mean


def linear_weights(model: nn.Module) -> int:
    """Weights of all linear layers (GPT-2's are Conv1D), the head included: what `training_flops` multiplies."""
    from transformers.pytorch_utils import Conv1D

    return sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | Conv1D))


def describe(model: nn.Module, shape: Shape) -> dict[str, int]:
    """`parameters` and `flops_per_token`, by the same formula for all rows (hf_scratch_gpt/pretraining/compute.py)."""
    from hf_scratch_gpt.pretraining.compute import training_flops

    flops = training_flops(shape.attention, linear_weights(model), shape.context_length)
    return {"parameters": sum(parameter.numel() for parameter in model.parameters()), "flops_per_token": flops}


def modern_fields(request: Request) -> dict[str, Any]:
    """Fields of a `Qwen3Config` of the request's shape."""
    from hf_scratch_gpt.runs import read_json

    separator = read_json(Path(request.dataset_dir) / "manifest.json")["separator_id"]
    context_length = request.size.context_length
    ends = {"bos_token_id": separator, "eos_token_id": separator, "max_position_embeddings": context_length}
    return {**request.size.modern_fields, **ends, "tie_word_embeddings": True}


def peak_memory(device: str) -> int:
    """Bytes: resident memory of this process on a CPU, of the allocator on a GPU."""
    from hf_scratch_gpt.runs.hardware import peak_memory_bytes

    return peak_memory_bytes(torch.device(device))


def finish(request: Request, watch: Watch, compiled: bool) -> dict[str, Any]:
    """What the watch tells of a row that is done."""
    counted = watch.step_seconds[request.warmup :] or watch.step_seconds
    return {
        "tokens_per_step": request.batch_size * request.size.context_length,
        "steps": len(watch.step_seconds),
        "step_seconds": watch.step_seconds,
        "training_seconds": sum(watch.step_seconds),
        # The first step's, less that of a usual one.
        "compile_seconds": watch.step_seconds[0] - statistics.median(counted) if compiled else 0.0,
    }
