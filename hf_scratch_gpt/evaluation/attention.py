"""Where each head of a model looks: the attention weights of one sentence."""

from typing import Any

from hf_scratch_gpt.evaluation.mode import context_length_of, measuring
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_text


def attention_map(model: Any, tokenizer: Any, text: str, longest: int = 48) -> dict[str, Any]:
    """Attention weights of `text` in every layer and head.

    Args:
        model: A causal language model, loaded with `attn_implementation="eager"` (others do not keep the weights).
        tokenizer: Its tokenizer.
        text (`str`): Read as plain text.
        longest (`int`, *optional*, defaults to `48`): Tokens after this many are left out.

    Returns:
        `dict`: `tokens` (T strings), `layers` and `heads` (counts), and `weights`, layers x heads x T x T, rounded to
        four digits; row i holds what token i attends to and sums to 1.

    Raises:
        ValueError: if the text is empty or the model returns no weights.
    """
    import torch

    token_ids = encode_text(tokenizer, text)[: min(longest, context_length_of(model) or longest)]
    if not token_ids:
        raise ValueError("the text for the attention map is empty")
    with measuring(model):
        inputs = torch.tensor([token_ids], device=model.device)
        attentions = model(input_ids=inputs, output_attentions=True, use_cache=False).attentions
    if not attentions or attentions[0] is None:
        raise ValueError("the model returns no attention weights; load it with attn_implementation='eager'")
    weights = [[[[round(w, 4) for w in row] for row in head] for head in layer[0].tolist()] for layer in attentions]
    tokens = [tokenizer.decode([token], clean_up_tokenization_spaces=False) for token in token_ids]
    return {
        "text": text,
        "tokens": tokens,
        "layers": len(weights),
        "heads": len(weights[0]),
        "weights": weights,
    }
