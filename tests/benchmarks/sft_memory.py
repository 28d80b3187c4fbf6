"""Memory and time of a step of SFT: our chunked head and loss against TRL's own fused head.

    python tests/benchmarks/sft_memory.py [--peft lora] [--no-checkpointing] [--rounds 3] [--steps 4] [--json OUT]

Each measurement is a process of its own, in turn: it makes a model (23M parameters: 6 layers, width 384, vocabulary
32,768), notes its resident memory, and takes training steps of 4,096 tokens, all of them targets, through the very
trainer that `scratch-gpt sft` uses, or through TRL's `SFTTrainer` with the same settings, with gradient checkpointing
(TRL's default) unless it is turned off. Reported are the highest
resident memory above the noted one (gradients and optimizer states are in it) and the median time of the steps after
the first, each as the median over the rounds.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HEADS = ("ours", "trl")


def make_model(arguments: argparse.Namespace) -> Any:
    """A freshly drawn causal model of the asked shape."""
    import torch

    from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM

    torch.manual_seed(0)
    config = ScratchGPTConfig(
        vocab_size=arguments.vocabulary,
        hidden_size=arguments.width,
        intermediate_size=arguments.width * 8 // 3,
        num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 64,
        num_key_value_heads=arguments.width // 64,
        head_dim=64,
        max_position_embeddings=arguments.length,
    )
    return ScratchGPTForCausalLM(config)


def make_trainer(arguments: argparse.Namespace, model: Any, folder: Path) -> Any:
    """A trainer over random rows, with the step of each process's clock noted in `trainer.seconds`."""
    import datasets
    import torch
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import SFTTrainer

    from hf_scratch_gpt.finetuning.arguments import make_lora_config, trainer_arguments
    from hf_scratch_gpt.finetuning.sft import ConversationTrainer, SFTArguments
    from hf_scratch_gpt.finetuning.trainers import train_in_blocks
    from hf_scratch_gpt.runs import StageRun
    from hf_scratch_gpt.runs.hardware import peak_rss_bytes

    rows = arguments.tokens // arguments.length
    settings = SFTArguments(
        output_dir=str(folder),
        peft=arguments.peft,
        per_device_train_batch_size=rows,
        max_steps=arguments.steps,
        bf16=arguments.precision == "bf16" if arguments.precision != "auto" else None,
        gradient_checkpointing=arguments.gradient_checkpointing,
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
    )
    settings.dataset_kwargs = {"skip_prepare_dataset": True}
    ids = torch.randint(arguments.vocabulary, (rows * arguments.steps, arguments.length)).tolist()
    examples = datasets.Dataset.from_dict({"input_ids": ids, "labels": ids, "length": [len(row) for row in ids]})
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<pad>": 0, "<end>": 1}, unk_token="<pad>")),
        pad_token="<pad>",
        eos_token="<end>",
    )

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.seconds: list[float] = []
            self.cpu_seconds: list[float] = []
            self.peaks: list[int] = []

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self._begin, self._cpu_begin = time.perf_counter(), time.process_time()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seconds.append(time.perf_counter() - self._begin)
            self.cpu_seconds.append(time.process_time() - self._cpu_begin)
            self.peaks.append(peak_rss_bytes())

    clock = Clock()
    training = trainer_arguments(settings, StageRun(settings, "sft"), arguments.length)
    training.packing = False  # as our trainer does; TRL's would make one row of 4,096 tokens of the batch, with a mask
    if arguments.measure == "ours":
        train_in_blocks(model, training)
    trainer = {"ours": ConversationTrainer, "trl": SFTTrainer}[arguments.measure](
        model=model,
        args=training,
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=make_lora_config(settings, "CAUSAL_LM", model),
        callbacks=[clock],
    )
    trainer.clock = clock
    return trainer


def resident_bytes() -> int:
    """Resident memory of this process now (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train in this process and measure it."""
    from hf_scratch_gpt.finetuning import sft  # noqa: F401  # all that is imported belongs to the memory before

    model = make_model(arguments)
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(arguments, model, Path(folder) / "run")
        before = resident_bytes()
        trainer.train()
    clock = trainer.clock
    return {
        "above_model_bytes": clock.peaks[-1] - before,
        "above_model_bytes_by_step": [peak - before for peak in clock.peaks],
        "seconds": statistics.median(clock.seconds[1:]),
        "cpu_seconds": statistics.median(clock.cpu_seconds[1:]),
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="in a step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--peft", choices=("none", "lora"), default="none")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--no-checkpointing", dest="gradient_checkpointing", action="store_false")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--heads", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--json", help="where to write the rows")
    parser.add_argument("--measure", choices=HEADS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments)))
        return
    found: dict[str, list[dict[str, Any]]] = {head: [] for head in arguments.heads}
    for _ in range(arguments.rounds):
        for head in arguments.heads:
            command = [sys.executable, __file__, *sys.argv[1:], "--measure", head]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found[head].append(json.loads(answer.splitlines()[-1]))
            row = found[head][-1]
            print(
                f"{head}: {row['above_model_bytes'] / 1e9:.2f} GB, {row['seconds']:.2f} s a step "
                f"({row['cpu_seconds']:.2f} CPU seconds)",
                flush=True,
            )
    print("| head | peak above the model | seconds a step | loss of the last step |\n| --- | --- | --- | --- |")
    rows = []
    for head, runs in found.items():
        above, seconds = (statistics.median(run[name] for run in runs) for name in ("above_model_bytes", "seconds"))
        print(f"| {head} | {above / 1e9:.2f} GB | {seconds:.2f} | {runs[0]['loss'][-1]:.4f} |")
        rows.append({"name": head, "above_model_bytes": above, "seconds_per_step": seconds, "runs": runs})
    if arguments.json:
        Path(arguments.json).write_text(json.dumps({"settings": vars(arguments), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
