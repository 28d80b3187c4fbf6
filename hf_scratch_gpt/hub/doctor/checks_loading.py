"""Checks of what is written and read: weights, buffers, ties, initialisation."""

import copy
import math

import torch
from safetensors.torch import load_file

from hf_scratch_gpt.hub.doctor.outcome import Checks, Finding, Skipped, all_of, compare
from hf_scratch_gpt.hub.doctor.reload import fingerprints, is_tied
from hf_scratch_gpt.hub.doctor.subject import Subject

CHECKS = Checks()
# Projections into the residual stream of the architectures that claim to start them smaller, by 1 / sqrt(2 x layers).
# By the name of the config's class, which code derived from ours keeps under a model type of its own.
SCALED_PROJECTIONS = {"ScratchGPTConfig": ("o_proj.weight", "down_proj.weight"), "GPT2Config": ("c_proj.weight",)}


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")


@CHECKS.add(
    "checkpoint-complete",
    expected="every weight of the model is in the checkpoint, in its shape",
    remedy="save the whole model again; transformers draws missing weights at random",
)
def checkpoint_complete(subject: Subject) -> Finding:
    """Whether the weights' files hold all that the model needs, and nothing else."""
    missing = subject.missing
    return Finding(not missing, f"missing or misshapen: {_some(missing)}" if missing else "nothing is missing")


@CHECKS.add(
    "round-trip",
    expected="parameters, buffers and logits are the same after saving and, in a fresh process, loading",
    remedy="rebuild buffers that are not saved (RoPE's) in _init_weights: loading starts on the meta device",
)
def round_trip(subject: Subject) -> Finding:
    """Whether saving and loading in a fresh process gives back every parameter and buffer."""
    before, after = fingerprints(subject.model), subject.record["tensors"]
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    changed = sorted({*changed, *subject.lost_buffers})
    if changed:
        return Finding(False, f"changed by loading: {_some(changed)}")
    logits = load_file(subject.saved / "logits.safetensors")["logits"]
    same = compare(logits, subject.reference, subject.spread)
    where = "" if subject.fresh_process else " (in the same process)"
    return Finding(same.passed, f"{len(before)} tensors equal; {same.measured}{where}")


@CHECKS.add(
    "bf16",
    expected="loaded in bf16: finite logits, within 0.1 of the fp32 logits' spread (root mean square)",
    remedy="keep norms and softmax in fp32 inside, and cast back; make new tensors in the input's dtype",
)
def bf16(subject: Subject) -> Finding:
    """Whether the model loads in bf16 and computes logits close to its own in fp32."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        subject.saved / "model", dtype=torch.bfloat16, trust_remote_code=subject.trust_remote_code
    ).eval()
    subject.restore_buffers(model)  # what `round-trip` tells
    with torch.no_grad():
        logits = model(subject.ids, use_cache=False).logits
    if not logits.isfinite().all():
        return Finding(False, "logits that are not finite")
    embedding = model.get_input_embeddings().weight.dtype
    if embedding != torch.bfloat16:
        return Finding(False, f"the embedding is {embedding}, not bfloat16")
    error = (logits.float() - subject.reference).pow(2).mean().sqrt().item() / subject.spread
    return Finding(error <= 0.1, f"logits differ by {error:.1e} of their spread")


@CHECKS.add(
    "tied-weights",
    expected="input and output embedding share their storage if and only if config.tie_word_embeddings says so",
    remedy="name the pair in `_tied_weights_keys` and call post_init(), or set tie_word_embeddings to what is so",
)
def tied_weights(subject: Subject) -> Finding:
    """Whether head and embedding share memory exactly where the config says so, after loading too."""
    said = getattr(subject.config, "tie_word_embeddings", None)
    if said is None:
        raise Skipped("the config has no tie_word_embeddings")
    loaded, reloaded = is_tied(subject.model), subject.record["tied"]
    words = {True: "tied", False: "untied"}
    measured = f"the config says {words[bool(said)]}; loaded {words[loaded]}, saved and reloaded {words[reloaded]}"
    return Finding(loaded == reloaded == bool(said), measured)


@CHECKS.add(
    "resize-embeddings",
    expected="resize_token_embeddings keeps the old tokens' logits, the tie, and tells config.vocab_size",
    remedy="implement get/set_input_embeddings and get/set_output_embeddings, and read sizes from the config",
)
def resize_embeddings(subject: Subject) -> Finding:
    """Whether resizing the vocabulary keeps the old tokens' logits, and the tie."""
    model = copy.deepcopy(subject.model)
    rows = subject.vocab_size
    model.resize_token_embeddings(rows + 3, mean_resizing=False)
    with torch.no_grad():
        logits = model(subject.ids, use_cache=False).logits
    told = model.config.get_text_config().vocab_size
    return all_of(
        Finding(logits.shape[-1] == rows + 3, f"{logits.shape[-1]} logits for {rows + 3} tokens"),
        Finding(told == rows + 3, f"config.vocab_size is {told} for {rows + 3} tokens"),
        Finding(is_tied(model) == is_tied(subject.model), "resizing changed whether input and output are tied"),
        compare(logits[..., :rows], subject.reference, subject.spread),
    )


@CHECKS.add(
    "residual-init",
    expected="a new model's projections into the residual stream have deviation initializer_range / sqrt(2 x layers)",
    remedy="mark the nn.Linear itself and test the mark in _init_weights: modules without parameters of their own are "
    "passed over in custom code",
)
def residual_init(subject: Subject) -> Finding:
    """Whether a newly built model draws its residual projections as small as its maths claims (GPT-2, 2.3)."""
    if type(subject.config).__name__ not in SCALED_PROJECTIONS:
        kind = subject.config.model_type
        raise Skipped(f"the architecture '{kind}' claims no smaller initial weights into the residual stream")
    if getattr(subject.config, "norm_position", "pre") == "post":
        raise Skipped("norms after the sums, as in GPT-1: nothing adds up along the depth, so nothing is scaled")
    endings = SCALED_PROJECTIONS[type(subject.config).__name__]
    squares, counts = zip(
        *(size for name, size in subject.built_squares.items() if name.endswith(endings)), strict=True
    )
    found = math.sqrt(sum(squares) / sum(counts))
    expected = subject.config.initializer_range / math.sqrt(2 * subject.config.num_hidden_layers)
    measured = f"deviation {found:.5f} for {expected:.5f}"
    return Finding(abs(found / expected - 1) <= 0.1, measured)
