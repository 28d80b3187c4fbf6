"""How fast pretraining is on one GPU, against a compiled nanoGPT-style baseline in the same run.

    python tests/benchmarks/pretrain_gpu.py [--presets gpt2-124m] [--context_lengths 1024 2048] [--json OUT]

bf16, compiled, equal batch; each row in a process of its own. Ours is the stage `pretrain` itself. The baseline is
nanoGPT's training loop with fused AdamW: around its own model for gpt2-124m, and around transformers'
Qwen3ForCausalLM, whose maths `modern-` presets share, for those; both take the loss from the whole logits.
`ours-plain` reads windows across documents as the baseline does, where the stage's default keeps documents apart.

MFU is model FLOPs (6 for each weight of a linear layer, head included, and 12 x width x context a layer for attention,
hf_scratch_gpt/pretraining/compute.py) over the bf16 product of matrices measured in the same process, before and
after; with --data_sheet_tflops also over that figure. Memory is the peak of the GPU's allocator. About two minutes a
row, most of it compiling, so choose presets and lengths where a session is short.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import pretrain_tables as tables
from pretrain_runner import Speed, parse_pairs, prepare_corpus, run_row, work_folder
from pretrain_shapes import Shape

ROWS = ("ours", "ours-plain", "baseline")
TOKENS_PER_PART = 65_536
VOCABULARY = 50_304  # GPT-2's, rounded up to a multiple of 64


def make_shape(preset: str, context_length: int) -> Shape:
    """The shape of a preset at another context; the classic presets get nanoGPT's rounded vocabulary."""
    from hf_scratch_gpt.model import ScratchGPTConfig

    config = ScratchGPTConfig.from_preset(preset)
    classic = preset.startswith("gpt2")
    return Shape(
        config.num_hidden_layers,
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        VOCABULARY if classic else config.vocab_size,
        context_length,
        gated_size=0 if classic else config.intermediate_size,
    )


def stage_settings(preset: str, shape: Shape, row: str, given: dict[str, str]) -> dict[str, str]:
    """What the stage is told over the benchmark's settings: the preset as it is, without dropout."""
    overrides = f"vocab_size={shape.vocab_size},max_position_embeddings={shape.context_length}"
    if preset.startswith("gpt2"):
        overrides += ",attention_dropout=0.0,hidden_dropout=0.0"
    settings = {"preset": preset, "precision": "bf16", "model_overrides": overrides}
    if row == "ours-plain":
        settings["separate_documents"] = "false"
    if "model_overrides" in given:
        overrides += "," + given["model_overrides"]
    return {**settings, **given, "model_overrides": overrides}


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--presets", nargs="+", default=["gpt2-124m", "modern-360m"])
    parser.add_argument("--context_lengths", nargs="+", type=int, default=[1024, 2048])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--tokens_per_step", type=int, default=8 * TOKENS_PER_PART)
    parser.add_argument("--tokens_per_part", type=int, default=TOKENS_PER_PART, help="of one forward pass")
    parser.add_argument("--steps", type=int, default=10, help="optimizer steps that count")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them that do not")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--data_sheet_tflops", type=float, help="the device's bf16 peak, to give MFU against it too")
    parser.add_argument("--ours", nargs="*", default=[], metavar="SETTING=VALUE", help="settings of our stage")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--work", help="folder to keep the corpus in; temporary by default")
    return parser.parse_args(arguments)


def measure(options: argparse.Namespace, preset: str, context_length: int, dataset_dir: Path, work: Path) -> list[Any]:
    """The rows of one preset at one context, in turn; the best repeat of each."""
    shape = make_shape(preset, context_length)
    kinds = {"baseline": "nanogpt-bf16-compile" if preset.startswith("gpt2") else "qwen3-bf16-compile"}
    found: dict[str, Any] = {}
    for repeat in range(options.repeats):
        for row in options.rows:
            request = {
                "row": kinds.get(row, "ours"),
                "shape": vars(shape),
                "dataset_dir": str(dataset_dir),
                "batch_size": options.tokens_per_step // context_length,
                "accumulation": options.tokens_per_step // options.tokens_per_part,
                "warmup": options.warmup,
                "steps": options.steps,
                "learning_rate": 6e-4,
                "seed": repeat,
                "device": "cuda",
                "ours": stage_settings(preset, shape, row, parse_pairs(options.ours)),
            }
            result = run_row(request, work)
            result |= vars(Speed.of(result, options.warmup))
            print(f"{preset}, {context_length}, {row}: {result['tokens_per_second']:,.0f} tokens/s", flush=True)
            if row not in found or result["tokens_per_second"] > found[row]["tokens_per_second"]:
                found[row] = {"name": row, "preset": preset, "context_length": context_length, **result}
    return list(found.values())


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 where there is no GPU."""
    options, begin = parse_options(arguments), time.monotonic()
    import torch

    if not torch.cuda.is_available():
        print("pretrain_gpu: no CUDA GPU is available to torch here, so nothing was measured", file=sys.stderr)
        return 1
    device = torch.cuda.get_device_name()
    rows: list[dict[str, Any]] = []
    with work_folder(options.work) as work:
        dataset_dir = prepare_corpus("python-docs", 8192, work)
        for preset in options.presets:
            for context_length in options.context_lengths:
                rows += measure(options, preset, context_length, dataset_dir, work)
    print(tables.gpu_table(rows, options.data_sheet_tflops))
    print(f"{device}, torch {torch.__version__}, {time.strftime('%d %B %Y')}; {time.monotonic() - begin:.0f} s in all")
    if options.json:
        options.json.write_text(json.dumps({"device": device, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
