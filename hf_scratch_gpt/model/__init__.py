"""The model, its configuration and its tokenizer: all that travels to the Hub beside the weights.

Importing this package registers the model with transformers' Auto classes, so that
`AutoModelForCausalLM.from_pretrained(folder)` loads it without `trust_remote_code`. What `save_pretrained` writes
carries the code, so that it also loads, with `trust_remote_code=True`, where this package is not installed.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from hf_scratch_gpt.model.configuration_scratch_gpt import ScratchGPTConfig
from hf_scratch_gpt.model.modeling_scratch_gpt import (
    ScratchGPTForCausalLM,
    ScratchGPTForMaskedLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
)
from hf_scratch_gpt.model.tokenization_scratch_gpt import ScratchGPTTokenizer, encode_conversation, encode_text

_MODELS = {
    AutoModel: ScratchGPTModel,
    AutoModelForCausalLM: ScratchGPTForCausalLM,
    AutoModelForMaskedLM: ScratchGPTForMaskedLM,
    AutoModelForSequenceClassification: ScratchGPTForSequenceClassification,
    AutoModelForTokenClassification: ScratchGPTForTokenClassification,
}


def _register() -> None:
    """Make the Auto classes know the model (for loading here) and the model know them (for saving its code)."""
    AutoConfig.register(ScratchGPTConfig.model_type, ScratchGPTConfig, exist_ok=True)
    ScratchGPTConfig.register_for_auto_class()
    for auto_class, model_class in _MODELS.items():
        auto_class.register(ScratchGPTConfig, model_class, exist_ok=True)
        model_class.register_for_auto_class(auto_class.__name__)
    AutoTokenizer.register(ScratchGPTConfig, fast_tokenizer_class=PreTrainedTokenizerFast, exist_ok=True)


_register()

__all__ = [
    "ScratchGPTConfig",
    "ScratchGPTForCausalLM",
    "ScratchGPTForMaskedLM",
    "ScratchGPTForSequenceClassification",
    "ScratchGPTForTokenClassification",
    "ScratchGPTModel",
    "ScratchGPTTokenizer",
    "encode_conversation",
    "encode_text",
]
