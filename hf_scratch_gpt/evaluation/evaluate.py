"""The stage `evaluate`: what each stage's model can do, and whether it is better than the one before.

    scratch-gpt evaluate --output_dir runs/my/evaluate --dataset_dir runs/my/prepare \
        --model_names base sft dpo --models runs/my/pretrain runs/my/sft runs/my/dpo

Every model reads the same held-out text and answers the same held-out questions. The folder gets `metrics.json`,
`answers.jsonl` (every greedy answer of every model), `samples.json` (one question a family) and `attention.json`.
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_scratch_gpt.evaluation.arguments import EvaluateArguments
from hf_scratch_gpt.runs import StageRun, read_json, write_json, write_text
from hf_scratch_gpt.runs.process import set_up_stage
from hf_scratch_gpt.runs.training import progress_bar

Arguments = EvaluateArguments


def run(arguments: EvaluateArguments) -> Path:
    """Measure the models and write the folder; a model that an interrupted run has measured is not measured again."""
    _check_inputs(arguments)
    with StageRun(arguments, "evaluate") as run:
        if run.finished:
            return run.folder
        set_up_stage(run, "fp32")
        from hf_scratch_gpt.evaluation.comparison import summarise
        from hf_scratch_gpt.evaluation.material import load_material
        from hf_scratch_gpt.evaluation.measure import Measurer, measure_reward_model
        from hf_scratch_gpt.evaluation.models import check_one_label

        if arguments.reward_model:
            check_one_label(arguments.reward_model)
        material = load_material(arguments)
        measurer = Measurer(arguments, material)
        records: dict[str, Any] = {}
        with progress_bar("evaluate", len(arguments.models)) as bar:
            for step, (name, folder) in enumerate(zip(arguments.model_names, arguments.models, strict=True), start=1):
                bar.set_postfix({"model": name})
                records[name] = _measure_once(run, measurer, step, name, folder)
                bar.update()
        metrics = summarise(records, material.rows, arguments.reference if len(records) > 1 else None)
        metrics |= {"samples_per_prompt": arguments.samples_per_prompt, "temperature": arguments.temperature}
        if arguments.reward_model:
            metrics["reward_model"] = measure_reward_model(arguments.reward_model, material.pairs)
        _write_answers(run.folder, material.rows, records)
        _write_attention(run.folder, arguments)
        run.finish(metrics)
    return run.folder


def _check_inputs(arguments: EvaluateArguments) -> None:
    """Name what is missing before a finished run of other settings is set aside."""
    from hf_scratch_gpt.evaluation.models import require_folder

    for folder in [*arguments.models, *([arguments.reward_model] if arguments.reward_model else [])]:
        require_folder(folder)
    if arguments.dataset_dir and not Path(arguments.dataset_dir).is_dir():
        raise FileNotFoundError(
            f"{arguments.dataset_dir}: no such folder; 'dataset_dir' is that of the stage 'prepare'"
        )


def _measure_once(run: StageRun, measurer: Any, step: int, name: str, folder: str) -> dict[str, Any]:
    kept = run.checkpoints / f"{name}.json"
    if kept.is_file():
        return read_json(kept)
    began = time.monotonic()
    record = measurer.measure(name, folder)
    exact = sum(answer["exact"] for answer in record["greedy"]) / len(record["greedy"])
    run.truncate_curve(step - 1)
    run.log(step=step, model=name, exact_match=exact, seconds_taken=round(time.monotonic() - began, 3))
    run.checkpoints.mkdir(exist_ok=True)
    write_json(kept, record)
    return record


def _write_answers(folder: Path, rows: Sequence[dict[str, Any]], records: dict[str, Any]) -> None:
    """`answers.jsonl` with all greedy answers, and `samples.json` with one question of each family."""
    from hf_scratch_gpt.data.tasks import report_prompts

    told = [
        {
            "id": row["id"],
            "family": row["family"],
            "prompt": row["prompt"],
            "answer": row["answer"],
            "answers": {name: record["greedy"][index] for name, record in records.items()},
        }
        for index, row in enumerate(rows)
    ]
    write_text(folder / "answers.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in told))
    families = {row["family"] for row in rows}
    write_json(folder / "samples.json", report_prompts(told, len(families)))


def _write_attention(folder: Path, arguments: EvaluateArguments) -> None:
    from hf_scratch_gpt.evaluation.attention import attention_map
    from hf_scratch_gpt.evaluation.models import load_model

    name, source = arguments.model_names[-1], arguments.models[-1]
    model, tokenizer = load_model(source, attn_implementation="eager")
    write_json(folder / "attention.json", {"model": name, **attention_map(model, tokenizer, arguments.attention_text)})
