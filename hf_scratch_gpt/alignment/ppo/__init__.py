"""PPO for Hugging Face causal language models, with one optimizer step a minibatch and exact resume."""

from hf_scratch_gpt.alignment.ppo.config import PPOConfig
from hf_scratch_gpt.alignment.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
