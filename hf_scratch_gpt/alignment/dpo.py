"""Direct preference optimisation: `scratch-gpt dpo recipe.yaml`.

The policy's implicit reward of an answer is beta times how much likelier it became than under the reference; DPO
trains the chosen answer's above the rejected one's (Rafailov et al. 2023, https://huggingface.co/papers/2305.18290).
The reference is the model that tuning starts from. Its log-probabilities are computed before training and kept on disk
(see `reference_cache`), so that no second model is in memory and no later run of the same pairs computes them again.
"""

import dataclasses
import itertools
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object, parse_flag_from_env
from transformers import AutoConfig, AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from hf_scratch_gpt.alignment.divergence import heldout_divergence
from hf_scratch_gpt.alignment.memory_plan import machine_memory, plan_memory
from hf_scratch_gpt.alignment.own_answers import OwnAnswersArguments, own_preferences
from hf_scratch_gpt.alignment.reference_cache import COLUMNS, ReferenceCache, Values, digest_model
from hf_scratch_gpt.alignment.reward_health import CHANCE
from hf_scratch_gpt.evaluation.intervals import bootstrap_mean, wilson
from hf_scratch_gpt.evaluation.likelihood import answer_log_probabilities
from hf_scratch_gpt.finetuning._compat import score_only_trained_positions
from hf_scratch_gpt.finetuning.arguments import TuningArguments, make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.models import (
    context_length,
    load_model,
    load_tokenizer,
)
from hf_scratch_gpt.finetuning.tokenise import load_examples, preference_encoder
from hf_scratch_gpt.finetuning.trainers import LengthGrouping, run_stage, train_and_save
from hf_scratch_gpt.runs import StageRun
from hf_scratch_gpt.runs.loading import loading

logger = logging.getLogger(__name__)

CACHE_FOLDER = ".reference_log_probabilities"


@dataclasses.dataclass
class DPOArguments(OwnAnswersArguments, TuningArguments, DPOConfig):
    """Settings of `dpo`: `OwnAnswersArguments`, `TuningArguments` and all of TRL's `DPOConfig` (`beta`, ...).

    Args:
        precompute_ref_log_probs (`bool`, *optional*, defaults to `True`): Score all pairs by the reference before
            training, and keep the scores on disk. Off, each step scores its own pairs again. It is off by itself
            where `sync_ref_model` moves the reference, and under FSDP and DeepSpeed, which shard it.
        reference_cache_dir (`str`, *optional*): Folder of the kept scores. Unset: `.reference_log_probabilities`
            beside `output_dir`, for all runs there.
        kl_prompts (`int`, *optional*, defaults to `64`): Held-out prompts that the tuned model answers to measure its
            KL to the reference; 0 measures none.
        kl_answer_tokens (`int`, *optional*, defaults to `64`): Longest of these answers.
    """

    precompute_ref_log_probs: bool = dataclasses.field(
        default=True, metadata={"help": "Score all pairs by the reference once, and keep the scores on disk."}
    )
    reference_cache_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "Folder of the kept scores; unset: beside output_dir, for all runs there."}
    )
    kl_prompts: int = dataclasses.field(
        default=64, metadata={"help": "Held-out prompts on which the KL to the reference is measured; 0 for none."}
    )
    kl_answer_tokens: int = dataclasses.field(default=64, metadata={"help": "Longest answer to them in tokens."})

    def check_inputs(self) -> None:
        """Refuse settings without a model or data, or that make no pairs or answers.

        Raises:
            ValueError: naming the setting.
        """
        super().check_inputs()
        self.check_own_answers()
        if self.kl_prompts < 0 or self.kl_answer_tokens < 1:
            raise ValueError(
                f"'kl_prompts' is {self.kl_prompts} and 'kl_answer_tokens' {self.kl_answer_tokens}, expected at least "
                "0 and at least 1"
            )


Arguments = DPOArguments


class PairDPOTrainer(LengthGrouping, DPOTrainer):
    """`DPOTrainer` on pairs that `tokenise` made: it would encode text by itself, control tokens in it included.

    TRL keeps precomputed log-probabilities where `datasets` keeps things, which for rows in memory is a folder that
    goes with the process: here they are kept in `reference_cache`.
    """

    def __init__(self, *args: Any, train_dataset: Any, reference_cache: ReferenceCache | None = None, **kwargs: Any):
        self.example_lengths = list(train_dataset["length"])
        self.reference_cache = reference_cache
        score_only_trained_positions()
        super().__init__(*args, train_dataset=train_dataset, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        assert self.reference_cache is not None
        needed = self._rows_of_training() if name == "train" else list(range(len(dataset)))
        rows = dataset if len(needed) == len(dataset) else dataset.select(needed)
        values = self.reference_cache.get(
            rows, lambda: self._reference_values(rows, batch_size), self.accelerator.is_main_process
        )
        for column in COLUMNS:
            scores = np.full(len(dataset), np.nan)  # of a row that training never meets
            scores[needed] = values[column]
            dataset = dataset.add_column(column, scores.tolist())
        return dataset

    def _rows_of_training(self) -> list[int]:
        """The rows that training meets: of a run of less than an epoch only the first of its first epoch."""
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        steps_of_epoch = -(-len(self.example_lengths) // batch)
        steps = self.args.max_steps
        if steps <= 0:
            steps = math.ceil(self.args.num_train_epochs * steps_of_epoch)
        return sorted(itertools.islice(self._get_train_sampler(), steps * batch))

    def _reference_values(self, dataset: Any, batch_size: int) -> Values:
        """The reference's log-probabilities of every row, the longest rows first; processes share the batches."""
        rank, processes = self.accelerator.process_index, self.accelerator.num_processes
        model = self.ref_model or self.model
        lengths = list(dataset["length"])
        order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        found: list[tuple[int, float, float]] = []
        for batch in batches[rank::processes]:
            inputs = self.data_collator([dataset[index] for index in batch])
            inputs = {name: tensor.to(self.accelerator.device) for name, tensor in inputs.items()}
            chosen, rejected = self.compute_ref_log_probs(model, inputs)
            found += zip(batch, chosen.tolist(), rejected.tolist(), strict=True)
        everywhere = sorted(gather_object(found))
        return {name: [row[number] for row in everywhere] for number, name in enumerate(COLUMNS, start=1)}


def run(arguments: DPOArguments) -> Path:
    """Align `model_name_or_path` on the preferences of `dataset`; write a complete model folder.

    Raises:
        ValueError: for unusable settings, model, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "dpo", _align)


def _align(arguments: DPOArguments, stage_run: StageRun) -> None:
    source = arguments.model_name_or_path
    tokenizer = load_tokenizer(source)
    max_length = context_length(source, arguments.max_length)
    settings = trainer_arguments(arguments, stage_run, max_length)
    settings.precompute_ref_log_probs = _precomputes(arguments)
    model = own = None
    if arguments.own_answer_questions:
        model = load_model(AutoModelForCausalLM, source, tokenizer)
        own = own_preferences(arguments, model, tokenizer, stage_run)
    pairs = load_examples(arguments, "preferences", preference_encoder(tokenizer), max_length, own)
    plan = _plan(arguments, stage_run, max(pairs.train["length"]), settings.precompute_ref_log_probs)
    model = model or load_model(AutoModelForCausalLM, source, tokenizer)
    cache = _reference_cache(arguments, stage_run, model) if settings.precompute_ref_log_probs else None
    trainer = PairDPOTrainer(
        model=model,
        args=settings,
        train_dataset=pairs.train,
        # Only what is evaluated while training: the reference would score it for nothing.
        eval_dataset=pairs.heldout if arguments.eval_strategy != "no" else None,
        processing_class=tokenizer,
        peft_config=make_lora_config(arguments, "CAUSAL_LM", model),
        reference_cache=cache,
    )
    first = pairs.train[: min(4, len(pairs.train))]
    sample = [prompt + answer for prompt, answer in zip(first["prompt_ids"], first["chosen_ids"], strict=True)]
    model, metrics = train_and_save(trainer, stage_run, tokenizer, sample)
    if not stage_run.is_main:
        return
    metrics |= {"pairs": len(pairs.train), "dropped_rows": pairs.dropped, "beta": arguments.beta}
    metrics["rejected_rows"] = pairs.rejected
    metrics["preferences"] = "dataset" if own is None else "own answers"
    metrics["planned_memory"] = plan
    if cache is not None:
        metrics["reference_log_probabilities"] = "from disk" if cache.found and not cache.computed else "computed"
    if pairs.heldout is not None:
        reference = load_model(AutoModelForCausalLM, source).to(model.device)
        metrics |= _measure(arguments, model, reference, tokenizer, pairs.heldout)
    _tell(stage_run, metrics)
    stage_run.finish(metrics)


def _precomputes(arguments: DPOArguments) -> bool:
    """Whether the reference scores all pairs before training: it must stand still and be whole on every process."""
    sharded = bool(arguments.fsdp) or arguments.deepspeed is not None or _launched_sharded()
    return bool(arguments.precompute_ref_log_probs) and not arguments.sync_ref_model and not sharded


def _launched_sharded() -> bool:
    return any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED"))


def _plan(arguments: DPOArguments, stage_run: StageRun, tokens: int, precomputes: bool) -> dict[str, int]:
    """Tell what memory training will take, warn or refuse where it is more than there is, and return the plan.

    Raises:
        ValueError: if no batch is small enough.
    """
    source = arguments.model_name_or_path
    with loading(source, "config"):
        config = AutoConfig.from_pretrained(source)
    plan = plan_memory(config, arguments, tokens, keeps_reference=not precomputes and arguments.peft == "none")
    available = machine_memory(arguments.use_cpu)
    if stage_run.is_main:
        print("\n".join(f"{stage_run.stage}: {line}" for line in plan.lines(available)), flush=True)
    warning = plan.check(available, source)
    if warning is not None and stage_run.is_main:
        logger.warning("%s", warning)
    return dataclasses.asdict(plan)


def _reference_cache(arguments: DPOArguments, stage_run: StageRun, model: Any) -> ReferenceCache:
    """The kept scores of `model`, before adapters are put on it."""
    folder = arguments.reference_cache_dir or stage_run.folder.absolute().parent / CACHE_FOLDER
    method = {
        "precision": next((name for name in ("bf16", "fp16") if getattr(arguments, name)), "fp32"),
        "device": arguments.device.type,
        "torch": torch.__version__,
        "ld_alpha": arguments.ld_alpha,
        "padding": arguments.pad_to_multiple_of,
    }
    return ReferenceCache(Path(folder), digest_model(model), method)


def _measure(arguments: DPOArguments, model: Any, reference: Any, tokenizer: Any, heldout: Any) -> dict[str, Any]:
    """Held-out preference accuracy, margins, and how far the model has moved from its reference."""
    options = (arguments.beta, arguments.per_device_eval_batch_size)
    chosen = implicit_rewards(model, reference, heldout, "chosen_ids", *options)
    rejected = implicit_rewards(model, reference, heldout, "rejected_ids", *options)
    metrics = preference_metrics(chosen, rejected)
    if arguments.kl_prompts:
        metrics |= heldout_divergence(
            model,
            reference,
            tokenizer,
            list(heldout["prompt_ids"]),
            arguments.kl_prompts,
            arguments.kl_answer_tokens,
            arguments.seed,
            arguments.per_device_eval_batch_size,
        )
    return metrics


def _tell(stage_run: StageRun, metrics: dict[str, Any]) -> None:
    if "preference_accuracy" not in metrics:
        return
    low, high = metrics["preference_accuracy_interval"]
    line = (
        f"prefers the better answer in {metrics['preference_accuracy']:.1%} ({low:.1%} to {high:.1%}) of "
        f"{metrics['heldout_pairs']} held-out pairs; chance {metrics['chance']:.0%}, mean margin "
        f"{metrics['heldout_margin']:+.3f}"
    )
    if "heldout_kl" in metrics:
        low, high = metrics["heldout_kl_interval"]
        line += (
            f"; KL to the reference {metrics['heldout_kl']:.3f} nats an answer ({low:.3f} to {high:.3f}, "
            f"{metrics['heldout_kl_prompts']} prompts)"
        )
    print(f"{stage_run.stage}: {line}", flush=True)


def implicit_rewards(
    policy: Any, reference: Any, pairs: Any, column: str, beta: float, batch_size: int
) -> list[float]:
    """beta (log policy(answer) - log reference(answer)) of each answer, summed over its tokens; end token included."""
    answers = list(zip(pairs["prompt_ids"], pairs[column], strict=True))
    ours = answer_log_probabilities(policy, answers, batch_size)
    theirs = answer_log_probabilities(reference, answers, batch_size)
    return [beta * (mine - other) for mine, other in zip(ours, theirs, strict=True)]


def preference_metrics(chosen: list[float], rejected: list[float]) -> dict[str, Any]:
    """How often the implicit reward prefers the chosen answer (a tie is wrong), and by how much."""
    margins = np.subtract(chosen, rejected)
    accuracy, spread = wilson(int((margins > 0).sum()), len(margins)), bootstrap_mean(margins.tolist())
    return {
        "preference_accuracy": accuracy.mean,
        "preference_accuracy_interval": [accuracy.low, accuracy.high],
        "heldout_pairs": accuracy.n,
        "chance": CHANCE,
        "heldout_margin": float(margins.mean()),
        "heldout_margin_interval": [spread.low, spread.high],
        "heldout_chosen_reward": float(np.mean(chosen)),
        "heldout_rejected_reward": float(np.mean(rejected)),
    }
