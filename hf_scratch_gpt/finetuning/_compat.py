"""What we touch inside TRL: here and nowhere else, so that an upgrade has one place to break."""

import functools
import types
from collections.abc import Callable
from typing import Any

import torch
import trl.trainer.utils as trl_utils

from hf_scratch_gpt.model.linear_cross_entropy import IGNORED, LossStatistics, linear_cross_entropy


def score_only_trained_positions() -> None:
    """Let TRL's fused head project only the positions that have a label, on CPUs too.

    Its `add_fused_lm_head` does so where Triton runs; elsewhere it projects every position, prompts and padding
    included, to keep tile shapes constant for compilers. With prompts of 45 in 70 tokens, a vocabulary of 4,096 and
    width 256, that made a CPU training step 1.13 s instead of 0.72 s. The scores are the same.
    """
    assert hasattr(trl_utils, "_use_triton"), "TRL moved _use_triton: see add_fused_lm_head"
    trl_utils._use_triton = _always


def _always(device: object) -> bool:
    return True


# Names under which configs scale their logits; TRL's head knows them all.
LOGIT_SCALES = ("logit_scale", "output_multiplier", "lm_head_multiplier", "logits_scaling")


def use_linear_cross_entropy(trainer: Any) -> bool:
    """Give the model of an `SFTTrainer` a head and loss that are computed chunk by chunk; returns whether it took.

    TRL's fused head computes all logits in tiles of 4,096 tokens by 32,768 of the vocabulary, once for the loss and
    once more for the gradients, which it multiplies in fp32. `compute_loss` asks it for tensors by token but uses
    their sums only, for the loss and for two metrics: so sums are what it gets, and all that TRL makes of them
    (normalising, accumulation, processes, metrics) stays. Left to TRL are a loss that is no sum of log-probabilities
    (`dft`), a head with a bias, scaled logits, mixtures of experts, and DeepSpeed, which shards the head's weight.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    model = model.get_base_model() if hasattr(model, "peft_config") else model
    config = model.config.get_text_config()
    left_to_trl = (
        trainer.args.loss_type != "nll"
        or trainer.aux_loss_enabled
        or getattr(model.get_output_embeddings(), "bias", None) is not None
        or any(getattr(config, name, None) is not None for name in LOGIT_SCALES)
        or trainer.is_deepspeed_enabled
    )
    if left_to_trl:
        return False
    trl_forward = model.forward
    assert "fused_lm_head" in trl_forward.__code__.co_varnames, "TRL changed add_fused_lm_head: see its compute_loss"

    @functools.wraps(trl_forward)
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, labels: Any = None, **kwargs: Any) -> Any:
        if not fused_lm_head or labels is None:
            given = kwargs if labels is None else {**kwargs, "labels": labels}
            return trl_forward(*args, fused_lm_head=fused_lm_head, **given)
        kwargs.pop("num_items_in_batch", None)
        hidden_states = self.base_model(*args, **{**kwargs, "use_cache": False}).last_hidden_state
        return _summed_output(
            hidden_states, self.get_output_embeddings(), labels, getattr(config, "final_logit_softcapping", None)
        )

    model.forward = types.MethodType(forward, model)
    return True


def _summed_output(hidden_states: torch.Tensor, lm_head: Any, labels: torch.Tensor, softcap: float | None) -> Any:
    """TRL's output with sums over the positions that have a label, (batch, tokens), in place of tensors by token."""
    weight = lm_head.weight
    if hasattr(weight, "full_tensor"):  # FSDP2's slice
        weight = weight.full_tensor()
    targets = labels[:, 1:].to(hidden_states.device)
    mask = targets != IGNORED
    statistics = LossStatistics()
    loss = linear_cross_entropy(
        hidden_states[:, :-1][mask], weight, targets[mask], softcap=softcap, statistics=statistics
    )
    return trl_utils.FusedCausalLMOutput(
        log_probs=-loss,
        entropy=torch.as_tensor(statistics.entropy, device=loss.device),
        is_top1=torch.as_tensor(statistics.correct, device=loss.device),
        label_mask=mask,
    )


def let_head_have_no_bias(model: Any) -> None:
    """TRL's fused head reads the `bias` of the output head, which PEFT's wrapper for trained token rows does not have.

    Its `weight` is right: the base's with the trained rows in their places.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None


def unpaired_collator(
    pad_token_id: int,
    pad_to_multiple_of: int | None,
    pair_up: Callable[[list[list[int]]], list[int]] | None,
) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """TRL's collator of labelled answers, pairing each prompt with another's answer when the batch is made.

    Args:
        pad_token_id (`int`): Fills.
        pad_to_multiple_of (`int`, *optional*): To what multiple.
        pair_up (`Callable`, *optional*): Prompts of a batch -> the row whose answer each gets for the KL term; `None`
            for losses without one.
    """
    from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

    collate = DataCollatorForUnpairedPreference(pad_token_id=pad_token_id, pad_to_multiple_of=pad_to_multiple_of)

    def pair_and_collate(examples: list[dict[str, Any]]) -> dict[str, Any]:
        if pair_up is not None:
            others = pair_up([example["prompt_ids"] for example in examples])
            examples = [
                {**example, "KL_completion_ids": examples[other]["completion_ids"]}
                for example, other in zip(examples, others, strict=True)
            ]
        return collate(examples)

    return pair_and_collate
