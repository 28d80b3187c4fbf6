"""Instruction tuning with TRL and PEFT, and merging of adapters."""
