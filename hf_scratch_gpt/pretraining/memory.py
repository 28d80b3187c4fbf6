"""How much memory training and inference take, counted from a model's config: pure sums, nothing is allocated.

What autograd keeps for the backward pass is counted layer by layer, tensor by tensor, as our model's code makes it
(the method of https://arxiv.org/abs/2205.05198, section 4, for our layers and kernels); a test compares it with what
autograd really saves, byte for byte. A step's memory is then followed over its moments, and the largest is the peak.

Training is that of `scratch-gpt pretrain`: weights, gradients and optimizer states in fp32, the model in fp32 or under
bf16 autocast, uncompiled. `torch.compile` keeps less, so the figures bound it from above. All figures are bytes.
Not counted are two options that are off by default: `ema_decay`, another fp32 copy of the weights (and one more while
it is measured), and `packing: best_fit`, a few bytes a document.
"""

import dataclasses
import functools
from collections import Counter
from typing import Any, Literal

from hf_scratch_gpt.model.blocked_attention import weights_kept
from hf_scratch_gpt.model.linear_cross_entropy import chunk_rows

SHARDINGS = ("none", "gradients", "full")
_FP32, _BF16, _INT64 = 4, 2, 8


@dataclasses.dataclass(frozen=True)
class ModelSize:
    """What memory and compute depend on beside the config's widths.

    Args:
        parameters (`int`): All parameters, a tied embedding once.
        hidden (`dict[tuple[int, int], int]`): Shapes of the hidden matrices (those that Muon takes) and their number.
        linear (`int`): Weights of all linear layers, the output head included, also where it is tied.
        head (`int`): Weights of the output head.
        layer (`int`): Parameters of the largest decoder layer.
    """

    parameters: int
    hidden: dict[tuple[int, int], int]
    linear: int
    head: int
    layer: int


def measure_model(config: Any) -> ModelSize:
    """Build the model of `config` on the meta device, where it takes no memory, and count its parameters."""
    import torch

    from hf_scratch_gpt.model import ScratchGPTForCausalLM
    from hf_scratch_gpt.pretraining.optimizers import split_parameters

    with torch.device("meta"):
        model = ScratchGPTForCausalLM(config)
    hidden, _, _ = split_parameters(model)
    linear = sum(module.weight.numel() for module in model.modules() if isinstance(module, torch.nn.Linear))
    return ModelSize(
        parameters=model.num_parameters(),
        hidden=dict(Counter(tuple(matrix.shape) for matrix in hidden)),
        linear=linear,
        head=model.lm_head.weight.numel(),
        layer=max(sum(parameter.numel() for parameter in layer.parameters()) for layer in model.model.layers),
    )


@dataclasses.dataclass(frozen=True)
class TrainingSetup:
    """How a model is trained on each device.

    Args:
        micro_batch (`int`): Sequences in one forward pass of one device.
        sequence_length (`int`): Tokens in each.
        bf16 (`bool`, *optional*, defaults to `True`): Under bf16 autocast, or all in fp32.
        optimizer (`"adamw"` or `"muon"`, *optional*, defaults to `"adamw"`): As `scratch-gpt pretrain` takes them.
        checkpointing (`bool`, *optional*, defaults to `False`): Keep only each layer's input, compute the rest anew.
        accumulates (`bool`, *optional*, defaults to `False`): Several forward passes in an optimizer step.
        packed (`bool`, *optional*, defaults to `False`): Documents that share a sequence are kept apart by a mask.
        device (`"cuda"` or `"cpu"`, *optional*, defaults to `"cuda"`): Dropout masks and kernels differ.
        gpus (`int`, *optional*, defaults to `1`): Devices that the model is trained on.
        sharding (`str`, *optional*, defaults to `"none"`): What is spread over them: nothing (DDP); gradients and
            optimizer states (ZeRO-2, FSDP without resharding after the forward pass); `"full"`: weights too (ZeRO-3).
        saves (`bool`, *optional*, defaults to `False`): Checkpoints are written while training goes on, from a
            snapshot in the host's memory, which on a CPU is the memory that training has.
    """

    micro_batch: int
    sequence_length: int
    bf16: bool = True
    optimizer: Literal["adamw", "muon"] = "adamw"
    checkpointing: bool = False
    accumulates: bool = False
    packed: bool = False
    device: Literal["cuda", "cpu"] = "cuda"
    gpus: int = 1
    sharding: str = "none"
    saves: bool = False

    @property
    def tokens(self) -> int:
        """Tokens in a forward pass of one device."""
        return self.micro_batch * self.sequence_length

    @property
    def compute_bytes(self) -> int:
        """Bytes of a number that a linear layer puts out."""
        return _BF16 if self.bf16 else _FP32


@functools.lru_cache
def tensors_kept_by_activation(name: str) -> int:
    """How many tensors of its input's size autograd keeps from an activation to the end of the product it enters.

    Autograd itself is asked, on eight numbers: 2 for SiLU (input, output), 5 for GPT-2's GELU in elementary steps.
    """
    import torch
    from transformers.activations import ACT2FN

    kept = set()

    def note(tensor: Any) -> Any:
        if tensor.numel() == 8:
            kept.add(tensor.untyped_storage().data_ptr())
            alive.append(tensor)
        return tensor

    alive: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        inputs = torch.linspace(-1, 1, 8, requires_grad=True) + 0.0
        _ = ACT2FN[name](inputs) * torch.ones(8, requires_grad=True)
    return len(kept) - 1  # less the ones


def _norm_bytes(config: Any, width: int, input_bytes: int = _FP32) -> int:
    """Kept by a norm for each vector of `width`: its input, its statistics, and for RMSNorm the normed input."""
    if config.norm_type == "layer_norm":
        return input_bytes * width + 2 * _FP32
    return _FP32 * width + _FP32 + input_bytes * width


def _attention_bytes(config: Any, setup: TrainingSetup, masked: bool) -> int:
    """Kept by attention for each token, from the projections' outputs to the output projection's input."""
    size, heads, kv_heads = setup.compute_bytes, config.num_attention_heads, config.num_key_value_heads
    width, length = heads * config.head_dim, setup.sequence_length
    kept = (heads + kv_heads) * _norm_bytes(config, config.head_dim, size) if config.use_qk_norm else 0
    if setup.device == "cpu" and config.attention_dropout:
        # There is no fused kernel with dropout: query, key, value, then weights, dropout mask and dropped weights.
        return kept + _FP32 * (3 * width + 3 * heads * length) + size * width
    if setup.device == "cpu":  # in blocks: keys and values repeated for all heads, and the attention weights
        return kept + size * (4 * width + heads * weights_kept(length) // length)
    keys = width if masked else kv_heads * config.head_dim  # a mask needs keys and values repeated for all heads
    mask = size * length if masked else 0  # one a layer: the kernel takes it as numbers
    return kept + size * (2 * width + 2 * keys) + _FP32 * heads + mask


def layer_bytes(config: Any, layer_type: str, setup: TrainingSetup) -> int:
    """Kept for the backward pass of one decoder layer, without copies of weights."""
    size, width = setup.compute_bytes, config.hidden_size
    slides = layer_type == "sliding_attention" and config.sliding_window < setup.sequence_length
    gated = config.mlp_type == "swiglu"
    kept = 2 * _norm_bytes(config, width)
    # The input of each linear layer: one tensor in fp32, under autocast a copy for each that reads it.
    kept += size * width * ((3 + 1 + gated) if setup.bf16 else 2)
    kept += _attention_bytes(config, setup, slides or setup.packed)
    kept += size * config.intermediate_size * (tensors_kept_by_activation(config.hidden_act) + 2 * gated)
    if config.hidden_dropout:
        kept += 2 * width * (size if setup.device == "cpu" else 1)
    return kept * setup.tokens


def embedding_bytes(config: Any, setup: TrainingSetup) -> int:
    """Kept of the ids, the positions and the embedding's dropout."""
    rows = setup.tokens if setup.packed else setup.sequence_length
    kept = _INT64 * setup.tokens
    kept += rows * (_INT64 if config.position_embedding_type == "learned" else 2 * _FP32 * config.head_dim)
    if config.hidden_dropout:
        kept += config.hidden_size * setup.tokens * (_FP32 if setup.device == "cpu" else 1)
    return kept


def head_bytes(config: Any, head: int, setup: TrainingSetup) -> int:
    """Kept of the final norm, and of head and loss only the gradients of their input and of the head's weights."""
    norm = _norm_bytes(config, config.hidden_size) if config.norm_position == "pre" else 0
    return (norm + _FP32 * config.hidden_size) * setup.tokens + _FP32 * head


def _chunk_bytes(config: Any, head: int, setup: TrainingSetup) -> int:
    """Beside what is kept, while the loss of a chunk is computed: logits, log-probabilities, and copies in bf16."""
    rows = min(setup.tokens, chunk_rows(setup.tokens, config.vocab_size))
    softcap = _FP32 if config.final_logit_softcapping is not None else 0
    logits = rows * config.vocab_size * (2 * _FP32 + softcap)
    states = config.hidden_size * setup.tokens * (_FP32 + 2 * setup.compute_bytes)
    return logits + states + head * (2 * setup.compute_bytes if setup.bf16 else setup.compute_bytes)


def weight_copy_bytes(weights: int, setup: TrainingSetup) -> int:
    """The bf16 copies of linear layers' weights that autocast makes, and autograd keeps; FSDP gathers bf16 instead."""
    return _BF16 * weights if setup.bf16 and setup.sharding == "none" else 0


def saved_bytes(config: Any, size: ModelSize, setup: TrainingSetup) -> int:
    """All that autograd keeps at the end of the forward pass, parameters aside."""
    layers = _kept_of_layers(config, setup)
    copies = weight_copy_bytes(0 if setup.checkpointing else size.linear - size.head, setup)
    return embedding_bytes(config, setup) + layers + head_bytes(config, size.head, setup) + copies


def _kept_of_layers(config: Any, setup: TrainingSetup) -> int:
    if setup.checkpointing:
        return _FP32 * config.hidden_size * setup.tokens * config.num_hidden_layers
    return sum(layer_bytes(config, kind, setup) * count for kind, count in Counter(config.layer_types).items())


@dataclasses.dataclass(frozen=True)
class Moment:
    """Bytes that one device holds at one moment of an optimizer step, by what they are.

    Args:
        name (`str`): `loss`, `head`, `first layer`, `last layer`, `embedding` or `step`: the loss with its gradients,
            where the backward pass is, or the optimizer.
        weights (`int`): With what sharding gathers.
        gradients (`int`): With the buckets of DDP.
        optimizer (`int`): States, and what the step itself needs for a moment.
        activations (`int`): What autograd keeps, autocast's copies of weights, and the layer in work.
        logits (`int`): A chunk's logits and log-probabilities, and the head's copies while the loss is computed.
        snapshot (`int`, *optional*, defaults to `0`): What a checkpoint is written from, if it lies in this memory.
    """

    name: str
    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    snapshot: int = 0

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.logits + self.snapshot


def optimizer_state_bytes(size: ModelSize, optimizer: str) -> int:
    """AdamW keeps two numbers a parameter; Muon one for each of its matrices, with AdamW for the rest."""
    hidden = _hidden(size) if optimizer == "muon" else 0
    return _FP32 * (2 * (size.parameters - hidden) + hidden)


def snapshot_bytes(size: ModelSize, optimizer: str) -> int:
    """Host memory of the main process that `pretrain` copies each checkpoint into: whole weights and states, fp32.

    It is taken at the first checkpoint and kept, so that training need not wait for the disk (see `snapshot`).
    """
    return _FP32 * size.parameters + optimizer_state_bytes(size, optimizer)


def _hidden(size: ModelSize) -> int:
    return sum(rows * columns * count for (rows, columns), count in size.hidden.items())


def step_bytes(size: ModelSize, optimizer: str) -> int:
    """What an optimizer's step needs beside states and gradients: nothing for fused AdamW.

    Muon: the updates of all matrices in fp32 and, for the matrices of one shape (or its transpose) at a time, their
    stack in fp32, two of it in bf16, and two Gram matrices.
    """
    if optimizer != "muon":
        return 0
    stacks: Counter[tuple[int, int]] = Counter()
    for (rows, columns), count in size.hidden.items():
        stacks[min(rows, columns), max(rows, columns)] += count
    largest = max(
        (count * ((_FP32 + 2 * _BF16) * short * long + 2 * _BF16 * short**2))
        for (short, long), count in stacks.items()
    )
    return _FP32 * _hidden(size) + largest


def training_moments(config: Any, size: ModelSize, setup: TrainingSetup) -> list[Moment]:
    """The moments of an optimizer step, from the second on, at which memory can be at its peak.

    In the backward pass activations are freed at the pace at which gradients come, so that only its ends matter.
    """
    weights, gathered_gradients, share = _sharded(size, setup)
    states = optimizer_state_bytes(size, setup.optimizer) // share
    snapshot = snapshot_bytes(size, setup.optimizer) if setup.saves and setup.device == "cpu" else 0
    layers, embedding = _kept_of_layers(config, setup), embedding_bytes(config, setup)
    in_head = layers + head_bytes(config, size.head, setup)
    layer_copy = weight_copy_bytes(size.layer, setup)
    one = max(layer_bytes(config, kind, setup) for kind in set(config.layer_types)) + layer_copy
    # A layer's own backward pass: gradients of the MLP's inner values (2 more than it frees) and of the residuals.
    work = (2 * setup.compute_bytes * config.intermediate_size + 2 * _FP32 * config.hidden_size) * setup.tokens
    again = one if setup.checkpointing else 0
    # Autocast itself holds the copies until the loss is there; then only autograd does, for what it keeps.
    all_copies = weight_copy_bytes(size.linear - size.head, setup)
    copies = 0 if setup.checkpointing else all_copies

    def moment(name: str, done: int, flying: int, activations: int, logits: int = 0, step: int = 0) -> Moment:
        """With the weights whose gradients are done, and those whose new ones wait to be added to others."""
        held = (size.parameters if setup.accumulates else done) + (flying if share == 1 else 0)
        gradients = _FP32 * held // share + gathered_gradients
        return Moment(name, weights, gradients, states + step, embedding + activations, logits, snapshot)

    tied = config.tie_word_embeddings
    waiting = size.head if tied else 0  # a tied head's gradient waits for the embedding's, as large again
    lookup = size.head if not tied and setup.accumulates else waiting
    return [
        moment("loss", 0, 0, in_head + all_copies, _chunk_bytes(config, size.head, setup)),
        # The head's gradient is scaled into a new tensor.
        moment("head", 0, size.head, in_head + copies),
        moment("first layer", size.head - waiting, waiting, layers + copies + work + again),
        moment("last layer", size.parameters - size.layer - size.head, waiting, one + work),
        moment("embedding", size.parameters, lookup, 0),
        moment("step", size.parameters, 0, 0, step=step_bytes(size, setup.optimizer) // share),
    ]


def _sharded(size: ModelSize, setup: TrainingSetup) -> tuple[int, int, int]:
    """Bytes of weights, of gradients that are whole for a while, and over how many devices the rest is spread."""
    everything = _FP32 * size.parameters
    if setup.sharding == "none":
        # DDP's buckets hold the gradients a second time (gradient_as_bucket_view is off by default).
        return everything, everything if setup.gpus > 1 else 0, 1
    # Outside of the layers stand embedding, head and norm; FSDP gathers them, and a layer ahead of the one in work.
    outside = size.parameters - sum(rows * columns * count for (rows, columns), count in size.hidden.items())
    largest = max(size.layer, outside)
    gathered = size.parameters if setup.sharding == "gradients" else outside + 2 * size.layer
    whole = setup.compute_bytes * gathered
    return everything // setup.gpus + whole, (setup.compute_bytes + _FP32) * largest, setup.gpus


def peak(config: Any, size: ModelSize, setup: TrainingSetup) -> Moment:
    """The moment of a step at which one device holds most."""
    return max(training_moments(config, size, setup), key=lambda moment: moment.total)


def cache_bytes(config: Any, batch: int, length: int, bytes_per_number: int = _BF16) -> int:
    """Keys and values of `batch` sequences of `length` tokens; a sliding layer keeps its window only."""
    tokens = sum(
        min(length, config.sliding_window) if kind == "sliding_attention" else length for kind in config.layer_types
    )
    return 2 * bytes_per_number * config.num_key_value_heads * config.head_dim * tokens * batch
