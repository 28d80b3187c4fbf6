"""How much computation training takes: FLOPs a token, the compute-optimal budget, and hours."""

from typing import Any

TOKENS_A_PARAMETER = 20  # Chinchilla, https://arxiv.org/abs/2203.15556, table 3: 1.4T tokens for 67B parameters


def attention_flops(config: Any, sequence_length: int) -> int:
    """FLOPs a token of attention's two products, forward and backward: 12 x width of the heads x tokens looked at.

    As in PaLM (https://arxiv.org/abs/2204.02311, appendix B) the causal half is not taken off; a sliding layer looks
    at its window only.
    """
    looked_at = sum(
        min(sequence_length, config.sliding_window) if kind == "sliding_attention" else sequence_length
        for kind in config.layer_types
    )
    return 12 * config.num_attention_heads * config.head_dim * looked_at


def training_flops(config: Any, linear: int, sequence_length: int) -> int:
    """FLOPs a token of training: 6 for each weight that is multiplied, plus attention (PaLM, appendix B).

    Two for the forward pass (multiply, add) and four for the backward pass. Counted are the weights of linear layers
    with the output head; looking an embedding up costs nothing. What checkpointing computes again is not counted, so
    that a utilisation (MFU) means the same with it and without.

    Args:
        config: The model's.
        linear (`int`): Weights of all linear layers, as `ModelSize.linear`.
        sequence_length (`int`): Tokens in a sequence.
    """
    return 6 * linear + attention_flops(config, sequence_length)


def compute_optimal_tokens(parameters: int) -> int:
    """Tokens to train on so that a given compute gives the lowest loss: 20 a parameter."""
    return TOKENS_A_PARAMETER * parameters


def training_hours(flops: float, devices: int, peak_flops: float, utilisation: float) -> float:
    """Hours that `devices` of `peak_flops` FLOPs a second need for `flops` at a model FLOPs utilisation of 0 to 1."""
    return flops / (devices * peak_flops * utilisation) / 3600
