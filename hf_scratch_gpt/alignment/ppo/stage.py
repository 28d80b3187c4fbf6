"""The stage `ppo`: align a chat model against a reward model: `scratch-gpt ppo recipe.yaml`.

It writes a complete model folder (the adapter merged), the critic in `value_model/`, `completions.jsonl` with samples
of every rollout, and `rollouts.jsonl` with the means of each, of which the picture of reward against KL is drawn.
"""

import dataclasses
import random
import shutil
import time
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM

from hf_scratch_gpt.alignment.ppo.config import PPOConfig
from hf_scratch_gpt.alignment.ppo.models import VALUE_FOLDER, save_critic
from hf_scratch_gpt.alignment.ppo.trainer import COMPLETIONS_FILE, ROLLOUTS_FILE, PPOTrainer
from hf_scratch_gpt.finetuning.arguments import TuningArguments, make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.models import (
    check_model_source,
    context_length,
    load_model,
    load_tokenizer,
    save_tuned,
)
from hf_scratch_gpt.finetuning.trainers import run_stage
from hf_scratch_gpt.runs import StageRun
from hf_scratch_gpt.runs.training import train


@dataclasses.dataclass
class PPOArguments(TuningArguments, PPOConfig):
    """Settings of `ppo`: `TuningArguments` and all of `PPOConfig`.

    Args:
        reward_model (`str`): Folder or Hub id of a sequence classifier with one label. If its tokenizer is not the
            policy's, it reads prompt and answer through its own.
        eval_prompts (`int`, *optional*, defaults to `256`): Held-out prompts on which the trained policy is measured
            (the first ones of `eval_dataset`, or of the prepare folder's held-out tasks); 0 measures none.
        checker_weight (`float`, *optional*, defaults to `0.0`): Weight of the checker's own verdict on the answer to a
            task question, added to the reward model's score: a reward that can be verified and cannot be exploited
            (Lambert et al. 2024, https://arxiv.org/abs/2411.15124). At 0 it is only logged.
        ptx_dataset (`str`, *optional*): Pretraining text to mix in with weight `ptx_coef`: a folder that `prepare`
            wrote, or a file of rows with `text`.
    """

    input_fields: ClassVar[tuple[str, ...]] = (
        "model_name_or_path",
        "reward_model",
        "dataset",
        "eval_dataset",
        "ptx_dataset",
    )

    reward_model: str = dataclasses.field(
        default="", metadata={"help": "Folder or Hub id of the reward model, which has one label."}
    )
    eval_prompts: int = dataclasses.field(
        default=256, metadata={"help": "Held-out prompts on which the trained policy is measured; 0 for none."}
    )
    checker_weight: float = dataclasses.field(
        default=0.0, metadata={"help": "Weight of the checker's verdict on task questions, beside the reward model's."}
    )
    heldout_fraction: float = dataclasses.field(
        default=0.0, metadata={"help": "Share of dataset to hold out where no other held-out data is given."}
    )
    max_length: int | None = dataclasses.field(
        default=None, metadata={"help": "Longest prompt and answer together in tokens; unset: the model's context."}
    )
    ptx_dataset: str | None = dataclasses.field(
        default=None, metadata={"help": "Pretraining text to mix in: a prepare folder, or a file of rows with text."}
    )

    def check_inputs(self) -> None:
        """Refuse settings without a model, a reward model or data.

        Raises:
            ValueError: naming the missing setting.
        """
        super().check_inputs()
        if not self.reward_model:
            raise ValueError("'reward_model' is missing: name the folder that the stage 'reward' wrote")


Arguments = PPOArguments


def run(arguments: PPOArguments) -> Path:
    """Align `model_name_or_path` against `reward_model` on the prompts of `dataset`; write a complete model folder.

    Raises:
        ValueError: for unusable settings, models, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "ppo", _align)


def _align(arguments: PPOArguments, stage_run: StageRun) -> None:
    source = arguments.model_name_or_path
    check_model_source(arguments.reward_model)
    tokenizer = load_tokenizer(source)
    max_length = context_length(source, arguments.max_length)
    prompts, heldout = load_prompts(arguments)
    rewards: list[Any] = [arguments.reward_model]
    trainer_args = trainer_arguments(arguments, stage_run, max_length)
    if all(row.get("answer") and "family" in row for row in prompts + heldout):
        # At weight 0 it is only logged: it shows where the policy begins to exploit the reward model.
        rewards.append(gold)
        trainer_args.reward_weights = [*(arguments.reward_weights or [1.0]), arguments.checker_weight]
    elif arguments.checker_weight:
        raise ValueError(
            f"'checker_weight' is {arguments.checker_weight}, but {arguments.dataset} has rows that are no task "
            "questions (no 'answer' and 'family'), which the checker cannot judge"
        )
    model = load_model(AutoModelForCausalLM, source, tokenizer)
    trainer = PPOTrainer(
        model=model,
        reward_funcs=rewards,
        args=trainer_args,
        train_dataset=prompts,
        eval_dataset=heldout or None,
        processing_class=tokenizer,
        peft_config=make_lora_config(arguments, "CAUSAL_LM", model),
        ptx_dataset=arguments.ptx_dataset,
    )
    trained = sum(parameter.numel() for parameter in trainer.model.parameters() if parameter.requires_grad)
    metrics: dict[str, Any] = {"trainable_parameters": trained, "critic": arguments.critic}
    metrics["checker_weight"] = arguments.checker_weight
    started = time.monotonic()
    train(trainer, stage_run)
    metrics["train_seconds"] = time.monotonic() - started
    metrics |= rollout_metrics(trainer.records.rollouts)
    if heldout:
        measured = trainer.evaluate(metric_key_prefix="heldout")
        metrics |= {**measured, "heldout_prompts": len(heldout)}
    if not stage_run.is_main:
        return
    sample = [prompt.input_ids for prompt in trainer.prompts[:4]]
    policy = save_tuned(trainer.model.policy, tokenizer, stage_run.folder, sample)
    save_critic(trainer.model.critic, stage_run.folder / VALUE_FOLDER, tokenizer)
    for name in (COMPLETIONS_FILE, ROLLOUTS_FILE):
        shutil.copyfile(stage_run.checkpoints / name, stage_run.folder / name)
    metrics |= {
        "prompts": len(trainer.prompts),
        "steps": trainer.state.global_step,
        "tokens": int(trainer.state.num_input_tokens_seen),
        "parameters": policy.num_parameters(),
        "seconds": stage_run.seconds,
    }
    stage_run.finish(metrics)


def gold(prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """The checker's reward of task answers, as a reward function."""
    from hf_scratch_gpt.data.tasks import gold_reward

    texts = [completion[-1]["content"] for completion in completions]
    return [gold_reward({"answer": right}, text) for right, text in zip(answer, texts, strict=True)]


def rollout_metrics(rollouts: list[dict[str, float]]) -> dict[str, float]:
    """Where the run began (its first rollout, from the untrained policy) and ended (the mean of the last few)."""
    last = rollouts[-max(1, min(4, len(rollouts) // 4)) :]

    def mean(name: str) -> float:
        return sum(row[name] for row in last) / len(last)

    metrics = {"kl": mean("kl"), "share_ended": mean("share_ended"), "share_ended_start": rollouts[0]["share_ended"]}
    for name in [name for name in rollouts[0] if name.startswith("reward")]:
        label = "training_gold" if name == "rewards/gold" else name.replace("/", "_")
        metrics |= {f"{label}_start": rollouts[0][name], f"{label}_end": mean(name)}
    return {**metrics, "episodes": rollouts[-1]["episodes"], "response_length": mean("response_length")}


def load_prompts(arguments: PPOArguments) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The rows to train on and those held out: `prompt` as messages, and all other columns."""
    rows = read_prompt_rows(arguments.dataset, "train")
    heldout: list[dict[str, Any]] = []
    if arguments.eval_prompts > 0:
        is_prepared = (Path(arguments.dataset) / "manifest.json").is_file()
        if arguments.eval_dataset or is_prepared:
            heldout = read_prompt_rows(arguments.eval_dataset or arguments.dataset, "heldout")
        elif arguments.heldout_fraction > 0 and len(rows) > 1:
            random.Random(arguments.seed).shuffle(rows)
            count = max(1, round(arguments.heldout_fraction * len(rows)))
            rows, heldout = rows[count:], rows[:count]
    return rows, heldout[: arguments.eval_prompts]


def read_prompt_rows(source: str, split: str) -> list[dict[str, Any]]:
    """Rows of a prepare folder's tasks, a local file or a data set; an answer beside the prompt is not needed.

    Raises:
        FileNotFoundError: if a local source is missing.
        ValueError: for a row that is no prompt, naming it.
    """
    from hf_scratch_gpt.data.conversations import load_conversations
    from hf_scratch_gpt.data.rows import read_rows

    path = Path(source)
    if path.is_file():
        rows = [row for _, row in read_rows(path)]
        if rows and all("prompt" in row and not {"completion", "response"} & set(row) for row in rows):
            return [{**row, "prompt": _as_messages(row["prompt"])} for row in rows]
        return [dict(row) for row in load_conversations(source, keep_columns=True)]
    return [dict(row) for row in load_conversations(source, split if path.is_dir() else None, keep_columns=True)]


def _as_messages(prompt: Any) -> Any:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) and prompt else prompt
