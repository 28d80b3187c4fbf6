"""The rows trained by nanoGPT's loop: its own model, nanochat's, and Qwen3's maths with AdamW or torch's Muon."""

from pathlib import Path
from typing import Any

import nanochat_baseline
import torch
from nanogpt_baseline import AsCausalModel, NanoGPT, RandomWindows, cosine_factor, make_adamw
from pretrain_request import HeldOut, Request, describe, finish, modern_fields, peak_memory
from pretrain_watch import Watch
from torch import nn

MUON_RATE = 0.02


def make_qwen3(request: Request, zero_projections: bool) -> nn.Module:
    """transformers' Qwen3ForCausalLM, freshly initialised in fp32."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from hf_scratch_gpt.pretraining.setup import zero_output_projections

    model = Qwen3ForCausalLM(Qwen3Config(**modern_fields(request)))
    if zero_projections:
        zero_output_projections(model)
    return model


class FullLogitsLoss(nn.Module):
    """Mean cross entropy of a model of transformers over its whole logits, as nanoGPT's model has it.

    Args:
        model: The causal model.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, token_ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """A scalar; both are of shape (batch, length)."""
        logits = self.model(input_ids=token_ids, use_cache=False).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def train_plainly(request: Request, kind: str, bf16: bool, compiled: bool, muon: bool = False) -> dict[str, Any]:
    """nanoGPT's training loop, over its own model, nanochat's or (`kind` `"qwen3"` or `"modern"`) Qwen3's.

    The modern rows start with output projections of zero and keep freed memory; with `muon` their matrices are
    trained by `torch.optim.Muon`. A time budget makes the cosine follow the time.
    """
    from hf_scratch_gpt.runs.hardware import keep_freed_memory

    torch.manual_seed(request.seed)
    if kind == "modern":
        keep_freed_memory()
    if kind in ("modern", "qwen3"):
        bare = make_qwen3(request, zero_projections=kind == "modern").to(request.device)
        loss_module, measurable = FullLogitsLoss(bare), bare
    elif kind == "nanochat":
        bare = loss_module = nanochat_baseline.NanoChat(request.size).to(request.device)
        measurable = nanochat_baseline.AsCausalModel(bare)
    else:
        bare = loss_module = NanoGPT(request.size).to(request.device)
        measurable = AsCausalModel(bare)
    if kind == "nanochat":
        optimizers = nanochat_baseline.make_optimizers(bare)
    else:
        optimizers = make_plain_optimizers(bare, request.learning_rate, muon)
    described = describe(bare, request.size)
    heldout = HeldOut(request) if request.seconds else None
    evaluate = (lambda: heldout.measure(measurable, heldout.some)) if heldout else None
    watch = Watch(request.total_steps, request.seconds, request.interval, evaluate)
    module = torch.compile(loss_module) if compiled else loss_module
    run_plain_loop(request, module, optimizers, bf16, watch, is_nanochat=kind == "nanochat")
    memory = peak_memory(request.device)
    result = {**described, **finish(request, watch, compiled), "peak_rss_bytes": memory}
    if heldout is not None:
        watch.note_point()
        result |= {"curve": watch.curve, "bits_per_byte": heldout.measure(measurable, heldout.all)}
    return result


def make_plain_optimizers(model: nn.Module, rate: float, muon: bool) -> list[torch.optim.Optimizer]:
    """nanoGPT's AdamW, or torch's Muon for the hidden matrices and that AdamW for the rest."""
    if not muon:
        return [make_adamw(model, rate)]
    from hf_scratch_gpt.pretraining.optimizers import split_parameters

    hidden, _, _ = split_parameters(model)
    matrices = torch.optim.Muon(hidden, lr=MUON_RATE, momentum=0.95, adjust_lr_fn="original")
    taken = {id(parameter) for parameter in hidden}
    rest = nn.ParameterList(parameter for parameter in model.parameters() if id(parameter) not in taken)
    return [matrices, make_adamw(rest, rate)]


def read_windows(request: Request) -> RandomWindows:
    """The training tokens in one file, as nanoGPT has them, and its batches of them."""
    from hf_scratch_gpt.data.shards import TokenShards

    shards = TokenShards(request.dataset_dir, "train")
    tokens = shards.read(0, len(shards))
    file = Path(request.work) / "train.bin"
    tokens.tofile(file)
    rows = request.batch_size // request.accumulation
    return RandomWindows(file, tokens.dtype, request.size.context_length, rows, request.device)


def run_plain_loop(
    request: Request,
    module: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    bf16: bool,
    watch: Watch,
    is_nanochat: bool = False,
) -> None:
    """Train `module`, whose call gives the mean loss of inputs and targets, until the watch says that it is over.

    nanochat has a schedule of its own, also for the momentum of its Muon, which comes first of the optimizers.
    """
    windows = read_windows(request)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    parameters = [group["params"] for optimizer in optimizers for group in optimizer.param_groups]
    parameters = [parameter for group in parameters for parameter in group]
    watch.start()
    batch = windows.next()
    while not watch.finished:
        step = len(watch.step_seconds)
        factor = cosine_factor(step, watch.progress, request.lr_warmup)
        if is_nanochat:
            factor = nanochat_baseline.rate_factor(watch.progress)
            optimizers[0].param_groups[0]["momentum"] = nanochat_baseline.muon_momentum(step)
        for optimizer, full in zip(optimizers, rates, strict=True):
            for group, rate in zip(optimizer.param_groups, full, strict=True):
                group["lr"] = rate * factor
        for _ in range(request.accumulation):
            with torch.autocast(request.device, dtype=torch.bfloat16, enabled=bf16):
                loss = module(*batch) / request.accumulation
            batch = windows.next()  # while a GPU computes
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if request.device == "cuda":
            torch.cuda.synchronize()
        watch.note_step()
