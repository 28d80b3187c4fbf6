"""Instruction tuning with TRL and PEFT, merging of adapters, and text classification."""
