"""One dial: `scratch-gpt pretrain --preset modern-30m --tokens auto` chooses the rest of a run from the model's size.

The size is a preset, or any other `modern-<number>m` (or `b`), which gets a shape by the rule below. What a recipe or
the command line states is taken as it is; the rest follows, in this order, N being parameters and D tokens:

- shape of a size that is no preset: width about 32 x depth, as the presets below a billion (SmolLM2's shapes,
  https://arxiv.org/abs/2502.02737), heads of 64, of which two share their keys and values.
- tokens: 20 a parameter (Chinchilla, https://arxiv.org/abs/2203.15556), but no more than four passes over the text:
  more passes are worth less and less than new text (https://arxiv.org/abs/2305.16264).
- batch: 0.58 x D^0.571 tokens, the Step Law (https://arxiv.org/abs/2503.04715, 3,700 models; N hardly matters), as a
  power of two of windows, in parts whose logits take a gigabyte at most.
- AdamW's rate, optimizer `adamw`: 1.79 x N^-0.713 x D^0.307, N without embeddings, the Step Law as well.
- AdamW's rate beside Muon: 8e-3 x sqrt(256 / width), the root that `hf_scratch_gpt.pretraining.ladder` explains, from
  the rate that was tuned at width 256.
- Muon's rate: 0.02 whatever the width (https://arxiv.org/abs/2310.17813), as published for large batches
  (https://kellerjordan.github.io/posts/muon/); a smaller batch than 16,384 tokens has a noisier gradient, and the rate
  goes with its root, as was tuned at 4,096 tokens: 0.01.
- warm-up: 2% of the steps, 10 to 2,000.
"""

import dataclasses
import math
import re
from typing import Any

from hf_scratch_gpt.pretraining.arguments import PretrainArguments, parse_overrides
from hf_scratch_gpt.pretraining.compute import compute_optimal_tokens
from hf_scratch_gpt.runs import given_settings

_MOST_EPOCHS = 4
_TUNED_WIDTH, _TUNED_LEARNING_RATE = 256, 8e-3
_MUON_LEARNING_RATE, _MUON_FULL_BATCH = 0.02, 16_384
_MOST_LOGITS_BYTES = 1 << 30
_HEAD, _ASPECT = 64, 32
_MOST_MISS = 0.2  # of a size
_SIZE = re.compile(r"modern-(\d+\.?\d*)([mb])")
_LEAST_SIZE = 1e6


def batch_tokens(tokens: float) -> float:
    """Tokens in an optimizer step for a run of `tokens` tokens (Step Law, https://arxiv.org/abs/2503.04715)."""
    return 0.58 * tokens**0.571


def adamw_learning_rate(parameters: float, tokens: float) -> float:
    """AdamW's rate for `parameters` non-embedding parameters and a run of `tokens` tokens (Step Law)."""
    return 1.79 * parameters**-0.713 * tokens**0.307


def rate_beside_muon(width: int) -> float:
    """AdamW's rate for embedding, head and norms of a model of that width where Muon trains the rest."""
    return _TUNED_LEARNING_RATE * math.sqrt(_TUNED_WIDTH / width)


def muon_learning_rate(batch: float) -> float:
    """Muon's rate for optimizer steps of `batch` tokens."""
    return _MUON_LEARNING_RATE * math.sqrt(min(1.0, batch / _MUON_FULL_BATCH))


def modern_shape(parameters: float, vocab_size: int) -> dict[str, int]:
    """Config fields of a modern model of about `parameters` parameters, the tied embedding of `vocab_size` included.

    Of the depths and widths (multiples of 128: heads of 64 in pairs) that come within 5% of the size, the one whose
    width over depth is nearest to 32; where none does, the one that comes nearest.

    Raises:
        ValueError: if that misses the size by more than a fifth: the embedding alone is too large.
    """

    def shape(depth: int, width: int) -> dict[str, int]:
        return {
            "hidden_size": width,
            "intermediate_size": -(-8 * width // 3 // 64) * 64,
            "num_hidden_layers": depth,
            "num_attention_heads": width // _HEAD,
            "num_key_value_heads": width // _HEAD // 2,
            "head_dim": _HEAD,
        }

    def count(fields: dict[str, int]) -> int:
        width, depth = fields["hidden_size"], fields["num_hidden_layers"]
        matrices = 3 * width * width + 3 * width * fields["intermediate_size"]  # q and o; k and v; gate, up and down
        return depth * (matrices + 2 * width + 2 * _HEAD) + width + vocab_size * width

    def distance(fields: dict[str, int]) -> tuple[float, float]:
        miss = abs(math.log(count(fields) / parameters))
        aspect = abs(math.log(fields["hidden_size"] / fields["num_hidden_layers"] / _ASPECT))
        return (0.0, aspect) if miss <= 0.05 else (miss, aspect)

    fields = min((shape(depth, width) for width in range(128, 16_385, 128) for depth in range(2, 129)), key=distance)
    if abs(count(fields) / parameters - 1) > _MOST_MISS:
        raise ValueError(
            f"'preset': no model of {parameters:,.0f} parameters has a vocabulary of {vocab_size:,}; the nearest has "
            f"{count(fields):,}"
        )
    return fields


def parse_tokens(text: str) -> int | None:
    """Tokens of the setting `tokens`, such as `2000000`, `2M` or `1.5b`; `None` for `auto`.

    Raises:
        ValueError: for another text.
    """
    match = re.fullmatch(r"(\d+\.?\d*)([kmb]?)", text.strip().lower())
    if text.strip().lower() == "auto":
        return None
    if match is None or not float(match[1]):
        raise ValueError(f"'tokens' is '{text}', expected auto or a number such as 2000000, 2M or 1.5B")
    return round(float(match[1]) * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9}[match[2]])


def _stated(arguments: PretrainArguments) -> frozenset[str]:
    """The settings that somebody has stated, be it with the default's value; in Python, those that differ from it."""
    return frozenset(given_settings(arguments)) if arguments.stated is None else arguments.stated


def with_chosen_settings(arguments: PretrainArguments) -> tuple[PretrainArguments, list[str]]:
    """Settings with `tokens` turned into `max_steps` and, where it is `auto`, all that was not stated chosen.

    They have no `tokens` any more: a run's recipe says what was chosen, and another version's rules cannot change it.

    Returns:
        The settings, and lines that say what was chosen and why.

    Raises:
        OSError, ValueError: if the prepared folder cannot be read, or the size is not to be had.
    """
    from hf_scratch_gpt.pretraining.setup import load_dataset

    tokens = parse_tokens(arguments.tokens)
    if tokens is not None:
        chosen = dataclasses.replace(arguments, tokens="")
        chosen.max_steps = _steps(chosen, tokens)
        return chosen, [f"{chosen.max_steps:,} steps: {tokens:,} tokens"]
    dataset = load_dataset(arguments.dataset_dir, arguments.context_length)
    return _choose(arguments, dataset)


def _steps(arguments: PretrainArguments, tokens: float) -> int:
    return max(1, round(tokens / (arguments.batch_size * arguments.context_length)))


def _choose(arguments: PretrainArguments, dataset: Any) -> tuple[PretrainArguments, list[str]]:
    from hf_scratch_gpt.pretraining.memory import measure_model
    from hf_scratch_gpt.pretraining.setup import make_config

    stated, lines = _stated(arguments), []
    chosen = dataclasses.replace(arguments, tokens="")

    def choose(name: str, value: Any, reason: str) -> None:
        if name in stated:
            reason = "as stated"
        else:
            setattr(chosen, name, value)
        lines.append(f"{name} {getattr(chosen, name):,}: {reason}")

    _choose_shape(chosen, dataset.manifest["vocab_size"], lines)
    config = make_config(chosen, dataset)
    parameters = measure_model(config).parameters
    width = config.hidden_size
    embedding = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
    text = dataset.manifest["splits"]["train"]["tokens"]
    wanted = compute_optimal_tokens(parameters)
    tokens = min(wanted, _MOST_EPOCHS * text)
    short = f", of the {wanted:,} that 20 a parameter would be" if tokens < wanted else ", 20 a parameter"
    lines.append(f"tokens {tokens:,}: {tokens / text:.1f} passes over the text{short}")
    batch_size, parts = _batch(batch_tokens(tokens), chosen.context_length, config.vocab_size)
    choose("batch_size", batch_size, f"{batch_tokens(tokens):,.0f} tokens a step, 0.58 x tokens^0.571")
    if "batch_size" not in stated:
        choose("gradient_accumulation_steps", parts, "parts whose logits take a gigabyte at most")
    choose("max_steps", _steps(chosen, tokens), "tokens over the batch")
    choose("warmup_steps", min(2000, max(10, chosen.max_steps // 50)), "2% of the steps")
    if chosen.optimizer == "adamw":
        rate = adamw_learning_rate(parameters - embedding, tokens)
        choose("learning_rate", _rounded(rate), "1.79 x N^-0.713 x tokens^0.307")
    else:
        choose("learning_rate", _rounded(rate_beside_muon(width)), "8e-3 x sqrt(256 / width), beside Muon")
        batch = chosen.batch_size * chosen.context_length
        choose("muon_learning_rate", _rounded(muon_learning_rate(batch)), "0.02 x sqrt(min(1, batch / 16,384))")
    return chosen, lines


def _choose_shape(chosen: PretrainArguments, vocab_size: int, lines: list[str]) -> None:
    """Replace a size that is no preset by a preset's maths with a shape; other names are left to their own error."""
    from hf_scratch_gpt.model.presets import PRESETS

    match = _SIZE.fullmatch(chosen.preset.lower())
    if chosen.preset in PRESETS or match is None:
        return
    size = float(match[1]) * (1e6 if match[2] == "m" else 1e9)
    if size < _LEAST_SIZE:
        raise ValueError(f"'preset' is '{chosen.preset}': a size that is no preset begins at modern-1m")
    overrides = parse_overrides(chosen.model_overrides)
    shape = modern_shape(size, overrides.get("vocab_size", vocab_size))
    lines.append(
        f"model {chosen.preset}: {shape['num_hidden_layers']} layers, width {shape['hidden_size']}, "
        f"{shape['num_attention_heads']} heads"
    )
    positions = {"max_position_embeddings": chosen.context_length}
    chosen.preset, chosen.model_overrides = "modern-30m", {**shape, **positions, **overrides}


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


def _batch(tokens: float, context_length: int, vocab_size: int) -> tuple[int, int]:
    """Windows in a step of about `tokens` tokens, and the parts that each process splits its share in.

    Both are powers of two, which whole machines' processes divide; the optimum is broad enough for that.
    """
    from hf_scratch_gpt.pretraining.distributed import launched_processes

    windows = 2 ** max(0, round(math.log2(tokens / context_length)))
    at_once = max(1, _MOST_LOGITS_BYTES // (4 * vocab_size * context_length))
    share = max(1, windows // launched_processes())
    return windows, 2 ** max(0, math.ceil(math.log2(share / at_once)))
