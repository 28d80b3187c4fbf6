"""How a run is spread over processes: what the launcher asks for, against what the recipe expects and what came of it.

Accelerate runs a launch that it cannot follow as something else, without a word: `accelerate launch --cpu
--num_processes 2` and a profile with `use_cpu: true` start one process; `--multi_gpu` without GPUs starts several that
train alone; FSDP on CPUs becomes data-parallel. Here each of them either runs as what it asks for, or is refused.
"""

import os
from collections.abc import Mapping
from typing import Any, Literal

from torch import nn

from hf_scratch_gpt.pretraining.arguments import PretrainArguments
from hf_scratch_gpt.pretraining.sharding import ShardedModule, shard_model
from hf_scratch_gpt.runs.hardware import has_fast_bf16

DistributedKind = Literal["none", "ddp", "fsdp"]

_ON_CPUS = "on CPUs start with ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N"
# What Accelerate can launch and nobody has checked here against one process's losses.
_UNCHECKED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_SAGEMAKER": "SageMaker",
}
_UNCHECKED_SIZES = {
    "PARALLELISM_CONFIG_TP_SIZE": "tensor parallelism",
    "PARALLELISM_CONFIG_CP_SIZE": "context parallelism",
    "PARALLELISM_CONFIG_SP_SIZE": "sequence parallelism",
    "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "hybrid sharding",
}
_UNCHECKED_FSDP = {
    "FSDP_OFFLOAD_PARAMS": "fsdp_offload_params",
    "FSDP_ACTIVATION_CHECKPOINTING": "fsdp_activation_checkpointing",
}


def _is_on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("1", "true", "yes", "y", "on")


def launched_processes(environment: Mapping[str, str] | None = None) -> int:
    """How many processes the launcher started, by its `WORLD_SIZE`; 1 without a launcher."""
    return int((os.environ if environment is None else environment).get("WORLD_SIZE", "1"))


def launched_kind(environment: Mapping[str, str] | None = None) -> DistributedKind:
    """What the launcher asks for: `"none"` (one process), `"ddp"` (data-parallel) or `"fsdp"` (FSDP2).

    Args:
        environment: As the launcher set it; `None` for this process's own.

    Raises:
        ValueError: naming a kind of launch, or a setting of one, that pretraining does not take.
    """
    environment = os.environ if environment is None else environment
    for name, title in _UNCHECKED.items():
        if _is_on(environment, name):
            raise ValueError(_refusal(title))
    if _is_on(environment, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        for name, title in _UNCHECKED_SIZES.items():
            if int(environment.get(name, "1")) > 1:
                raise ValueError(_refusal(f"{title} ({name.lower()} {environment[name]})"))
    if not _is_on(environment, "ACCELERATE_USE_FSDP"):
        return "none" if launched_processes(environment) == 1 else "ddp"
    if environment.get("FSDP_VERSION", "1") != "2":
        raise ValueError(_refusal(f"FSDP version {environment.get('FSDP_VERSION', '1')}", "set fsdp_version: 2, or "))
    for name, title in _UNCHECKED_FSDP.items():
        if _is_on(environment, name):
            raise ValueError(_refusal(f"FSDP with {title}", "turn it off, or "))
    return "fsdp"


def _refusal(asked: str, way_out: str = "") -> str:
    return (
        f"the launcher asks for {asked}; pretraining runs on one process, data-parallel or with FSDP2: {way_out}"
        "choose one of the profiles in recipes/accelerate"
    )


def check_launch(arguments: PretrainArguments, environment: Mapping[str, str] | None = None) -> DistributedKind:
    """What the launcher asks for, if it is what the recipe expects.

    Args:
        arguments (`PretrainArguments`): `num_processes` and `distributed` are the expectations, `precision` and
            `compile` what the launcher must not contradict.
        environment: As the launcher set it; `None` for this process's own.

    Raises:
        ValueError: naming what was expected and what was launched.
    """
    environment = os.environ if environment is None else environment
    kind, processes = launched_kind(environment), launched_processes(environment)
    expected = arguments.num_processes or processes
    if expected != processes:
        hint = _ON_CPUS.replace("N", str(expected)) if expected > 1 else "start it without a launcher"
        raise ValueError(
            f"the recipe expects 'num_processes' {expected}, but the launcher started {processes}; {hint}"
        )
    if arguments.distributed not in ("auto", kind):
        raise ValueError(
            f"the recipe expects 'distributed' {arguments.distributed}, but the launch is {kind}; start it with a "
            f"profile of recipes/accelerate for {arguments.distributed}, or set 'distributed' to {kind}"
        )
    if not arguments.num_processes and processes == 1 and _meant_several(environment):
        raise ValueError(
            f"accelerate launch was asked for several processes but started one; {_ON_CPUS}; if one is meant, set "
            "'num_processes' to 1"
        )
    _check_precision(arguments, environment)
    if kind == "fsdp" and arguments.compile == "true":
        raise ValueError("'compile' is true, which is not done with FSDP2; set it to auto or false")
    return kind


def _meant_several(environment: Mapping[str, str]) -> bool:
    """Whether Accelerate's launcher for one process was told of more: only then does it name a meeting point."""
    from_launcher = {"ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION", "MASTER_ADDR"} <= environment.keys()
    return from_launcher and "WORLD_SIZE" not in environment


def _check_precision(arguments: PretrainArguments, environment: Mapping[str, str]) -> None:
    asked = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    chosen = arguments.precision
    if chosen == "auto":
        chosen = "bf16" if has_fast_bf16() else "fp32"
    if asked not in ("no", chosen):
        raise ValueError(
            f"the launcher asks for mixed precision {asked}, the recipe's 'precision' {arguments.precision} gives "
            f"{chosen}; launch with --mixed_precision no, the recipe decides"
        )
    if environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower() != "no":
        raise ValueError("the launcher asks for compilation; launch with --dynamo_backend no and set 'compile'")


def check_processes(accelerator: Any) -> None:
    """Check that the processes that the launcher started have found each other.

    Raises:
        ValueError: if each would train alone, or Accelerate has made something else of the launch.
    """
    launched = launched_processes()
    if accelerator.num_processes != launched:
        raise ValueError(
            f"the launcher started {launched} processes but Accelerate sees {accelerator.num_processes}, so each "
            f"would train alone; {_ON_CPUS}"
        )
    kind = str(getattr(accelerator.distributed_type, "value", accelerator.distributed_type))
    if kind not in ("NO", "FSDP") and not kind.startswith("MULTI_"):
        raise ValueError(_refusal(kind))


def place_model(model: nn.Module, accelerator: Any) -> nn.Module:
    """The model on this process's device, or its slice of it where the launcher asks for FSDP2."""
    if launched_kind() != "fsdp":
        return model.to(accelerator.device)
    from torch.distributed.device_mesh import init_device_mesh

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    return shard_model(
        model, mesh, _is_on({"FSDP_RESHARD_AFTER_FORWARD": "true", **os.environ}, "FSDP_RESHARD_AFTER_FORWARD")
    )


def prepare_module(module: nn.Module, model: nn.Module, accelerator: Any) -> nn.Module:
    """The loss module as the loop trains it: wrapped by Accelerate, or around a model that is sharded already."""
    return ShardedModule(module, model) if launched_kind() == "fsdp" else accelerator.prepare(module)
