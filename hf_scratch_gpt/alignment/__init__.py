"""Reward model, DPO, PPO."""
