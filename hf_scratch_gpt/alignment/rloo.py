"""REINFORCE with a leave-one-out baseline: `scratch-gpt rloo recipe.yaml`.

An answer's advantage is its reward less the mean reward of the other answers to the same prompt; the whole answer is
one action, and the KL from the reference is taken off its reward (Ahmadian et al. 2024,
https://huggingface.co/papers/2402.14740).
"""

import dataclasses
import functools
from pathlib import Path

from trl import RLOOConfig, RLOOTrainer

from hf_scratch_gpt.alignment.online import OnlineArguments, OnlineTraining, align_online
from hf_scratch_gpt.finetuning.trainers import run_stage


@dataclasses.dataclass
class RLOOArguments(OnlineArguments, RLOOConfig):
    """Settings of `rloo`: `OnlineArguments` and all of TRL's `RLOOConfig` (`num_generations`, `beta`, ...)."""


Arguments = RLOOArguments


class OnlineRLOOTrainer(OnlineTraining, RLOOTrainer):
    """`RLOOTrainer` with what `OnlineTraining` adds."""


def run(arguments: RLOOArguments) -> Path:
    """Align `model_name_or_path` on the prompts of `dataset`; write a complete model folder.

    Raises:
        ValueError: for unusable settings, models, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "rloo", functools.partial(align_online, OnlineRLOOTrainer))
