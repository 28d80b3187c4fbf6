"""The command line: `scratch-gpt STAGE RECIPE [--field value]`. Nothing heavy is imported until a stage runs."""

import importlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The stages in the order of the road: a module with `Arguments` (a dataclass) and `run(arguments) -> Path`.
STAGES = {
    "tokenizer": ("hf_scratch_gpt.data.tokenizer_stage", "train a byte-level BPE tokenizer"),
    "prepare": ("hf_scratch_gpt.data.prepare", "clean text, split it, write token shards and tasks"),
    "pretrain": ("hf_scratch_gpt.pretraining.pretrain", "train a base model from token shards"),
    "sft": (
        "hf_scratch_gpt.finetuning.sft",
        "tune a model on instructions (full, LoRA, DoRA, QLoRA, prefix, adapter)",
    ),
    "classify": ("hf_scratch_gpt.finetuning.classify", "train a text classifier from a model (full or LoRA)"),
    "rlaif": ("hf_scratch_gpt.alignment.rlaif", "have a model's answers ranked: preferences for reward or dpo"),
    "reward": ("hf_scratch_gpt.alignment.reward", "train a reward model on preferences"),
    "dpo": ("hf_scratch_gpt.alignment.dpo", "align a model on preferences directly"),
    "ppo": ("hf_scratch_gpt.alignment.ppo.stage", "align a model against a reward model"),
    "kto": ("hf_scratch_gpt.alignment.kto", "align a model on answers labelled good or bad"),
    "grpo": ("hf_scratch_gpt.alignment.grpo", "align a model by comparing its answers to one question"),
    "rloo": ("hf_scratch_gpt.alignment.rloo", "align a model by REINFORCE, leave-one-out"),
    "best_of_n": ("hf_scratch_gpt.alignment.best_of_n", "choose the best of n answers, and tune on them"),
    "iterate": ("hf_scratch_gpt.alignment.iterate", "rank, train the reward model, PPO; round after round"),
    "evaluate": ("hf_scratch_gpt.evaluation.evaluate", "measure a model on held-out text and questions"),
}
# Commands that are not stages: a module with `main(argv) -> int`.
COMMANDS = {
    "quickstart": ("hf_scratch_gpt.pipeline", "quickstart", "the whole road on this Python's own documentation"),
    "run": ("hf_scratch_gpt.pipeline", "main", "run a recipe folder stage by stage, skipping what is up to date"),
    "chat": ("hf_scratch_gpt.chat.terminal", "main", "talk to a model in the terminal"),
    "merge": ("hf_scratch_gpt.finetuning.merge", "main", "merge an adapter into its base model, checked"),
    "import": ("hf_scratch_gpt.hub.conversion.importing", "main", "make a GPT-2, Llama or Qwen3 model ours, checked"),
    "export": ("hf_scratch_gpt.hub.conversion.exporting", "main", "write a model for other tools, checked"),
    "push": ("hf_scratch_gpt.hub.push.main", "main", "publish a model folder on the Hub, checked and resumable"),
    "plan": ("hf_scratch_gpt.pretraining.plan", "main", "say whether training fits, how, and how long it takes"),
    "scaling": (
        "hf_scratch_gpt.reporting.scaling_page",
        "main",
        "predict a larger model's loss from small ones, and check",
    ),
    "card": ("hf_scratch_gpt.reporting.card", "main", "write a model's card from what its runs recorded"),
    "data-report": ("hf_scratch_gpt.reporting.data_report", "main", "write the page on what prepare removed and kept"),
    "doctor": ("hf_scratch_gpt.hub.doctor.main", "main", "check any model folder, Hub id or chat template"),
    "attention": (
        "hf_scratch_gpt.reporting.attention_page",
        "main",
        "draw where a model looks and what it predicts from",
    ),
}
EXIT_USER_ERROR, EXIT_INTERRUPTED = 2, 75  # 75 is EX_TEMPFAIL of sysexits.h: try again


def _usage() -> str:
    lines = ["usage: scratch-gpt STAGE [RECIPE.yaml] [--field value ...]", "", "stages, in order:"]
    lines += [f"  {name:13}{help_text}" for name, (_, help_text) in STAGES.items()]
    lines += ["", "commands:"]
    lines += [f"  {name:13}{help_text}" for name, (_, _, help_text) in COMMANDS.items()]
    lines += ["", "`scratch-gpt STAGE --help` lists a stage's settings; --debug shows the traceback of an error."]
    return "\n".join(lines)


def write_stage_page(name: str, folder: Path) -> None:
    """Write what a stage's folder has besides what the stage itself writes: `prepare` a page, `ppo` a picture."""
    if name == "ppo":
        from hf_scratch_gpt.reporting.reward_kl import draw_reward_kl

        draw_reward_kl(folder)
    if name == "prepare":
        from hf_scratch_gpt.reporting.data_report import write_data_report

        write_data_report(folder)


def _run_stage(name: str, arguments: Sequence[str]) -> int:
    from hf_scratch_gpt.runs import parse_arguments

    module = importlib.import_module(STAGES[name][0])
    folder = module.run(parse_arguments(module.Arguments, arguments, program=f"scratch-gpt {name}"))
    if int(os.environ.get("RANK", "0")) == 0:
        write_stage_page(name, folder)
        print(f"{name}: {folder}")
    return 0


def _dispatch(name: str, arguments: Sequence[str]) -> int:
    if name in ("-h", "--help", "help"):
        print(_usage())
        return 0
    if name in ("--version", "-V"):
        from hf_scratch_gpt import __version__

        print(__version__)
        return 0
    if name in STAGES:
        return _run_stage(name, arguments)
    if name in COMMANDS:
        module, function, _ = COMMANDS[name]
        return getattr(importlib.import_module(module), function)(arguments)
    from hf_scratch_gpt.runs.arguments import nearest

    raise ValueError(f"no stage or command '{name}'{nearest(name, [*STAGES, *COMMANDS])}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of `scratch-gpt` and of `python -m hf_scratch_gpt`; returns the exit status.

    0 done, 2 a user's mistake or a full disk (one line on standard error), 75 stopped by a signal after saving.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    previous = _interrupt_on_termination()
    try:
        status = _dispatch(arguments[0] if arguments else "--help", arguments[1:])
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # `| head` has read enough; what is buffered has nowhere to go
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, Exception) as error:
        return _report(error, debug)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt_on_termination() -> dict[int, Any]:
    """Let SIGTERM and SIGUSR1 end a run as Ctrl-C does where no stage handles them; returns the handlers before."""
    if threading.current_thread() is not threading.main_thread():
        return {}

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGUSR1") if hasattr(signal, name)]
    return {
        number: signal.signal(number, interrupt) for number in numbers if signal.getsignal(number) == signal.SIG_DFL
    }


def _report(error: BaseException, debug: bool) -> int:
    from hf_scratch_gpt.runs.errors import explain, is_interrupt
    from hf_scratch_gpt.runs.folder import MainProcessFailed
    from hf_scratch_gpt.runs.signals import Interrupted

    if is_interrupt(error):
        print("scratch-gpt: interrupted; the same command continues it", file=sys.stderr)
        return EXIT_INTERRUPTED
    if isinstance(error, MainProcessFailed):
        return EXIT_USER_ERROR
    if isinstance(error, Interrupted):
        print(f"scratch-gpt: {error}; the same command continues it", file=sys.stderr)
        return EXIT_INTERRUPTED
    line = None if debug else explain(error)
    if line is None:
        traceback.print_exc()
        return 1
    print(f"scratch-gpt: error: {line}", file=sys.stderr)
    return EXIT_USER_ERROR
