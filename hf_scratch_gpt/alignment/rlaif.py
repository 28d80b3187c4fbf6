"""Preferences from feedback of an AI, a function or a person: `scratch-gpt rlaif recipe.yaml`.

The policy answers each question several times, and the answers are ranked: by a judge that compares them two at a time
(Bai et al. 2022, https://huggingface.co/papers/2212.08073; Lee et al. 2023,
https://huggingface.co/papers/2309.00267), by what scores them, or by a person, for whom `to_rank.jsonl` is written.
The run folder gets `preferences.jsonl`, which `dpo` and `reward` take as their `dataset`, and `rankings.jsonl` with
all answers to a question, the best first.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from hf_scratch_gpt.alignment.endpoint import EndpointJudge
from hf_scratch_gpt.alignment.judges import JUDGE_PROMPT, FunctionJudge, Judge, ModelJudge
from hf_scratch_gpt.alignment.measuring import keep_fitting, read_checked_rows
from hf_scratch_gpt.alignment.person import rankings_of_person
from hf_scratch_gpt.alignment.ranking import (
    Ranking,
    ask_judge,
    comparable,
    gold_metrics,
    judge_metrics,
    pairs_by_score,
    rank_by_verdicts,
)
from hf_scratch_gpt.alignment.sampling import SamplingArguments, in_parts, sample_answers, unique_prompts
from hf_scratch_gpt.alignment.scoring import Row, ScoringArguments, build_scorers, total_scores
from hf_scratch_gpt.evaluation.mode import context_length_of
from hf_scratch_gpt.evaluation.models import load_model
from hf_scratch_gpt.evaluation.questions import pick
from hf_scratch_gpt.runs import StageArguments, StageRun, write_text
from hf_scratch_gpt.runs.process import set_up_stage

PREFERENCES_FILE, RANKINGS_FILE = "preferences.jsonl", "rankings.jsonl"
_QUESTIONS_A_PART = 16  # judged, then kept: what a kill can lose
_MOST_UNREADABLE = 0.5


@dataclasses.dataclass
class JudgeArguments:
    """Who ranks the answers, beside what `ScoringArguments` name.

    Args:
        judge_model (`str`, *optional*): Folder or Hub id of a local chat model.
        judge_url (`str`, *optional*): Base URL of an OpenAI-compatible endpoint, such as `https://host/v1`.
        judge_name (`str`, *optional*): Name of the model there.
        judge_key_variable (`str`, *optional*): Environment variable that holds the endpoint's key.
        judge_timeout (`float`, *optional*, defaults to `60.0`): Seconds for one request.
        judge_retries (`int`, *optional*, defaults to `4`): Further tries after a failure that may pass.
        judge_requests (`int`, *optional*, defaults to `4`): Requests at a time.
        judge_function (`str`, *optional*): `module:function` of the user's own, called with lists of `prompts`,
            `firsts` and `seconds`; it gives the chance from 0 to 1 that each first answer is the better one.
        judge_prompt (`str`, *optional*): What a judge model reads, with `{question}`, `{first}` and `{second}`.
        judge_margin (`float`, *optional*, defaults to `0.0`): A pair whose two chances differ by no more than this is
            no preference.
        score_margin (`float`, *optional*, defaults to `0.0`): Answers whose scores differ by no more than this are no
            preference. What a weak reward model says of two like answers is noise: beside a checker of weight w, a
            margin below w keeps the pairs that the checker decides, and those that the reward model is sure of.
        person (`bool`, *optional*, defaults to `False`): A person ranks: the run writes `to_rank.jsonl` and stops
            until `ranked.jsonl` is there.
    """

    judge_model: str = dataclasses.field(default="", metadata={"help": "Folder or Hub id of a local judge."})
    judge_url: str = dataclasses.field(default="", metadata={"help": "Base URL of an OpenAI-compatible endpoint."})
    judge_name: str = dataclasses.field(default="", metadata={"help": "Name of the model at judge_url."})
    judge_key_variable: str = dataclasses.field(
        default="", metadata={"help": "Environment variable that holds the endpoint's key."}
    )
    judge_timeout: float = dataclasses.field(default=60.0, metadata={"help": "Seconds for one request."})
    judge_retries: int = dataclasses.field(default=4, metadata={"help": "Further tries after a failure."})
    judge_requests: int = dataclasses.field(default=4, metadata={"help": "Requests at a time."})
    judge_function: str = dataclasses.field(
        default="", metadata={"help": "A function of yours as module:function that compares answers."}
    )
    judge_prompt: str = dataclasses.field(
        default=JUDGE_PROMPT, metadata={"help": "What a judge reads, with {question}, {first} and {second}."}
    )
    judge_margin: float = dataclasses.field(
        default=0.0, metadata={"help": "A pair whose chances differ by no more than this is no preference."}
    )
    score_margin: float = dataclasses.field(
        default=0.0, metadata={"help": "Answers whose scores differ by no more than this are no preference."}
    )
    person: bool = dataclasses.field(
        default=False, metadata={"help": "A person ranks: to_rank.jsonl is written and ranked.jsonl awaited."}
    )

    def check_judge(self) -> None:
        """Refuse no judge, more than one, or settings that cannot work.

        Raises:
            ValueError: naming the settings.
        """
        judges = [name for name in ("judge_model", "judge_url", "judge_function", "person") if getattr(self, name)]
        scored = [name for name in ("reward_model", "reward_function", "checker_weight") if getattr(self, name)]
        if len(judges) > 1 or (judges and scored):
            raise ValueError(f"more than one judge is given: {', '.join(judges + scored)}; leave all but one out")
        if not judges and not scored:
            raise ValueError(
                "nobody ranks the answers: give 'judge_model', 'judge_url', 'judge_function' or 'person', or what "
                "scores them ('reward_model', 'reward_function', 'checker_weight')"
            )
        for place in ("{question}", "{first}", "{second}"):
            if place not in self.judge_prompt:
                raise ValueError(f"'judge_prompt' has no {place}")
        for name, least in (("judge_retries", 0), ("judge_requests", 1), ("judge_margin", 0), ("score_margin", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"'{name}' is {getattr(self, name)}, expected at least {least}")
        for name, serves in (("judge_margin", judges and not self.person), ("score_margin", scored)):
            if getattr(self, name) and not serves:
                raise ValueError(f"'{name}' changes nothing where {', '.join(judges + scored)} ranks; leave it out")

    def make_judge(self) -> Judge | None:
        """The judge that is asked about pairs, or `None` where answers are scored by themselves.

        Raises:
            OSError, ValueError: if it cannot be had.
        """
        if self.judge_model:
            return ModelJudge(self.judge_model, self.judge_prompt)
        if self.judge_url:
            return EndpointJudge(
                self.judge_url,
                self.judge_name,
                self.judge_key_variable,
                self.judge_prompt,
                self.judge_timeout,
                self.judge_retries,
                self.judge_requests,
            )
        return FunctionJudge(self.judge_function) if self.judge_function else None


@dataclasses.dataclass
class RLAIFArguments(SamplingArguments, JudgeArguments, ScoringArguments, StageArguments):
    """Settings of `rlaif`: who answers, how often, and who ranks.

    Args:
        model_name_or_path (`str`): The policy that answers.
        dataset (`str`): A `prepare` folder, a local file or a `datasets` id with prompts.
        least_pairs (`int`, *optional*, defaults to `1`): With fewer preferences in the end, the stage fails.
    """

    input_fields: ClassVar[tuple[str, ...]] = ("model_name_or_path", "dataset", "judge_model", "reward_model")

    model_name_or_path: str = dataclasses.field(default="", metadata={"help": "The policy that answers."})
    dataset: str = dataclasses.field(default="", metadata={"help": "A prepare folder, a file or a datasets id."})
    least_pairs: int = dataclasses.field(default=1, metadata={"help": "With fewer preferences, the stage fails."})

    def check_inputs(self) -> None:
        """Refuse settings without a model, data or a judge.

        Raises:
            ValueError: naming the setting.
        """
        for name in ("model_name_or_path", "dataset"):
            if not getattr(self, name):
                raise ValueError(f"'{name}' is missing: {type(self).__dataclass_fields__[name].metadata['help']}")
        self.check_sampling(least=2)
        self.check_judge()


Arguments = RLAIFArguments


def run(arguments: RLAIFArguments) -> Path:
    """Sample answers, have them ranked, and write the preferences.

    Raises:
        ValueError: for unusable settings, model, judge or data (naming the row), or if no preference comes of it.
        OSError: if a file is missing, an endpoint cannot be reached, or the disk is full.
        Interrupted: if a signal stopped it, or a person's ranking is awaited; the same call continues it.
    """
    arguments.check_inputs()
    with StageRun(arguments, "rlaif") as stage_run:
        if not stage_run.finished and stage_run.is_main:  # other processes have nothing to do
            set_up_stage(stage_run, "fp32")
            _rank(arguments, stage_run)
        return stage_run.folder


def _rank(arguments: RLAIFArguments, stage_run: StageRun) -> None:
    judge = arguments.make_judge()  # what is wrong with it is told before anything is sampled
    rows = unique_prompts(read_checked_rows(arguments.dataset, "train"))
    model, tokenizer = load_model(arguments.model_name_or_path)
    context = context_length_of(model) or sys.maxsize
    rows, _ = keep_fitting(rows, tokenizer, arguments.max_completion_length, context, arguments.dataset)
    questions = pick(rows, arguments.questions, arguments.seed)
    sampled = sample_answers(stage_run, "answers", model, tokenizer, questions, **arguments.sampling())
    del model
    pairs = [(row, comparable(answers)) for row, answers in zip(questions, sampled, strict=True)]
    asked = [(row, texts) for row, texts in pairs if len(texts) > 1]
    metrics: dict[str, Any] = {
        "questions": len(questions),
        "answers": sum(map(len, sampled)),
        "questions_without_choice": len(questions) - len(asked),
    }
    if not asked:
        raise ValueError(
            f"{arguments.dataset}: no question got two different answers that ended within "
            f"{arguments.max_completion_length} tokens; ask more often, or raise 'max_completion_length'"
        )
    rows, texts = [row for row, _ in asked], [texts for _, texts in asked]
    rankings, told = _rankings(arguments, stage_run, judge, rows, texts)
    metrics |= told | gold_metrics(rankings)
    metrics["pairs"] = _write(stage_run.folder, rankings)
    if metrics["pairs"] < arguments.least_pairs:
        raise ValueError(
            f"{stage_run.folder}: {metrics['pairs']} preferences came of {len(rankings)} questions, expected at least "
            f"{arguments.least_pairs}; ask more questions, answer them more often, or take another judge"
        )
    stage_run.finish(metrics)


def _rankings(
    arguments: RLAIFArguments, stage_run: StageRun, judge: Judge | None, rows: list[Row], texts: list[list[str]]
) -> tuple[list[Ranking], dict[str, Any]]:
    if arguments.person:
        rankings = rankings_of_person(stage_run, rows, texts)
        return rankings, {"ranked_by": "person", "questions_not_ranked": len(rows) - len(rankings)}
    if judge is None:
        return _score(arguments, rows, texts), {"ranked_by": "score"}

    def work(part: Sequence[int]) -> list[Any]:
        return ask_judge(judge, [rows[index] for index in part], [texts[index] for index in part])

    verdicts = in_parts(stage_run, "verdicts", range(len(rows)), _QUESTIONS_A_PART, work)
    metrics = judge_metrics([verdict for told in verdicts for verdict in told])
    if metrics["unreadable_comparisons"] > _MOST_UNREADABLE * metrics["comparisons"]:
        raise ValueError(
            f"{stage_run.folder}: {metrics['unreadable_comparisons']} of {metrics['comparisons']} comparisons got a "
            "reply that says neither A nor B alone, or are too long; take another judge, or change 'judge_prompt'"
        )
    rankings = [
        rank_by_verdicts(row, answers, told, arguments.judge_margin)
        for row, answers, told in zip(rows, texts, verdicts, strict=True)
    ]
    return rankings, {"ranked_by": "judge", **metrics}


def _score(arguments: RLAIFArguments, rows: list[Row], texts: list[list[str]]) -> list[Ranking]:
    scorers = build_scorers(arguments, rows)
    rankings = []
    for row, answers in zip(rows, texts, strict=True):
        scores = total_scores(scorers, [row] * len(answers), answers, [True] * len(answers))
        rankings.append(Ranking(row, answers, scores, pairs_by_score(scores, arguments.score_margin)))
    return rankings


def _write(folder: Path, rankings: Sequence[Ranking]) -> int:
    """Write `rankings.jsonl` and `preferences.jsonl`; returns the number of preferences.

    A question whose answers are all as good as each other is in neither: it teaches nothing.
    """
    preferences = [pair for ranking in rankings for pair in ranking.preferences()]
    records = [ranking.record() for ranking in rankings if len(set(ranking.scores)) > 1]
    for name, lines in ((RANKINGS_FILE, records), (PREFERENCES_FILE, preferences)):
        write_text(folder / name, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    return len(preferences)
