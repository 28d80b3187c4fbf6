"""Group relative policy optimisation: `scratch-gpt grpo recipe.yaml`.

Several answers are sampled to each prompt, and an answer's advantage is its reward less the group's mean, over the
group's deviation: no critic is trained (Shao et al. 2024, https://huggingface.co/papers/2402.03300). `loss_type:
dr_grpo` with `scale_rewards: none` leaves out the two normalisations that favour long and easy answers (Liu et al.
2025, https://huggingface.co/papers/2503.20783).
"""

import dataclasses
import functools
from pathlib import Path

from trl import GRPOConfig, GRPOTrainer

from hf_scratch_gpt.alignment.online import OnlineArguments, OnlineTraining, align_online
from hf_scratch_gpt.finetuning.trainers import run_stage


@dataclasses.dataclass
class GRPOArguments(OnlineArguments, GRPOConfig):
    """Settings of `grpo`: `OnlineArguments` and all of TRL's `GRPOConfig` (`num_generations`, `beta`, ...)."""


Arguments = GRPOArguments


class OnlineGRPOTrainer(OnlineTraining, GRPOTrainer):
    """`GRPOTrainer` with what `OnlineTraining` adds."""


def run(arguments: GRPOArguments) -> Path:
    """Align `model_name_or_path` on the prompts of `dataset`; write a complete model folder.

    Raises:
        ValueError: for unusable settings, models, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "grpo", functools.partial(align_online, OnlineGRPOTrainer))
