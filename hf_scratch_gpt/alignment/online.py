"""What `grpo` and `rloo` share: TRL samples, scores and updates in one loop; here is what it needs around that.

TRL's trainers do the sampling, the advantages and the losses. Ours differ in what makes a run trustworthy: prompts are
encoded so that control tokens in a user's text stay text, no special token but an end token is ever sampled, the
reward model reads an answer with its end token where it ended, prompts of like length are sampled together, and a run
that was killed goes on with the very samples that it had.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from hf_scratch_gpt.alignment.measuring import MeasuringArguments, keep_fitting, load_prompt_rows, measure_policy
from hf_scratch_gpt.alignment.scoring import MISSING_END, Row, Scorer, ScoringArguments, build_scorers
from hf_scratch_gpt.evaluation.generation import end_token_ids, suppressed_token_ids
from hf_scratch_gpt.finetuning._compat import score_only_trained_positions
from hf_scratch_gpt.finetuning.arguments import TuningArguments, make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.models import check_model_source, context_length, load_model, load_tokenizer
from hf_scratch_gpt.finetuning.trainers import LengthSampler, train_and_save
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation
from hf_scratch_gpt.runs import StageRun

STATE_FILE, SAMPLES_FILE = "online_state.json", "online_samples_{}.safetensors"


@dataclasses.dataclass
class OnlineArguments(ScoringArguments, MeasuringArguments, TuningArguments):
    """Settings of a stage that samples from the policy while it trains, beyond TRL's own.

    Args:
        max_length (`int`, *optional*): Longest prompt and answer together in tokens; unset: the model's context.
        include_num_input_tokens_seen: Off: TRL counts the tokens itself.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("model_name_or_path", "reward_model", "dataset", "eval_dataset")

    heldout_fraction: float = dataclasses.field(
        default=0.0, metadata={"help": "Share of dataset to hold out where no other held-out data is given."}
    )
    include_num_input_tokens_seen: str = dataclasses.field(
        default="no", metadata={"help": "Off: TRL counts the tokens of prompts and answers itself."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward_weights is not None:  # type: ignore[attr-defined]
            raise ValueError(
                "'reward_weights' is set by 'checker_weight', 'reward_function_weight' and 'missing_end_penalty'"
            )
        if self.use_vllm or self.use_transformers_continuous_batching:  # type: ignore[attr-defined]
            raise ValueError("'use_vllm' and 'use_transformers_continuous_batching' are not supported by this stage")

    def check_inputs(self) -> None:
        """Refuse settings without a model, data, or anything that scores.

        Raises:
            ValueError: naming the setting.
        """
        super().check_inputs()
        self.check_scoring()


class GroupSampler(LengthSampler):
    """Prompts of like length in one batch of samples, each repeated for its group, the batch for every pass over it.

    As TRL's `RepeatSampler` in what it repeats, but a pure function of (seed, epoch): that one draws a resumed run's
    second epoch as the first. A batch that would not be full is left out.

    Args:
        lengths (`list[int]`): Length of each prompt.
        prompts (`int`): Prompts in a batch of samples, over all processes.
        group (`int`): Samples for each prompt.
        passes (`int`): How often the loader reads a batch of samples.
        seed (`int`): Seed.

    Raises:
        ValueError: if there are fewer prompts than a batch has.
    """

    def __init__(self, lengths: list[int], prompts: int, group: int, passes: int, seed: int):
        if len(lengths) < prompts:
            raise ValueError(
                f"{len(lengths)} prompts do not fill one batch of samples, which has {prompts} prompts of {group} "
                "samples each; give more prompts or lower generation_batch_size"
            )
        super().__init__(lengths, prompts, seed)
        self.group, self.passes = group, passes

    def __len__(self) -> int:
        return len(self.lengths) // self.batch_size * self.batch_size * self.group * self.passes

    def __iter__(self) -> Iterator[int]:
        order = list(super().__iter__())
        for start in range(0, len(order) - self.batch_size + 1, self.batch_size):
            for _ in range(self.passes):
                for index in order[start : start + self.batch_size]:
                    yield from [index] * self.group


class OnlineTraining:
    """Mixin before TRL's `GRPOTrainer` or `RLOOTrainer`; see the module."""

    args: Any
    state: Any
    model: Any
    processing_class: Any
    _step: int
    _buffered_inputs: Any

    def __init__(self, *args: Any, scorers: Sequence[tuple[Scorer, float]], prompt_lengths: list[int], **kwargs: Any):
        settings, model, tokenizer = kwargs["args"], kwargs["model"], kwargs["processing_class"]
        settings.reward_weights = [weight for _, weight in scorers]
        suppressed = {"suppress_tokens": suppressed_token_ids(model, tokenizer)}
        settings.generation_kwargs = {**suppressed, **(settings.generation_kwargs or {})}
        ends = frozenset(end_token_ids(model, tokenizer))
        rewards = [as_reward_function(scorer, tokenizer, ends) for scorer, _ in scorers]
        self.prompt_lengths = prompt_lengths
        score_only_trained_positions()
        super().__init__(*args, reward_funcs=rewards, **kwargs)  # type: ignore[call-arg]

    def _tokenize_prompts(self, prompts: list[Any]) -> tuple[list[list[int]], None, dict[str, Any]]:
        tokenizer = self.processing_class
        encoded = [encode_conversation(tokenizer, prompt, add_generation_prompt=True) for prompt in prompts]
        return [list(conversation["input_ids"]) for conversation in encoded], None, {}

    def _get_train_sampler(self, dataset: Any = None) -> GroupSampler:
        settings = self.args
        return GroupSampler(
            self.prompt_lengths,
            settings.generation_batch_size // settings.num_generations,
            settings.num_generations,
            settings.num_iterations * settings.steps_per_generation,
            settings.seed,
        )

    # ---- Checkpoints: the place within the samples in use, and the samples themselves

    def _save_rng_state(self, output_dir: str) -> None:
        # Every process comes by here, before older checkpoints are removed.
        super()._save_rng_state(output_dir)  # type: ignore[misc]
        folder = Path(output_dir)
        if self.args.should_save:
            (folder / STATE_FILE).write_text(json.dumps({"micro_steps": self._step}) + "\n", encoding="utf-8")
        if self._is_amid_samples():
            tensors = {
                f"{number}.{name}": value.contiguous().clone()
                for number, batch in enumerate(self._buffered_inputs)
                for name, value in batch.items()
                if value is not None
            }
            save_file(tensors, folder / SAMPLES_FILE.format(self.args.process_index))

    def _is_amid_samples(self) -> bool:
        return self._step % (self.args.steps_per_generation * self.args.num_iterations) != 0

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)  # type: ignore[misc]
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise ValueError(f"{folder}: not a checkpoint of this stage (it has no {STATE_FILE})")
        self._step = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["micro_steps"]
        if not self._is_amid_samples():
            return
        path = folder / SAMPLES_FILE.format(self.args.process_index)
        if not path.is_file():
            raise ValueError(f"{folder}: it has no {path.name}, the samples that were in use")
        batches: list[dict[str, Any]] = [{} for _ in range(self.args.steps_per_generation)]
        for name, value in load_file(path).items():
            number, _, field = name.partition(".")
            batches[int(number)][field] = value.to(self.args.device)
        self._buffered_inputs = batches


def as_reward_function(scorer: Scorer, tokenizer: Any, ends: frozenset[int]) -> Callable[..., list[float]]:
    """A scorer as TRL calls a reward function: with completions as token ids, the end token among them if it came."""

    def reward(prompts: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        rest = {name: values for name, values in columns.items() if name not in _NO_COLUMNS}
        rows: list[Row] = [
            {"prompt": prompt, **{name: values[place] for name, values in rest.items()}}
            for place, prompt in enumerate(prompts)
        ]
        ended = [bool(ids) and ids[-1] in ends for ids in completion_ids]
        texts = tokenizer.batch_decode(completion_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return scorer.score(rows, texts, ended)

    reward.__name__ = scorer.name
    return reward


# What TRL passes beside the data set's columns.
_NO_COLUMNS = frozenset({"completions", "trainer_state", "log_extra", "log_metric", "environments"})


def align_online(trainer_class: type, arguments: Any, stage_run: StageRun) -> None:
    """Train the policy of a stage's settings by `trainer_class`, write it merged, and measure it held out."""
    from datasets import Dataset

    source = arguments.model_name_or_path
    if arguments.reward_model:
        check_model_source(arguments.reward_model)
    tokenizer = load_tokenizer(source)
    max_length = context_length(source, arguments.max_length)
    rows, heldout = load_prompt_rows(arguments)
    longest, allow = arguments.max_completion_length, arguments.allow_dropped_rows
    rows, encoded = keep_fitting(rows, tokenizer, longest, max_length, f"{arguments.dataset} (training)", allow)
    if heldout:
        origin = f"{arguments.eval_dataset or arguments.dataset} (held out)"
        heldout, _ = keep_fitting(heldout, tokenizer, longest, max_length, origin, allow)
    scorers = build_scorers(arguments, rows + heldout)
    model = load_model(AutoModelForCausalLM, source, tokenizer)
    trainer = trainer_class(
        model=model,
        args=trainer_arguments(arguments, stage_run, max_length),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=make_lora_config(arguments, "CAUSAL_LM", model),
        scorers=scorers,
        prompt_lengths=[len(ids) for ids in encoded],
    )
    model, metrics = train_and_save(trainer, stage_run, tokenizer, encoded[:4])
    if not stage_run.is_main:
        return
    metrics |= {"prompts": len(rows), "episodes": episodes_of(trainer), "beta": arguments.beta}
    metrics |= {"checker_weight": arguments.checker_weight} | training_metrics(trainer.state.log_history)
    if heldout:
        measured, answers = measure_policy(arguments, model, tokenizer, heldout, scorers)
        metrics |= measured
        answers.write(stage_run.folder)
    stage_run.finish(metrics)


def episodes_of(trainer: Any) -> int:
    """Answers sampled in training, over all processes."""
    settings = trainer.args
    passes = settings.steps_per_generation * settings.num_iterations
    return -(-trainer._step // passes) * settings.generation_batch_size


def training_metrics(history: list[dict[str, Any]]) -> dict[str, Any]:
    """Where the run began (its first log line) and ended (the mean of the last quarter of them)."""
    lines = [line for line in history if "reward" in line]
    if not lines:
        return {}
    last = lines[-max(1, len(lines) // 4) :]
    metrics: dict[str, Any] = {}
    for name in lines[0]:
        if name == "reward" or (name.startswith("rewards/") and name.endswith("/mean")):
            label = name.removesuffix("/mean").replace("/", "_").replace("rewards_gold", "training_gold")
            metrics[f"{label}_start"] = lines[0][name]
            metrics[f"{label}_end"] = sum(line[name] for line in last) / len(last)
    ends = {name: metrics.pop(f"rewards_{MISSING_END}_{name}", None) for name in ("start", "end")}
    metrics |= {f"share_ended_{name}": 1 + value for name, value in ends.items() if value is not None}
    metrics["response_length"] = sum(line["completions/mean_length"] for line in last) / len(last)
    return metrics
