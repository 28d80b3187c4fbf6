"""The shapes that the benchmarks of pretraining compare, with equal parameters for the old and the modern maths."""

import dataclasses
from types import SimpleNamespace


@dataclasses.dataclass(frozen=True)
class Shape:
    """A decoder's size, from which every row builds its model.

    Args:
        num_hidden_layers, hidden_size, num_attention_heads, num_key_value_heads (`int`): As transformers names them;
            the old maths have as many key and value heads as query heads.
        vocab_size (`int`): Rows of the embedding, which is tied to the output head.
        context_length (`int`): Tokens of a window.
        rounding (`int`, *optional*, defaults to `64`): The gated MLP's width is a multiple of it.
        gated_size (`int`, *optional*, defaults to `0`): The gated MLP's width; 0 for that of equal parameters.
    """

    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    vocab_size: int
    context_length: int
    rounding: int = 64
    gated_size: int = 0

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def classic_parameters(self) -> int:
        """Parameters of nanoGPT's model: 12 matrices' worth a layer, learned positions, LayerNorms without bias."""
        width, layers = self.hidden_size, self.num_hidden_layers
        embeddings = (self.vocab_size + self.context_length) * width
        return 12 * layers * width**2 + (2 * layers + 1) * width + embeddings

    def modern_parameters(self, intermediate_size: int) -> int:
        """Parameters of Qwen3's model with a gated MLP of this width."""
        width, head = self.hidden_size, self.head_dim
        attention = 2 * width * head * (self.num_attention_heads + self.num_key_value_heads)
        layer = attention + 3 * width * intermediate_size + 2 * width + 2 * head
        return self.num_hidden_layers * layer + (self.vocab_size + 1) * width

    @property
    def intermediate_size(self) -> int:
        """Width of the gated MLP with which the modern maths have the parameters of the classic ones, rounded."""
        if self.gated_size:
            return self.gated_size
        sizes = range(self.rounding, 8 * self.hidden_size, self.rounding)
        return min(sizes, key=lambda size: abs(self.modern_parameters(size) - self.classic_parameters))

    @property
    def modern_fields(self) -> dict[str, int]:
        """The size as fields of a config of the modern maths, transformers' or ours."""
        names = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
        fields = {name: getattr(self, name) for name in names}
        return {**fields, "head_dim": self.head_dim, "intermediate_size": self.intermediate_size}

    @property
    def attention(self) -> SimpleNamespace:
        """What `training_flops` reads of a config; the same for all rows."""
        layers = ["full_attention"] * self.num_hidden_layers
        return SimpleNamespace(
            num_attention_heads=self.num_attention_heads, head_dim=self.head_dim, layer_types=layers
        )


@dataclasses.dataclass(frozen=True)
class Defaults:
    """How a shape is measured unless an option says otherwise; `steps` are those that count, after `warmup`.

    Time to loss has a batch of its own: within minutes a CPU takes too few steps of the larger one to learn.
    """

    batch_size: int
    accumulation: int
    steps: int
    warmup: int
    repeats: int
    timed_batch_size: int
    time_to_loss: float


SHAPES = {
    "tiny": Shape(2, 32, 2, 1, 512, 32, rounding=8),  # to try the commands
    "4m": Shape(4, 256, 4, 2, 4096, 256),
    "14m": Shape(6, 384, 6, 2, 8192, 256),
    "124m": Shape(12, 768, 12, 4, 50304, 1024),
}

# 14m: the batch of nanoGPT's config/train_shakespeare_char.py, whose model has this depth, width and context.
DEFAULTS = {
    "tiny": Defaults(4, 1, 3, 1, 1, 4, 0.0),
    "4m": Defaults(32, 1, 10, 2, 3, 32, 0.0),
    "14m": Defaults(64, 1, 6, 2, 3, 16, 150.0),
    "124m": Defaults(8, 2, 3, 1, 1, 8, 0.0),
}
