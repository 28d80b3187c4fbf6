# SPDX-License-Identifier: Apache-2.0
"""Bottleneck adapters (Houlsby et al. 2019, https://arxiv.org/abs/1902.00751) as a method of PEFT, type "BOTTLENECK".

Behind each of the two sublayers of a block, before its output is added to the residual stream, stands a small network
with a skip connection of its own: `h + up(gelu(down(h)))`. PEFT has no such method for models that it does not know
(its adaption prompts serve Llama, Mistral and GPT-2 only, the others change weights and not activations), so it is
added to PEFT's tables here, and then trains, saves, loads and stacks as any method of PEFT does. What is not linear
cannot be merged into the weights: these adapters stay beside the model.

Importing this module is what makes PEFT know the type:

    import hf_scratch_gpt.model.bottleneck_adapters
    model = peft.AutoPeftModelForCausalLM.from_pretrained("runs/sft")
"""

import dataclasses
from typing import Any

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

PEFT_TYPE = "BOTTLENECK"
_PREFIX = "bottleneck_"
# What writes to the residual stream: Llama and its kin (two names), GPT-2 (one), OPT and GPT-J (two).
RESIDUAL_PROJECTIONS = ("o_proj", "down_proj", "c_proj", "out_proj", "fc2", "fc_out")


@dataclasses.dataclass
class BottleneckConfig(PeftConfig):
    """Settings of bottleneck adapters.

    Args:
        bottleneck_size (`int`, *optional*, defaults to `16`): Width of the small network.
        target_modules (`list[str]`, *optional*): Names of the modules behind which it stands; unset: the projections
            that write to the residual stream.
        exclude_modules (`list[str]`, *optional*): Of these, names of what is left out.
        modules_to_save (`list[str]`, *optional*): Modules that are trained whole beside the adapters.
        trainable_token_indices (`list[int]`, *optional*): Rows of the embedding that are trained beside the adapters.
    """

    bottleneck_size: int = 16
    target_modules: Any = None
    exclude_modules: Any = None
    modules_to_save: Any = None
    trainable_token_indices: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PEFT_TYPE
        if self.bottleneck_size < 1:
            raise ValueError(f"'bottleneck_size' is {self.bottleneck_size}, expected at least 1")
        names = self.target_modules or list(RESIDUAL_PROJECTIONS)
        self.target_modules = names if isinstance(names, str) else set(names)


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """A module followed by bottleneck adapters, which are the identity until they are trained (`up` is zero)."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")

    def __init__(self, base_layer: nn.Module, adapter_name: str, size: int):
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self.add_adapter(adapter_name, size)

    def add_adapter(self, adapter_name: str, size: int) -> None:
        """Add a new adapter of width `size`, on the device of the wrapped module."""
        width = getattr(self.base_layer, "out_features", None) or self.base_layer.nf  # transformers' Conv1D has `nf`
        self.bottleneck_down[adapter_name] = nn.Linear(width, size)
        self.bottleneck_up[adapter_name] = nn.Linear(size, width)
        for parameter in self.bottleneck_up[adapter_name].parameters():
            nn.init.zeros_(parameter)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter([adapter_name])

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The wrapped module's output, (..., width), through each active adapter."""
        result = self.base_layer(*args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                inner = nn.functional.gelu(down(result.to(down.weight.dtype)))
                result = result + up(inner).to(result.dtype)
        return result


class BottleneckModel(BaseTuner):
    """A model whose sublayers are followed by bottleneck adapters.

    Raises:
        ValueError: on merging, which their nonlinearity forbids.
    """

    prefix = _PREFIX
    tuner_layer_cls = BottleneckLayer
    target_module_mapping: dict[str, list[str]] = {}

    def _create_and_replace(self, peft_config, adapter_name, target, target_name, parent, current_key, **_) -> None:
        if isinstance(target, BottleneckLayer):
            target.add_adapter(adapter_name, peft_config.bottleneck_size)
            return
        if not hasattr(target, "out_features") and not hasattr(target, "nf"):
            raise ValueError(f"'{current_key}' is a {type(target).__name__}, behind which no bottleneck adapter fits")
        layer = BottleneckLayer(target, adapter_name, peft_config.bottleneck_size)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise ValueError("bottleneck adapters are not linear, so they cannot be merged into the weights")


# Keys are plain text: PEFT's enumeration of types is closed, and its tables compare by value.
PEFT_TYPE_TO_CONFIG_MAPPING[PEFT_TYPE] = BottleneckConfig
PEFT_TYPE_TO_TUNER_MAPPING[PEFT_TYPE] = BottleneckModel
PEFT_TYPE_TO_PREFIX_MAPPING[PEFT_TYPE] = _PREFIX
