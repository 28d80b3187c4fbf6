"""Best of n, and tuning on it: `scratch-gpt best_of_n recipe.yaml`.

The policy answers each question n times and the best scored answer is kept: `best_of_n.jsonl` is a data set for `sft`,
and with `tune` the policy is tuned on it here (rejection sampling fine-tuning; Touvron et al. 2023,
https://huggingface.co/papers/2307.09288, Dong et al. 2023, https://huggingface.co/papers/2304.06767). On held-out
questions, the metrics tell what the best of 1, 2, 4, ... n answers is worth, beside how far it can have moved.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM

from hf_scratch_gpt.alignment.measuring import (
    MeasuringArguments,
    keep_fitting,
    load_prompt_rows,
    measure_policy,
    score_answers,
    with_interval,
)
from hf_scratch_gpt.alignment.sampling import SamplingArguments, sample_answers, unique_prompts
from hf_scratch_gpt.alignment.scoring import CHECKER, Row, Scorer, ScoringArguments, build_scorers, total_scores
from hf_scratch_gpt.alignment.selection import best_of, kl_bound, powers_of_two
from hf_scratch_gpt.evaluation.generation import Answer
from hf_scratch_gpt.evaluation.intervals import bootstrap_mean
from hf_scratch_gpt.evaluation.questions import pick
from hf_scratch_gpt.finetuning.arguments import make_lora_config, trainer_arguments
from hf_scratch_gpt.finetuning.models import check_model_source, context_length, load_model, load_tokenizer
from hf_scratch_gpt.finetuning.sft import ConversationTrainer, SFTArguments
from hf_scratch_gpt.finetuning.tokenise import conversation_encoder, tokenise
from hf_scratch_gpt.finetuning.trainers import run_stage, train_and_save
from hf_scratch_gpt.runs import StageRun, write_text

CHOSEN_FILE = "best_of_n.jsonl"


@dataclasses.dataclass
class BestOfNArguments(SamplingArguments, ScoringArguments, MeasuringArguments, SFTArguments):
    """Settings of `best_of_n`: what is sampled and scored, and `SFTArguments` for the tuning.

    Args:
        tune (`bool`, *optional*, defaults to `True`): Tune the policy on the chosen answers; off only writes them.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("model_name_or_path", "reward_model", "dataset", "eval_dataset")

    tune: bool = dataclasses.field(
        default=True, metadata={"help": "Tune the policy on the chosen answers; off only writes them."}
    )

    def check_inputs(self) -> None:
        """Refuse settings without a model, data, or anything that scores.

        Raises:
            ValueError: naming the setting.
        """
        super().check_inputs()
        self.check_scoring()
        self.check_sampling(least=1)


Arguments = BestOfNArguments
Sampled = Sequence[Sequence[Answer]]


def run(arguments: BestOfNArguments) -> Path:
    """Choose the best of n answers to each question of `dataset`, write them, and tune the policy on them.

    Raises:
        ValueError: for unusable settings, models, or data (naming the row).
        OSError: if a file is missing or the disk is full.
        Interrupted: if a signal stopped it; the same call continues it.
    """
    return run_stage(arguments, "best_of_n", _choose_and_tune)


def _choose_and_tune(arguments: BestOfNArguments, stage_run: StageRun) -> None:
    source = arguments.model_name_or_path
    if arguments.reward_model:
        check_model_source(arguments.reward_model)
    tokenizer = load_tokenizer(source)
    max_length = context_length(source, arguments.max_length)
    settings = trainer_arguments(arguments, stage_run, max_length)
    rows, heldout = load_prompt_rows(arguments)
    rows, heldout = _keep_fitting(arguments, tokenizer, max_length, rows, heldout)
    questions = pick(unique_prompts(rows), arguments.questions, arguments.seed)
    scorers = build_scorers(arguments, questions + heldout)
    model = load_model(AutoModelForCausalLM, source, tokenizer).to(arguments.device)

    sampled = sample_answers(stage_run, "answers", model, tokenizer, questions, **arguments.sampling())
    scores = score_each(questions, sampled, scorers)
    chosen = choose(questions, sampled, scores)
    if not chosen:
        raise ValueError(
            f"{arguments.dataset}: none of the {len(questions)} questions got an answer that ended within "
            f"{arguments.max_completion_length} tokens; raise 'max_completion_length' or tune the model first"
        )
    metrics = describe_choice(chosen, scores)
    if stage_run.is_main:
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in chosen)
        write_text(stage_run.folder / CHOSEN_FILE, "".join(lines))
    if heldout:
        asked = unique_prompts(heldout)
        others = sample_answers(stage_run, "held-out", model, tokenizer, asked, **arguments.sampling())
        metrics["heldout_by_n"] = worth_by_n(asked, others, score_each(asked, others, scorers))
    if arguments.tune:
        model, trained = _tune(arguments, settings, stage_run, model, tokenizer, chosen, max_length)
        metrics |= trained
        if heldout and stage_run.is_main:
            measured, answers = measure_policy(arguments, model, tokenizer, heldout, scorers)
            metrics |= measured
            answers.write(stage_run.folder)
    if stage_run.is_main:
        stage_run.finish(metrics)


def _keep_fitting(
    arguments: BestOfNArguments, tokenizer: Any, max_length: int, rows: list[Row], heldout: list[Row]
) -> tuple[list[Row], list[Row]]:
    options = (tokenizer, arguments.max_completion_length, max_length)
    rows, _ = keep_fitting(rows, *options, f"{arguments.dataset} (training)", arguments.allow_dropped_rows)
    if heldout:
        origin = f"{arguments.eval_dataset or arguments.dataset} (held out)"
        heldout, _ = keep_fitting(heldout, *options, origin, arguments.allow_dropped_rows)
    return rows, heldout


def _tune(
    arguments: BestOfNArguments,
    settings: Any,
    stage_run: StageRun,
    model: Any,
    tokenizer: Any,
    chosen: list[Row],
    max_length: int,
) -> tuple[Any, dict[str, Any]]:
    origin = str(stage_run.folder / CHOSEN_FILE)
    examples, _ = tokenise(chosen, conversation_encoder(tokenizer), origin, max_length, arguments.allow_dropped_rows)
    trainer = ConversationTrainer(
        model=model,
        args=settings,
        train_dataset=examples,
        processing_class=tokenizer,
        peft_config=make_lora_config(arguments, "CAUSAL_LM", model),
    )
    return train_and_save(trainer, stage_run, tokenizer, examples[: min(4, len(examples))]["input_ids"])


def score_each(rows: Sequence[Row], sampled: Sampled, scorers: Sequence[tuple[Scorer, float]]) -> list[list[float]]:
    """The total score of every answer, by question."""
    repeated = [row for row, answers in zip(rows, sampled, strict=True) for _ in answers]
    flat = [answer for answers in sampled for answer in answers]
    totals = total_scores(scorers, repeated, [answer.text for answer in flat], [answer.ended for answer in flat])
    parts, start = [], 0
    for answers in sampled:
        parts.append(totals[start : start + len(answers)])
        start += len(answers)
    return parts


def order_of(answers: Sequence[Answer], scores: Sequence[float]) -> list[float]:
    """Places of the answers (higher is better): any that ended stands above all that did not, then by score."""
    ranked = sorted(range(len(answers)), key=lambda index: (answers[index].ended, scores[index]))
    places = [0.0] * len(answers)
    for place, index in enumerate(ranked):
        places[index] = float(place)
    return places


def choose(rows: Sequence[Row], sampled: Sampled, scores: Sequence[Sequence[float]]) -> list[Row]:
    """Each row with its best scored answer as `completion`; a question without an answer that ended is left out."""
    chosen = []
    for row, answers, its_scores in zip(rows, sampled, scores, strict=True):
        places = order_of(answers, its_scores)
        best = max(range(len(answers)), key=places.__getitem__)
        if answers[best].ended and answers[best].text.strip():
            completion = [{"role": "assistant", "content": answers[best].text}]
            chosen.append({**row, "completion": completion, "score": its_scores[best], "n": len(answers)})
    return chosen


def describe_choice(chosen: Sequence[Row], scores: Sequence[Sequence[float]]) -> dict[str, Any]:
    """How many answers were chosen, and how far their scores are above those of all answers."""
    every = [score for its_scores in scores for score in its_scores]
    count = max(len(its_scores) for its_scores in scores)
    return {
        "questions": len(scores),
        "answers": len(every),
        "answers_per_question": count,
        "chosen": len(chosen),
        "questions_without_end": len(scores) - len(chosen),
        "score_of_all": sum(every) / len(every),
        "score_of_chosen": sum(row["score"] for row in chosen) / len(chosen),
        "kl_bound": kl_bound(count),
    }


def worth_by_n(rows: Sequence[Row], sampled: Sampled, scores: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """For 1, 2, 4, ... n: the score, the share ended and (for task questions) the gold reward of the best answer."""
    repeated = [row for row, answers in zip(rows, sampled, strict=True) for _ in answers]
    flat = [answer for answers in sampled for answer in answers]
    gold = score_answers(repeated, flat, []).get(CHECKER)
    size = len(sampled[0])
    places = [order_of(answers, its_scores) for answers, its_scores in zip(sampled, scores, strict=True)]
    told = []
    for count in powers_of_two(size):
        entry: dict[str, Any] = {"n": count, "kl_bound": kl_bound(count)}
        values = {
            "score": scores,
            "share_ended": [[float(answer.ended) for answer in answers] for answers in sampled],
        }
        if gold is not None:
            values["gold"] = [gold[start : start + size] for start in range(0, len(gold), size)]
        for name, by_question in values.items():
            worth = [best_of(own, its_places, count) for own, its_places in zip(by_question, places, strict=True)]
            entry |= with_interval(name, bootstrap_mean(worth))
        told.append(entry)
    return told
