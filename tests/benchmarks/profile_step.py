"""Where a compiled pretraining step on a CPU spends its time: milliseconds by kind of work.

    OMP_NUM_THREADS=2 python tests/benchmarks/profile_step.py [--shape 14m] [--batch_size 64] [--masked 0.25]

Forward and backward pass of our model in bf16, as `pretrain` runs it, over random windows, and one step of Muon with
AdamW; each after some that do not count. Profiling itself costs a few percent of the whole.
"""

import argparse
import logging
from collections import Counter
from typing import Any

from pretrain_shapes import SHAPES

KINDS = (
    "products of linear layers and head",
    "products of attention",
    "rest of attention and calls",
    "fused elements",
    "optimizers",
)


def make_batch(shape: Any, batch_size: int, masked: float) -> dict[str, Any]:
    """Random windows, of which a share holds the start of a second document."""
    import torch

    length = shape.context_length
    positions = torch.arange(length).repeat(batch_size, 1)
    for row in range(round(masked * batch_size)):
        positions[row, length // 2 :] -= length // 2
    order = torch.randperm(batch_size)
    return {
        "input_ids": torch.randint(shape.vocab_size, (batch_size, length)),
        "position_ids": positions[order],
    }


def kind_of(event: Any, head_dim: int) -> str:
    """Which of `KINDS` a profiled event belongs to."""
    if "cpp_fused" in event.key:
        return KINDS[3]
    if event.key == "aten::mm":
        return KINDS[0]
    if event.key in ("aten::bmm", "aten::baddbmm_"):
        # A factor of attention's products has a side of `head_dim`; no weight's gradient, the other use, has one.
        return KINDS[1] if any(head_dim in size[1:] for size in event.input_shapes) else KINDS[0]
    return KINDS[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="14m")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--masked", type=float, default=0.25, help="share of windows with two documents")
    parsed = parser.parse_args()
    import torch
    import torch._inductor.config as inductor
    from torch.profiler import ProfilerActivity, profile
    from transformers import AutoModelForCausalLM

    from hf_scratch_gpt.model import ScratchGPTConfig
    from hf_scratch_gpt.pretraining import setup
    from hf_scratch_gpt.pretraining.optimizers import make_optimizers
    from hf_scratch_gpt.runs.hardware import keep_freed_memory, peak_product_flops

    logging.disable(logging.WARNING)
    keep_freed_memory()
    inductor.cpp.enable_kernel_profile = True  # type: ignore[attr-defined]
    torch.manual_seed(0)
    shape = SHAPES[parsed.shape]
    fields = {**shape.modern_fields, "max_position_embeddings": shape.context_length}
    model = AutoModelForCausalLM.from_config(ScratchGPTConfig.from_preset("modern-30m", **fields)).float().train()
    setup.use_fast_attention(model, "cpu")
    loss, optimizers = setup.LanguageModelLoss(model, bf16=True), make_optimizers(model)
    batch = make_batch(shape, parsed.batch_size, parsed.masked)
    with setup.cpu_training_of(model, "cpu", bf16=True, sharded=False):
        setup.try_compile(loss, batch, required=True)
        for _ in range(3):
            optimizers.zero_grad()
            loss(**batch).backward()
            optimizers.step()
        optimizers.zero_grad()
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as passes:
            loss(**batch).backward()
        with profile(activities=[ProfilerActivity.CPU]) as updates:
            optimizers.step()
    spent: Counter[str] = Counter()
    for event in passes.key_averages(group_by_input_shape=True):
        spent[kind_of(event, shape.head_dim)] += event.self_cpu_time_total / 1000
    spent["optimizers"] = sum(event.self_cpu_time_total for event in updates.key_averages()) / 1000
    peak = peak_product_flops("cpu", torch.bfloat16) / 1e9
    print(f"| part of a step, {parsed.shape}, {parsed.batch_size} windows | ms |\n| --- | ---: |")
    for kind in KINDS:
        print(f"| {kind} | {spent[kind]:,.0f} |")
    print(f"| all | {sum(spent.values()):,.0f} |\n\nbf16 peak {peak:.0f} GFLOP/s, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
