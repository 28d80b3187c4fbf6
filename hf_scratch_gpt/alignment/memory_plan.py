"""What DPO will take in memory, told before anything is loaded: policy, reference, gradients, optimizer, activations.

The first four are counted on the meta device, weight by weight, adapters included. What autograd keeps of a batch is
counted by `pretraining.memory` for our models; for others it is the common estimate of 34 bytes a token and unit of
width in a layer (Korthikanti et al. 2022, https://arxiv.org/abs/2205.05198, equation 2 without attention weights).
"""

import dataclasses
from pathlib import Path
from typing import Any

from hf_scratch_gpt.finetuning.arguments import make_lora_config
from hf_scratch_gpt.pretraining import memory

_UNITS = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
_FP32, _BF16 = 4, 2
_BYTES_A_UNIT = 34  # in bf16, of a token and a unit of width in a layer
# TRL's fused head works in tiles of so many tokens by so much of the vocabulary.
_TILE_TOKENS, _TILE_VOCABULARY = 4096, 32768
# Bytes of state for each trained number, by how the optimizer's name begins; AdamW's two numbers where none does.
_STATE_BYTES = (("adamw_8bit", 2), ("adamw_bnb_8bit", 2), ("paged_adamw_8bit", 2), ("adafactor", 0), ("sgd", 0))
_KEPT_FREE = 0.1  # of a machine's memory, for its system, the libraries and fragmentation


def _text(number: int) -> str:
    unit, name = next(((unit, name) for unit, name in _UNITS if number >= unit), _UNITS[-1])
    return f"{number / unit:.3g} {name}" if number else "0"


@dataclasses.dataclass(frozen=True)
class DPOMemory:
    """Bytes that one process holds at the peak of a step of DPO, by what they are.

    Args:
        policy (`int`): Weights of the policy, with its adapters.
        reference (`int`): Weights of a second model; 0 where adapters are switched off, or where its log-probabilities
            are computed before training and kept.
        gradients (`int`): Of what is trained, in fp32.
        optimizer (`int`): Its states.
        activations (`int`): An estimate of what autograd keeps of a batch: twice `per_device_train_batch_size` rows.
        logits (`int`): An estimate of a tile of the head.
        rows (`int`), tokens (`int`): Rows of a batch, and tokens of the longest.
    """

    policy: int
    reference: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    rows: int
    tokens: int

    @property
    def certain(self) -> int:
        """What no smaller batch avoids."""
        return self.policy + self.reference + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """The sum."""
        return self.certain + self.activations + self.logits

    def lines(self, memory_bytes: int | None) -> list[str]:
        """The plan as lines for the console; `memory_bytes` is the machine's."""
        names = ("policy", "reference", "gradients", "optimizer", "activations", "logits")
        parts = ", ".join(f"{name} {_text(getattr(self, name))}" for name in names)
        whole = "" if memory_bytes is None else f" of {_text(memory_bytes)}"
        return [
            f"memory about {_text(self.total)}{whole}: {parts} (activations and logits are estimates, for {self.rows} "
            f"rows of up to {self.tokens} tokens)"
        ]

    def check(self, memory_bytes: int | None, source: str) -> str | None:
        """A warning where the plan does not fit into `memory_bytes`; refuses what no setting of the batch makes fit.

        Raises:
            ValueError: if weights, gradients and optimizer states alone are more.
        """
        if memory_bytes is None or self.total <= memory_bytes * (1 - _KEPT_FREE):
            return None
        remedies = ["take a smaller model"]
        if self.reference:
            remedies.insert(0, "set precompute_ref_log_probs")
        if self.gradients == self.policy:
            remedies.insert(0, "set peft to lora")
        if self.certain > memory_bytes:
            raise ValueError(
                f"{source}: weights, gradients and optimizer states take {_text(self.certain)}, and there are "
                f"{_text(memory_bytes)}; {', '.join(remedies)}, or use a machine with more memory"
            )
        return (
            f"{source}: may not fit: about {_text(self.total)} of {_text(memory_bytes)}; lower "
            "per_device_train_batch_size (and raise gradient_accumulation_steps), set gradient_checkpointing, lower "
            f"max_length, or {', or '.join(remedies)}"
        )


def plan_memory(config: Any, arguments: Any, tokens: int, keeps_reference: bool) -> DPOMemory:
    """Count what DPO of a model of `config` takes under a stage's settings.

    Args:
        config: The model's config.
        arguments: Settings of `dpo`.
        tokens (`int`): Of the longest row, prompt and answer.
        keeps_reference (`bool`): Whether a second model stays in memory while the policy trains.
    """
    policy, trained, base = _count_weights(config, arguments)
    rows = 2 * arguments.per_device_train_batch_size
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    state = next((each for name, each in _STATE_BYTES if optimizer.startswith(name)), 2 * _FP32)
    text = config.get_text_config()
    size = _BF16 if arguments.bf16 or arguments.fp16 else _FP32
    tile = min(rows * tokens, _TILE_TOKENS) * min(text.vocab_size, _TILE_VOCABULARY)
    return DPOMemory(
        policy=_FP32 * policy,
        reference=_FP32 * base if keeps_reference else 0,
        gradients=_FP32 * trained,
        optimizer=state * trained,
        activations=_activations(config, arguments, rows, tokens),
        logits=tile * (size + 2 * _FP32),
        rows=rows,
        tokens=tokens,
    )


def _count_weights(config: Any, arguments: Any) -> tuple[int, int, int]:
    """Numbers in the policy, of them trained, and in the model without adapters; nothing is allocated."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        base = model.num_parameters()
        adapter = make_lora_config(arguments, "CAUSAL_LM", model)
        if adapter is not None:
            from peft import get_peft_model

            model = get_peft_model(model, adapter)
    trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
    return sum(weight.numel() for weight in model.parameters()), trained, base


def _activations(config: Any, arguments: Any, rows: int, tokens: int) -> int:
    text, checkpointing = config.get_text_config(), bool(arguments.gradient_checkpointing)
    uses_bf16 = bool(arguments.bf16 or arguments.fp16)
    if config.model_type == "scratch_gpt":
        setup = memory.TrainingSetup(
            rows, tokens, uses_bf16, checkpointing=checkpointing, device="cpu" if arguments.use_cpu else "cuda"
        )
        return memory.saved_bytes(config, memory.measure_model(config), setup)
    units = rows * tokens * text.hidden_size
    layer = _BYTES_A_UNIT * units * (1 if uses_bf16 else 2)
    return layer + _FP32 * units * text.num_hidden_layers if checkpointing else layer * text.num_hidden_layers


def machine_memory(use_cpu: bool, root: Path = Path("/sys/fs/cgroup"), meminfo: Path = Path("/proc/meminfo")) -> Any:
    """Bytes of the device that trains: a GPU's, or the machine's, no more than a container's limit; else `None`."""
    import torch

    if not use_cpu and torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1]
    found = []
    for limit in (root / "memory.max", root / "memory" / "memory.limit_in_bytes"):
        try:
            found.append(int(limit.read_text(encoding="ascii")))
        except (OSError, ValueError):  # not in a container, or "max"
            continue
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        found.append(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal:")))
    except (OSError, StopIteration):
        pass
    return min(found, default=None)
