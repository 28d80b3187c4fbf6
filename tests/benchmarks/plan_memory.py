"""Compare `scratch-gpt plan` with the memory that training really takes on a CPU: three runs in fresh processes.

    python tests/benchmarks/plan_memory.py [--kept]

Measured is the highest resident memory of a process (VmHWM) over two optimizer steps of pretraining's own loss and
optimizers, with a checkpoint after each as `scratch-gpt pretrain` writes them, above what was resident after the
imports and a step of a tiny model, which loads the libraries' kernels.
The C library is told to return each freed buffer to the system (MALLOC_MMAP_THRESHOLD_), so that what counts is what
is in use. `--kept` measures again with the setting that `scratch-gpt pretrain` makes for speed, which keeps freed
memory, so that holes between tensors count too. Linux only; takes 4 GB. Exits with 1 if a plan is more than 10% from
what is in use.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time

TOLERANCE = 0.10
STEPS = 2  # in the second, the optimizer's states are there from the start
CASES = {
    "GPT-3's layers, fp32, AdamW": [
        *("gpt3-125m", "--precision", "fp32", "--sequence-length", "512", "--batch-size", "4", "--micro-batch", "4"),
        *("--no-checkpointing", "--model-overrides", "num_hidden_layers=4", "vocab_size=16384"),
        *("bos_token_id=null", "eos_token_id=null"),
    ],
    "modern-30m, bf16, Muon": [
        *("modern-30m", "--optimizer", "muon", "--sequence-length", "512", "--batch-size", "4", "--micro-batch", "4"),
        *("--no-checkpointing",),
    ],
    "GPT-2's layers and dropout, bf16, AdamW, checkpointed, 2 accumulated": [
        *("gpt2-124m", "--sequence-length", "512", "--batch-size", "4", "--micro-batch", "2", "--checkpointing"),
        *("--model-overrides", "num_hidden_layers=6"),
    ],
}


def plan(case):
    """What `scratch-gpt plan --json` prints of a case, and the config it was made for."""
    from hf_scratch_gpt.pretraining import plan as command

    printed = io.StringIO()
    fixed = ["--device", "cpu", "--no-separate-documents", "--json"]
    with contextlib.redirect_stdout(printed):
        command.main([case[0], *fixed, *case[1:]])
    overrides = case[case.index("--model-overrides") + 1 :] if "--model-overrides" in case else None
    return json.loads(printed.getvalue()), command.load_config(case[0], command.parse_overrides(overrides))


def resident(name):
    """`VmRSS` or `VmHWM` of this process, in bytes."""
    with open("/proc/self/status", encoding="ascii") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(name))


def train(config, setup, accumulation_steps, steps, folder):
    """Optimizer steps on random tokens as the pretraining loop takes them, each with a checkpoint in `folder`."""
    import torch

    from hf_scratch_gpt.model import ScratchGPTForCausalLM
    from hf_scratch_gpt.pretraining.checkpointing import CheckpointWriter, TrainingState
    from hf_scratch_gpt.pretraining.optimizers import make_optimizers
    from hf_scratch_gpt.pretraining.setup import LanguageModelLoss, use_fast_attention

    model = ScratchGPTForCausalLM(config).train()
    if setup["checkpointing"]:
        model.activation_checkpointing_enable()
    use_fast_attention(model, "cpu")
    module, optimizers = LanguageModelLoss(model, setup["bf16"]), make_optimizers(model, setup["optimizer"])
    checkpoints = CheckpointWriter(folder)
    shape = (setup["micro_batch"], setup["sequence_length"])
    for step in range(steps):
        for _ in range(accumulation_steps):
            loss = module(torch.randint(config.vocab_size, shape)) / (shape[0] * shape[1])
            loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizers.step()
        optimizers.zero_grad()
        checkpoints.save(model, optimizers, TrainingState(step=step))
    checkpoints.close()


def measure(name, keep):
    """Child process: print the peak of a case in bytes."""
    if keep:
        from hf_scratch_gpt.runs.hardware import keep_freed_memory

        assert keep_freed_memory()
    planned, config = plan(CASES[name])
    tiny = {**config.to_dict(), "hidden_size": 64, "num_hidden_layers": 1, "intermediate_size": 128}
    tiny |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "layer_types": None}
    setup = planned["setup"]
    with tempfile.TemporaryDirectory() as folder:
        train(type(config)(**tiny), {**setup, "micro_batch": 1, "sequence_length": 16}, 1, 1, f"{folder}/tiny")
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")  # the peak starts again from here
        baseline = resident("VmRSS")
        train(config, setup, planned["accumulation_steps"], STEPS, f"{folder}/planned")
        print(resident("VmHWM") - baseline)


def run_case(name, keep):
    environment = dict(os.environ)
    if not keep:
        environment |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, name, *(["keep"] if keep else [])]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(with_kept):
    begin, worst = time.monotonic(), 0.0
    kept_heading = " with freed memory kept, MiB |" if with_kept else ""
    print(f"| run | plan, MiB | measured, MiB | plan / measured |{kept_heading}")
    print("| --- | ---: | ---: | ---: |" + (" ---: |" if with_kept else ""))
    for name in CASES:
        planned, measured = plan(CASES[name])[0]["peak"]["total"], run_case(name, keep=False)
        kept = f" {run_case(name, keep=True) / 2**20:,.0f} |" if with_kept else ""
        worst = max(worst, abs(planned / measured - 1))
        ratio = f"{planned / measured:.3f}"
        print(f"| {name} | {planned / 2**20:,.0f} | {measured / 2**20:,.0f} | {ratio} |{kept}", flush=True)
    print(f"\nlargest difference {worst:.1%} ({TOLERANCE:.0%} allowed); {time.monotonic() - begin:.0f} s")
    return int(worst > TOLERANCE)


if __name__ == "__main__":
    if sys.argv[1:2] and sys.argv[1] in CASES:
        measure(sys.argv[1], "keep" in sys.argv[2:])
    else:
        sys.exit(main("--kept" in sys.argv))
