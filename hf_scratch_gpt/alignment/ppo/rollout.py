"""The buffer of sampled episodes that minibatches are cut from."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hf_scratch_gpt.alignment.ppo.generation import position_ids_of


@dataclass
class Rollout:
    """Episodes of one process: prompts (R, P) padded on the left, everything else (R, T) padded on the right.

    `mask` is 1 on a response's tokens; `log_probs` and `values` are those of the policy and the critic that sampled.
    """

    prompt_ids: Tensor
    prompt_mask: Tensor
    response_ids: Tensor
    mask: Tensor
    log_probs: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor

    def select(self, rows: Tensor) -> "Rollout":
        """The given rows, cut to their own longest prompt and response."""
        start = int(self.prompt_mask[rows].any(0).int().argmax())
        stop = int(self.mask[rows].sum(-1).max())
        return Rollout(
            self.prompt_ids[rows, start:],
            self.prompt_mask[rows, start:],
            **{
                field.name: getattr(self, field.name)[rows, :stop]
                for field in dataclasses.fields(self)
                if not field.name.startswith("prompt")
            },
        )

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
        save_file({name: value.contiguous() for name, value in vars(self).items()}, path)

    @classmethod
    def load(cls, path: Path, device: torch.device) -> "Rollout":
        """Read what `save` wrote."""
        return cls(**load_file(path, device=str(device)))
