"""What we touch inside TRL: here and nowhere else, so that an upgrade has one place to break."""

from typing import Any

import trl.trainer.utils as trl_utils


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


def let_head_have_no_bias(model: Any) -> None:
    """TRL's fused head reads the `bias` of the output head, which PEFT's wrapper for trained token rows does not have.

    Its `weight` is right: the base's with the trained rows in their places.
    """
    head = model.get_output_embeddings()
    if not hasattr(head, "bias"):
        head.bias = None
