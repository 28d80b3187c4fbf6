"""The Accelerate loop, optimizers, schedules, checkpoints."""
