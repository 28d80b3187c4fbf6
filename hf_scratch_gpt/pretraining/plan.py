"""Say before any money is spent whether a model's training fits, how, and how long it takes.

    scratch-gpt plan gpt3-6.7b --gpus 64 --hbm 80
    scratch-gpt plan runs/mine/pretrain --gpus 1 --hbm 24 --optimizer muon
    scratch-gpt plan --all            the table of all presets in the README

Takes a preset or the folder of a model. The model is built on the meta device, so a plan for 175 billion parameters
takes a second on a laptop; `tests/benchmarks/plan_memory.py` compares plans with measured memory.
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hf_scratch_gpt.pretraining import compute, memory
from hf_scratch_gpt.pretraining.arguments import parse_overrides
from hf_scratch_gpt.pretraining.memory import ModelSize, Moment, TrainingSetup
from hf_scratch_gpt.runs.command_line import CommandParser
from hf_scratch_gpt.runs.values import nearest

GIB = 2**30
H100_TFLOPS = 989.0  # dense bf16, NVIDIA's data sheet of the H100 SXM
_KEPT_FREE = 0.1  # share of a device's memory for its context, the kernels' workspace and fragmentation
_TOKENS_A_STEP = 2**19  # GPT-2's and small GPT-3's batch, about half a million tokens
_MOST_DEVICES = 2**16
# From what costs least to what costs most: sharding costs communication, checkpointing a third of the computation.
_WAYS = [(sharding, checkpointing) for checkpointing in (False, True) for sharding in memory.SHARDINGS]
_SHARDING_TEXTS = {
    "none": "none: every device holds the whole model (DDP)",
    "gradients": "gradients and optimizer states (ZeRO-2; FSDP without resharding after the forward pass)",
    "full": "weights, gradients and optimizer states (ZeRO-3; FSDP)",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be planned; bytes for memory.

    Args:
        gpus (`int`): Devices.
        memory (`int`): Of each device.
        sequence_length (`int`): Tokens in a sequence.
        batch_size (`int`): Sequences in an optimizer step over all devices; a multiple of `gpus`.
        bf16 (`bool`), optimizer (`str`), packed (`bool`), device (`str`): As in `TrainingSetup`.
        micro_batch (`int`, *optional*), sharding (`str`, *optional*), checkpointing (`bool`, *optional*): Taken as
            given instead of chosen.
    """

    gpus: int
    memory: int
    sequence_length: int
    batch_size: int
    bf16: bool = True
    optimizer: Any = "adamw"
    packed: bool = True
    device: Any = "cuda"
    micro_batch: int | None = None
    sharding: str | None = None
    checkpointing: bool | None = None

    @property
    def usable(self) -> int:
        """Bytes of a device that a plan may fill."""
        return int(self.memory * (1 - _KEPT_FREE))


def _ways(request: Request) -> Iterator[tuple[str, bool]]:
    for sharding, checkpointing in _WAYS:
        # Muon orthogonalises whole matrices, which no single device holds when they are spread.
        possible = sharding == "none" or (request.gpus > 1 and request.optimizer != "muon")
        wanted = request.sharding in (None, sharding) and request.checkpointing in (None, checkpointing)
        if wanted and (possible or request.sharding):
            yield sharding, checkpointing


def choose(config: Any, size: ModelSize, request: Request) -> tuple[TrainingSetup, Moment, bool]:
    """The way to train that costs least of those that fit, with the largest micro-batch that fits.

    Returns:
        The setup, its peak, and whether that fits; if nothing does, the setup that comes nearest.
    """
    share = request.batch_size // request.gpus
    sizes = [request.micro_batch] if request.micro_batch else [n for n in range(share, 0, -1) if share % n == 0]
    nearest_miss: tuple[TrainingSetup, Moment] | None = None
    for sharding, checkpointing in _ways(request):
        for micro_batch in sizes:
            setup = TrainingSetup(
                micro_batch,
                request.sequence_length,
                request.bf16,
                request.optimizer,
                checkpointing,
                accumulates=micro_batch < share,
                packed=request.packed,
                device=request.device,
                gpus=request.gpus,
                sharding=sharding,
                saves=True,
            )
            peak = memory.peak(config, size, setup)
            if peak.total <= request.usable:
                return setup, peak, True
            if nearest_miss is None or peak.total < nearest_miss[1].total:
                nearest_miss = setup, peak
    assert nearest_miss is not None  # there is always a way without sharding
    return *nearest_miss, False


def devices_needed(config: Any, size: ModelSize, request: Request) -> int | None:
    """The smallest power of two of devices on which training fits, a sequence each; `None` if no number does."""
    gpus = 1
    while gpus <= _MOST_DEVICES:
        if choose(config, size, dataclasses.replace(request, gpus=gpus, batch_size=gpus, micro_batch=None))[2]:
            return gpus
        gpus *= 2
    return None


def load_config(model: str, overrides: dict[str, Any] | None = None) -> Any:
    """The config of a preset, with any field overridden, or of a folder that holds a model of ours.

    Raises:
        ValueError: if it is neither; the message names the nearest preset. Or if the model is not one of ours.
    """
    from hf_scratch_gpt.model import ScratchGPTConfig
    from hf_scratch_gpt.model.presets import PRESETS

    if model in PRESETS:
        return ScratchGPTConfig.from_preset(model, **(overrides or {}))
    if not Path(model).is_dir():
        raise ValueError(
            f"no preset or model folder '{model}'{nearest(model, list(PRESETS))}; presets: {', '.join(PRESETS)}"
        )
    from transformers import AutoConfig

    from hf_scratch_gpt.evaluation.models import require_folder
    from hf_scratch_gpt.runs.loading import loading

    if overrides:
        raise ValueError(f"--model-overrides change a preset; {model} is a folder: change its config.json")
    require_folder(model)
    with loading(model, "config"):
        config = AutoConfig.from_pretrained(model)
    if config.model_type != ScratchGPTConfig.model_type:
        raise ValueError(
            f"{model}: its model type is '{config.model_type}'; what training needs is known of "
            f"'{ScratchGPTConfig.model_type}' models only"
        )
    return config


def make_plan(model: str, config: Any, request: Request, mfu: float, peak_tflops: float | None) -> dict[str, Any]:
    """All that `scratch-gpt plan` tells, as JSON has it: bytes, FLOPs, tokens, hours."""
    size = memory.measure_model(config)
    setup, peak, fits = choose(config, size, request)
    flops = compute.training_flops(config, size.linear, request.sequence_length)
    tokens = compute.compute_optimal_tokens(size.parameters)
    plan = {
        "model": model,
        "parameters": size.parameters,
        "layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "fits": fits,
        "devices": request.gpus,
        "memory_of_a_device": request.memory,
        "usable_memory_of_a_device": request.usable,
        "batch_size": request.batch_size,
        "accumulation_steps": -(-request.batch_size // (request.gpus * setup.micro_batch)),
        "setup": dataclasses.asdict(setup),
        "peak": _parts(peak),
        "moments": {moment.name: _parts(moment) for moment in memory.training_moments(config, size, setup)},
        "snapshot_in_host_memory": memory.snapshot_bytes(size, setup.optimizer),
        "inference": {
            "weights": 2 * size.parameters,
            "cache_of_a_sequence": memory.cache_bytes(config, 1, request.sequence_length),
        },
        "flops_a_token": flops,
        "attention_flops_a_token": compute.attention_flops(config, request.sequence_length),
        "linear_weights": size.linear,
        "compute_optimal_tokens": tokens,
        "compute_optimal_flops": flops * tokens,
        "mfu": mfu,
        "peak_tflops": peak_tflops,
        "hours": peak_tflops and compute.training_hours(flops * tokens, request.gpus, peak_tflops * 1e12, mfu),
    }
    if not fits:
        free = dataclasses.replace(request, sharding=None, checkpointing=None)
        plan["devices_needed"] = devices_needed(config, size, free)
        spread = dataclasses.replace(free, optimizer="adamw")
        plan["devices_needed_with_adamw"] = devices_needed(config, size, spread)
    return plan


def _parts(moment: Moment) -> dict[str, Any]:
    return {**dataclasses.asdict(moment), "total": moment.total}


def plan_text(plan: dict[str, Any]) -> str:
    """A plan as lines for the terminal."""
    inference, length = plan["inference"], plan["setup"]["sequence_length"]
    lines = [
        f"{plan['model']}: {plan['parameters']:,} parameters, {plan['layers']} layers, width {plan['hidden_size']:,}",
        "",
        *_training_lines(plan),
        "",
        f"Inference in bf16: weights {_gib(inference['weights'])} GiB, keys and values of a sequence of {length:,} "
        f"tokens {_gib(inference['cache_of_a_sequence'])} GiB",
        "",
        f"Compute: {plan['flops_a_token']:.3g} FLOPs a token (6 x {plan['linear_weights']:,} weights + attention "
        f"{plan['attention_flops_a_token']:.3g})",
        f"  compute-optimal budget: {plan['compute_optimal_tokens'] / 1e9:,.2f}B tokens (20 a parameter), "
        f"{plan['compute_optimal_flops']:.3g} FLOPs",
    ]
    if plan["hours"] is not None:
        lines.append(
            f"  {plan['hours']:,.1f} hours at {plan['mfu']:.0%} of {plan['devices']} x {plan['peak_tflops']:g} TFLOPS"
        )
    return "\n".join(lines)


def _training_lines(plan: dict[str, Any]) -> list[str]:
    setup, peak = plan["setup"], plan["peak"]
    one, many = ("GPU", "GPUs") if setup["device"] == "cuda" else ("CPU process", "CPU processes")
    devices = f"{plan['devices']:,} {one if plan['devices'] == 1 else many}"
    precision, optimizer = "bf16" if setup["bf16"] else "fp32", "Muon" if setup["optimizer"] == "muon" else "AdamW"
    lines = [
        f"Training on {devices} of {plan['memory_of_a_device'] / GIB:g} GiB in {precision} with {optimizer} "
        f"{'fits' if plan['fits'] else 'does NOT fit; the nearest is'}:",
        f"  batch           {plan['batch_size']:,} sequences of {setup['sequence_length']:,} tokens = {devices} x "
        f"micro-batch {setup['micro_batch']} x {plan['accumulation_steps']} accumulated",
        f"  sharding        {_SHARDING_TEXTS[setup['sharding']]}",
        f"  checkpointing   {'yes: each layer is computed twice' if setup['checkpointing'] else 'no'}",
        f"  memory          {_gib(peak['total'])} GiB a {one} of {_gib(plan['usable_memory_of_a_device'])} usable, "
        f"at the peak ({peak['name']}):",
    ]
    names = ["weights", "gradients", "optimizer", "activations", "logits", *(["snapshot"] if peak["snapshot"] else [])]
    lines += [f"    {name:14}{_gib(peak[name]):>9} GiB" for name in names]
    if not plan["fits"]:
        lines.append(_remedy(plan))
    if setup["sharding"] != "none":
        lines.append("  note            `scratch-gpt pretrain` itself trains with sharding none so far")
    if setup["checkpointing"]:
        lines.append("  note            `scratch-gpt pretrain` itself has no checkpointing so far")
    if setup["device"] == "cuda":
        lines.append(
            f"  host memory     {_gib(plan['snapshot_in_host_memory'])} GiB more in the main process, pinned, for the "
            "snapshot of a checkpoint"
        )
    if setup["device"] == "cpu":
        lines.append(
            "  note            what is in use; `scratch-gpt pretrain` keeps freed memory: a third more resident"
        )
    return lines


def _gib(number: float) -> str:
    return f"{number / GIB:,.2f}" if number < 1000 * GIB else f"{number / GIB:,.0f}"


def _remedy(plan: dict[str, Any]) -> str:
    needed, with_adamw = plan["devices_needed"], plan["devices_needed_with_adamw"]
    if needed is not None and needed <= plan["devices"]:
        return "  remedy          leave sharding, checkpointing and micro-batch to the plan"
    if needed is not None:
        return f"  remedy          {needed:,} such devices are enough"
    if with_adamw is not None:
        return f"  remedy          --optimizer adamw, which can be spread: {with_adamw:,} such devices are enough"
    return "  remedy          a shorter sequence or more memory: no number of devices is enough for one sequence"


_TABLE_HEADINGS = (
    *("preset", "parameters", "context", "training, GiB", "checkpointed, GiB", "80 GiB GPUs", "weights, GiB"),
    *("cache, GiB", "FLOPs a token", "tokens"),
)


def preset_table() -> str:
    """All presets as a Markdown table; see the README for what its columns are."""
    from hf_scratch_gpt.model.presets import PRESETS

    rows = [_table_row(name) for name in PRESETS]
    rule = ["---", *["---:"] * (len(_TABLE_HEADINGS) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in [_TABLE_HEADINGS, rule, *rows])


def _table_row(name: str) -> list[str]:
    config = load_config(name)
    size, length = memory.measure_model(config), config.max_position_embeddings
    setup = TrainingSetup(1, length)
    plain = memory.peak(config, size, setup).total
    checkpointed = memory.peak(config, size, dataclasses.replace(setup, checkpointing=True)).total
    gpus = devices_needed(config, size, Request(1, 80 * GIB, length, 1, packed=False))
    return [
        f"`{name}`",
        f"{size.parameters:,}",
        f"{length:,}",
        *(_gib(number) for number in (plain, checkpointed)),
        f"{gpus:,}" if gpus else "–",
        *(_gib(number) for number in (2 * size.parameters, memory.cache_bytes(config, 1, length))),
        f"{compute.training_flops(config, size.linear, length):.2e}",
        f"{compute.compute_optimal_tokens(size.parameters) / 1e9:,.1f}B",
    ]


def _make_parser() -> CommandParser:
    import argparse

    parser = CommandParser(
        prog="scratch-gpt plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", nargs="?", help="a preset, or the folder of a model")
    add("--all", action="store_true", help="print the table of all presets, as Markdown")
    add("--gpus", type=int, default=1, help="how many (default 1)")
    add("--hbm", type=float, default=80.0, help="memory of each in GiB (default 80)")
    add("--batch-size", type=int, help="sequences in an optimizer step over all GPUs (default: about 2**19 tokens)")
    add("--sequence-length", type=int, help="tokens in a sequence (default: the model's context)")
    add("--precision", choices=("bf16", "fp32"), default="bf16", help="bf16 (autocast, default) or fp32")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="adamw (default) or muon")
    yes_or_no = argparse.BooleanOptionalAction
    add(
        "--separate-documents", action=yes_or_no, default=True, help="keep documents apart, as pretrain does (default)"
    )
    add("--micro-batch", type=int, help="sequences in a forward pass of one GPU (default: chosen)")
    add("--sharding", choices=memory.SHARDINGS, help="what is spread over the GPUs (default: chosen)")
    add("--checkpointing", action=yes_or_no, help="(default: chosen)")
    add("--mfu", type=float, default=0.4, help="share of the peak that training reaches (default 0.4)")
    add("--peak-tflops", type=float, help="of one GPU (default 989: dense bf16 of an H100)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: plan for processes on a CPU")
    add("--model-overrides", nargs="+", help="config fields over the preset's: key=value ...")
    add("--json", action="store_true", help="print the plan as JSON, in bytes and FLOPs")
    return parser


def _check(options: Any) -> None:
    for name in ("gpus", "hbm", "batch_size", "sequence_length", "micro_batch", "peak_tflops", "mfu"):
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{flag} is {value}; give a number above 0")
    if options.mfu > 1:
        raise ValueError(f"--mfu is {options.mfu}; it is a share of the peak, from 0 to 1")
    if options.sharding not in (None, "none") and options.gpus == 1:
        raise ValueError(f"--sharding is {options.sharding}, and there is one GPU to spread over; raise --gpus")
    if options.sharding not in (None, "none") and options.optimizer == "muon":
        raise ValueError(f"--sharding is {options.sharding}; Muon needs whole matrices: use --optimizer adamw")


def _make_request(options: Any, config: Any) -> Request:
    _check(options)
    context = config.max_position_embeddings
    length = options.sequence_length or context
    if length > context and config.position_embedding_type == "learned":
        raise ValueError(f"--sequence-length is {length}; {options.model} has {context:,} learned positions: lower it")
    unit = options.gpus * (options.micro_batch or 1)
    batch_size = options.batch_size or max(1, round(_TOKENS_A_STEP / length / unit)) * unit
    if batch_size % unit:
        micro = f" x micro-batch {options.micro_batch}" if options.micro_batch else ""
        raise ValueError(
            f"--batch-size is {batch_size}, which does not divide by {options.gpus} GPUs{micro}; choose a multiple of "
            f"{unit}"
        )
    return Request(
        gpus=options.gpus,
        memory=int(options.hbm * GIB),
        sequence_length=length,
        batch_size=batch_size,
        bf16=options.precision == "bf16",
        optimizer=options.optimizer,
        packed=options.separate_documents,
        device=options.device,
        micro_batch=options.micro_batch,
        sharding=options.sharding,
        checkpointing=options.checkpointing,
    )


def main(arguments: Sequence[str]) -> int:
    """Entry point of `scratch-gpt plan`."""
    options = _make_parser().parse_args(arguments)
    if options.all == bool(options.model):
        raise ValueError("scratch-gpt plan: name a preset or a model folder, or give --all for a table of all presets")
    if options.all:
        print(preset_table())
        return 0
    config = load_config(options.model, parse_overrides(options.model_overrides))
    peak_tflops = options.peak_tflops or (H100_TFLOPS if options.device == "cuda" else None)
    plan = make_plan(options.model, config, _make_request(options, config), options.mfu, peak_tflops)
    print(json.dumps(plan, indent=2) if options.json else plan_text(plan))
    return 0
