"""The models of a scaling ladder: how each size gets its shape, its learning rates and its tokens from one recipe.

Only the width changes: depth, heads and the ratios of the recipe's model stay. Within a wide range a model's loss
depends on its size and hardly on its shape (Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, section 3.1), and
rules that carry a learning rate from one size to another are derived for width:

- Muon's rate stays: an orthogonalised update of an m x n matrix times sqrt(max(1, m / n)) changes every width's
  activations alike (Yang, Simon and Bernstein 2023, https://arxiv.org/abs/2310.17813).
- AdamW's rate for hidden matrices goes as 1 / width (muP: Yang et al. 2022, https://arxiv.org/abs/2203.03466, table
  3).
- Where AdamW trains only embedding, head and norms beside Muon, its rate goes as 1 / sqrt(width): muP wants an
  embedding's rate to stay and a head's to go as 1 / width, and of a tied matrix, which is both, the geometric mean is
  taken. nanochat scales by the same root (https://github.com/karpathy/nanochat).

A ladder bends where its small models are trained worse than its large ones: by too long a warm-up, or by a batch and
rates that suit the largest (Porian et al. 2024, https://arxiv.org/abs/2406.19146). The recipe is taken to be right for
the check run, and the smaller models' runs are its shrunken image:

- The batch goes as tokens^0.571 (Step Law, https://arxiv.org/abs/2503.04715), as in `hf_scratch_gpt.pretraining.dial`:
  with one batch for all, the smallest models took a hundred steps where the largest took thousands.
- Muon's rate goes with the batch as there. AdamW's does not: at a third of its batch, half of the rate that its
  width's rule gives was 1.4% worse (width 32, a million tokens).
- Warm-up takes the same share of the steps, and a tenth of them at most.
"""

import dataclasses
import functools
import json
import math
import re
from typing import Any

from hf_scratch_gpt.pretraining.arguments import PretrainArguments, parse_overrides
from hf_scratch_gpt.pretraining.dial import batch_tokens, muon_learning_rate

# Widths are multiples of it. With heads of 6, models 24 wide lay 3% above the line through those 16, 32, 48 and 64
# wide; with heads of 12 they are within the spread of two seeds.
WIDTH_STEP = 8
_MLP_STEP = 8
COUNTS = ("non-embedding", "total")
_MOST_WARMUP = 0.1  # share of a run's steps
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9}


@dataclasses.dataclass(frozen=True)
class Rung:
    """A size of the ladder.

    Args:
        width (`int`): `hidden_size`.
        parameters (`int`): All parameters.
        embedding (`int`): Those of the token embedding, an untied head and learned positions.
    """

    width: int
    parameters: int
    embedding: int

    def size(self, count: str) -> int:
        """Parameters as the law counts them: `"non-embedding"` or `"total"`."""
        return self.parameters - self.embedding if count == "non-embedding" else self.parameters


def parse_size(text: str) -> float:
    """A number of parameters: `250000`, `250k`, `1.5M`.

    Raises:
        ValueError: for another text.
    """
    match = re.fullmatch(r"(\d+\.?\d*)([kmb]?)", text.strip().lower())
    if match is None or not float(match[1]):
        raise ValueError(f"--sizes: '{text}' is not a number of parameters such as 250000, 250k or 1.5M")
    return float(match[1]) * _UNITS[match[2]]


def short_size(size: float) -> str:
    """`110k`, `1.77M`: three figures."""
    for unit in ("b", "m", "k"):
        if size >= 0.9995 * _UNITS[unit]:
            return f"{float(f'{size / _UNITS[unit]:.3g}'):g}{unit.upper() if unit != 'k' else unit}"
    return f"{size:.0f}"


class LadderShapes:
    """The shapes that a recipe's model has at other widths.

    Args:
        arguments (`PretrainArguments`): The recipe.
        dataset: Its prepared folder.
        count (`str`): How the law counts parameters: one of `COUNTS`.
    """

    def __init__(self, arguments: PretrainArguments, dataset: Any, count: str):
        from hf_scratch_gpt.pretraining.setup import make_config

        self.arguments, self.dataset, self.count = arguments, dataset, count
        self.config = make_config(arguments, dataset)

    def overrides(self, width: int) -> dict[str, Any]:
        """The recipe's `model_overrides` with those that make its model `width` wide."""
        config, ratio = self.config, width / self.config.hidden_size
        shape = {
            "hidden_size": width,
            "intermediate_size": _multiple(config.intermediate_size * ratio, _MLP_STEP),
            "num_attention_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "head_dim": _multiple(config.head_dim * ratio, 2),
        }
        return {**parse_overrides(self.arguments.model_overrides), **shape}

    @functools.lru_cache  # noqa: B019 - one object a command, and a model's parameters are slow to count
    def rung(self, width: int) -> Rung:
        """The model of that width, counted on the meta device."""
        from hf_scratch_gpt.pretraining.memory import measure_model
        from hf_scratch_gpt.pretraining.setup import make_config

        arguments = dataclasses.replace(self.arguments, model_overrides=self.overrides(width))
        config = make_config(arguments, self.dataset)
        embedding = config.vocab_size * width * (1 if config.tie_word_embeddings else 2)
        if config.position_embedding_type == "learned":
            embedding += config.max_position_embeddings * width
        return Rung(width, measure_model(config).parameters, embedding)

    @property
    def recipe_rung(self) -> Rung:
        """The recipe's own model."""
        return self.rung(self.config.hidden_size)

    def nearest(self, size: float) -> Rung:
        """The rung whose count is nearest to `size`, in logarithms."""
        low = high = WIDTH_STEP
        while self.rung(high).size(self.count) < size:
            low, high = high, 2 * high
        while high - low > WIDTH_STEP:
            middle = (low + high) // (2 * WIDTH_STEP) * WIDTH_STEP
            if self.rung(middle).size(self.count) < size:
                low = middle
            else:
                high = middle
        return min((self.rung(low), self.rung(high)), key=lambda rung: abs(math.log(rung.size(self.count) / size)))

    def settings(
        self, rung: Rung, tokens: float, seed: int, output_dir: str, most_tokens: float | None = None
    ) -> PretrainArguments:
        """The recipe for `rung`, trained on about `tokens` tokens (whole optimizer steps).

        All are measured on the same documents: those that the recipe's own seed draws.

        Args:
            rung (`Rung`): The model.
            tokens (`float`): What it is trained on.
            seed (`int`): Of its weights and its data's order.
            output_dir (`str`): Its run folder.
            most_tokens (`float`, *optional*): Tokens of the run that the recipe's batch and rates are meant for;
                `tokens` if not given.
        """
        arguments, most = self.arguments, most_tokens or tokens
        batch_size, parts = scaled_batch(arguments, tokens / most if most else 1.0)
        steps = steps_of(batch_size * arguments.context_length, tokens)
        whole = steps_of(arguments.batch_size * arguments.context_length, most)
        return dataclasses.replace(
            arguments,
            batch_size=batch_size,
            gradient_accumulation_steps=parts,
            learning_rate=scaled_learning_rate(arguments, rung.width / self.config.hidden_size),
            muon_learning_rate=scaled_muon_learning_rate(arguments, batch_size),
            model_overrides=json.loads(json.dumps(self.overrides(rung.width))),
            max_steps=steps,
            max_minutes=0.0,
            tokens="",
            warmup_steps=int(min(_MOST_WARMUP, arguments.warmup_steps / whole) * steps),
            evaluation_seed=evaluation_seed(arguments),
            evaluation_steps=0,
            sample_prompts=None,
            seed=seed,
            output_dir=output_dir,
        )


def evaluation_seed(arguments: PretrainArguments) -> int:
    """The seed that draws the held-out documents of a recipe."""
    return arguments.seed if arguments.evaluation_seed is None else arguments.evaluation_seed


def _multiple(number: float, step: int) -> int:
    return max(1, round(number / step)) * step


def steps_of(batch: int, tokens: float) -> int:
    """Optimizer steps of `batch` tokens nearest to `tokens` tokens; at least one."""
    return max(1, round(tokens / batch))


def scaled_batch(arguments: PretrainArguments, share: float) -> tuple[int, int]:
    """A recipe's batch for a run of so small a share of the tokens: its windows, and the parts it is split in."""
    at_once = -(-arguments.batch_size // arguments.gradient_accumulation_steps)
    windows = max(1, round(arguments.batch_size * batch_tokens(share) / batch_tokens(1.0)))
    parts = -(-windows // at_once)
    return -(-windows // parts) * parts, parts


def scaled_learning_rate(arguments: PretrainArguments, ratio: float) -> float:
    """AdamW's rate of a recipe for a model `ratio` times as wide; see the head of this file for the rules."""
    power = 1.0 if arguments.optimizer == "adamw" else 0.5
    return float(f"{arguments.learning_rate * ratio**-power:.6g}")


def scaled_muon_learning_rate(arguments: PretrainArguments, batch_size: int) -> float:
    """Muon's rate of a recipe for another batch, in windows."""
    own, other = (muon_learning_rate(size * arguments.context_length) for size in (arguments.batch_size, batch_size))
    return float(f"{arguments.muon_learning_rate * other / own:.6g}")
