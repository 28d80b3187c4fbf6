"""GPT-1's auxiliary objective: a classifier's loss plus a share of the language model's on the same texts.

    L3(C) = L2(C) + λ · L1(C)        Radford et al. 2018, section 3.2, with λ = 0.5

L2 is the cross-entropy of the labels and L1 the language model's on the tokens of the texts, control tokens included,
through the same trunk and the base model's head. As in the paper's code (openai/finetune-transformer-lm), L1 of a text
is the mean over its tokens, so that long texts weigh no more than short ones, and both losses are means over texts.
"""

from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM

from hf_scratch_gpt.finetuning._compat import LOGIT_SCALES
from hf_scratch_gpt.finetuning.models import load_model
from hf_scratch_gpt.runs.loading import check_language_model, loading

_CHUNK_TOKENS = 1024  # logits of so many tokens exist at a time
_HEAD_NAME = "auxiliary_lm_head"


class AuxiliaryLanguageModel:
    """The language model's head on a classifier's trunk, while it is trained.

    A tied head is the classifier's own embedding. Another one is loaded from the base model and kept beside the
    classifier, where checkpoints and the optimizer find it, until `detach`; beside adapters it stays as it is.

    Args:
        model: The classifier, plain or with adapters.
        source (`str`): The language model that the classifier was made from.

    Raises:
        ValueError: if `source` is no causal language model, or scales its logits in a way that is not known here.
    """

    def __init__(self, model: Any, source: str):
        with loading(source, "config"):
            config = AutoConfig.from_pretrained(source)
        _check_source(source, config)
        has_adapters = hasattr(model, "peft_config")
        self.model = model.get_base_model() if has_adapters else model
        self.softcap = getattr(config.get_text_config(), "final_logit_softcapping", None)
        self.head: torch.nn.Module | None = None
        if not getattr(config.get_text_config(), "tie_word_embeddings", True):
            self.head = load_model(AutoModelForCausalLM, source).get_output_embeddings()
            self.head.requires_grad_(not has_adapters)
            setattr(self.model, _HEAD_NAME, self.head.to(model.device))
        self._hidden_states: torch.Tensor | None = None
        trunk = getattr(self.model, self.model.base_model_prefix)
        self._hook = trunk.register_forward_hook(self._keep)

    def _keep(self, module: Any, arguments: Any, output: Any) -> None:
        if module.training:
            self._hidden_states = output[0]  # `last_hidden_state`, after the final norm: what the head was trained on

    def summed_loss(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Sum over the texts of the batch of the mean loss of their tokens, in nats; of the last forward pass.

        Args:
            input_ids (`Tensor`): (batch, tokens), padded on the right.
            attention_mask (`Tensor`): (batch, tokens), 0 where padded.
        """
        assert self._hidden_states is not None, "there was no forward pass"
        hidden_states, self._hidden_states = self._hidden_states, None
        is_target = attention_mask[:, 1:].bool()
        weights = (1 / is_target.sum(1).clamp(min=1))[:, None].expand(is_target.shape)[is_target]
        targets, states = input_ids[:, 1:][is_target], hidden_states[:, :-1][is_target]
        loss = states.new_zeros((), dtype=torch.float32)
        for chunk in zip(*(value.split(_CHUNK_TOKENS) for value in (states, targets, weights)), strict=True):
            loss = loss + checkpoint(self._chunk_loss, *chunk, use_reentrant=False)
        return loss

    def _chunk_loss(self, states: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if self.head is not None:
            logits = self.head(states)
        else:
            logits = torch.nn.functional.linear(states, self.model.get_input_embeddings().weight)
        logits = logits.float()
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return (torch.nn.functional.cross_entropy(logits, targets, reduction="none") * weights).sum()

    def detach(self) -> None:
        """Leave the classifier as it would be without the auxiliary loss; its head is saved nowhere."""
        self._hook.remove()
        if self.head is not None:
            delattr(self.model, _HEAD_NAME)


def _check_source(source: str, config: Any) -> None:
    told = "aux_lm_weight needs a causal language model"
    try:
        check_language_model(source, config)
    except ValueError as error:
        raise ValueError(f"{told}: {error}") from None
    architectures = getattr(config, "architectures", None) or []
    if not any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        raise ValueError(f"{told}: {source} is a {', '.join(architectures) or 'model of unknown architecture'}")
    scaled = [name for name in LOGIT_SCALES if getattr(config.get_text_config(), name, None) not in (None, 1.0)]
    if scaled:
        raise ValueError(f"{told} with plain logits: {source} scales its own by '{scaled[0]}'; set aux_lm_weight to 0")
