"""The buffer of sampled episodes that minibatches are cut from.

Every process samples its share and holds all of it: a rollout is small beside a model, any process can take any rows
of a minibatch, and what is computed over a rollout (advantages, whitening, means) is the same on each.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_scratch_gpt.alignment.ppo.generation import position_ids_of


@dataclass
class Rollout:
    """R episodes: prompts (R, P) padded on the left, everything else (R, T) padded on the right.

    `mask` is 1 on a response's tokens; `log_probs` and `values` are those of the policy and the critic that sampled.
    `kept` tells the tokens that sampling kept, as bits (R, T, ⌈V/8⌉), where it did not keep all.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    mask: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    kept: Tensor | None = None

    def select(self, rows: Tensor) -> "Rollout":
        """The given rows, cut to their own longest prompt and response."""
        start = int(self.prompt_mask[rows].any(0).int().argmax())
        stop = int(self.mask[rows].sum(-1).max())
        cut = {name: value[rows, start:] for name, value in self.tensors().items() if name.startswith("prompt")}
        cut |= {name: value[rows, :stop] for name, value in self.tensors().items() if not name.startswith("prompt")}
        return Rollout(**cut)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that it has, by name."""
        values = ((field.name, getattr(self, field.name)) for field in dataclasses.fields(self))
        return {name: value for name, value in values if value is not None}

    def in_order(self, rows: Tensor) -> "Rollout":
        """The given rows, in their full width."""
        return Rollout(**{name: value[rows] for name, value in self.tensors().items()})

    def model_inputs(self) -> dict[str, Tensor]:
        """What the models read: prompt and response as one sequence (R, P + T)."""
        attention_mask = torch.cat([self.prompt_mask, self.mask.long()], dim=1)
        return {
            "input_ids": torch.cat([self.prompt_ids, self.response_ids], dim=1),
            "attention_mask": attention_mask,
            "position_ids": position_ids_of(attention_mask),
        }

    def save(self, path: Path) -> None:
        """Save as one safetensors file."""
        save_file({name: value.contiguous() for name, value in self.tensors().items()}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Rollout":
        """Read what `save` wrote."""
        # On the CPU first: with two processes accelerate names it "cpu:0", which safetensors does not know.
        return cls(**{name: tensor.to(device) for name, tensor in load_file(path).items()})
