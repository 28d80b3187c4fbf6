"""Make your own GPT, from raw text to an aligned chat model, with every stage an ordinary Hugging Face checkpoint."""

import importlib
import os
from typing import Any

# No stage of this package reports to anyone unasked; a user who wants telemetry sets the variable.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

__version__ = "0.1.0"

_EXPORTS = {
    "ScratchGPTConfig": "hf_scratch_gpt.model",
    "ScratchGPTModel": "hf_scratch_gpt.model",
    "ScratchGPTForCausalLM": "hf_scratch_gpt.model",
    "ScratchGPTForMaskedLM": "hf_scratch_gpt.model",
    "ScratchGPTForSequenceClassification": "hf_scratch_gpt.model",
    "ScratchGPTForTokenClassification": "hf_scratch_gpt.model",
    "ScratchGPTTokenizer": "hf_scratch_gpt.model",
    "PPOConfig": "hf_scratch_gpt.alignment.ppo",
    "PPOTrainer": "hf_scratch_gpt.alignment.ppo",
}

__all__ = ["__version__", *_EXPORTS]


def __getattr__(name: str) -> Any:
    """Import a public class when it is first used, so that importing the package costs nothing."""
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'hf_scratch_gpt' has no attribute '{name}'")
