"""A whole road as the stages leave it, lineage, recipes and model files included, without training anything."""

import json

import yaml
from reporting_road import write_evaluation, write_training

from hf_scratch_gpt.runs import write_json
from hf_scratch_gpt.runs.identity import model_files

STAGES = ("tokenizer", "prepare", "pretrain", "sft", "reward", "dpo", "ppo", "evaluate", "classify")
MODELS = ("pretrain", "sft", "classify", "reward", "dpo", "ppo")
SOURCE = "/home/somebody/secret/my|texts"
MADE_FROM = {
    "tokenizer": {"sources": [SOURCE, "python-docs"]},
    "prepare": {"tokenizer_dir": "tokenizer", "sources": [SOURCE, "python-docs"]},
    "pretrain": {"dataset_dir": "prepare"},
    "sft": {"model_name_or_path": "pretrain", "dataset": "prepare"},
    "reward": {"model_name_or_path": "sft", "dataset": "prepare"},
    "dpo": {"model_name_or_path": "sft", "dataset": "prepare"},
    "ppo": {"model_name_or_path": "sft", "reward_model": "reward", "dataset": "prepare"},
    "classify": {"model_name_or_path": "pretrain", "dataset": SOURCE},
    "evaluate": {"models": ["pretrain", "sft", "dpo", "ppo"], "dataset_dir": "prepare", "reward_model": "reward"},
}
SIZES = {
    "tokenizer": {"train_documents": 1210},
    "prepare": {
        "heldout_tokens": 151_000,
        "by_source": [
            {
                **{"source": SOURCE, "train_documents": 210, "train_tokens": 50_000, "train_bytes": 180_000},
                **{"heldout_documents": 11, "heldout_tokens": 1_000, "heldout_bytes": 4_000},
            },
            {
                **{"source": "python-docs", "license": "PSF-2.0", "language": ["en", "code"]},
                "license_link": "https://docs.python.org/3/license.html",
                **{"train_documents": 1000, "train_tokens": 3_000_000, "train_bytes": 11_000_000},
                **{"heldout_documents": 69, "heldout_tokens": 150_000, "heldout_bytes": 540_000},
            },
        ],
        "tasks": {
            **{"train": {"words": 700, "raises": 300}, "heldout": {"words": 40, "raises": 20}},
            **{"preferences_train": {"words": 500}, "preferences_heldout": {"words": 50}},
        },
    },
    "pretrain": {
        **{"steps": 604, "heldout_documents": 80, "heldout_bytes": 300_000, "objective": "causal", "epochs": 1.571},
    },
    "sft": {
        **{"parameters": 4_100_000, "steps": 400, "tokens": 1_298_968, "heldout_examples": 997, "heldout_loss": 0.676},
        **{"heldout_loss_interval": [0.616, 0.735], "heldout_token_accuracy": 0.871},
        "heldout_token_accuracy_interval": [0.86, 0.882],
    },
    "classify": {"parameters": 4_098_560, "steps": 420, "tokens": 400_123},
    "reward": {"parameters": 4_100_257, "steps": 401, "pairs": 9952, "length_correlation": -0.138},
    "dpo": {"parameters": 4_100_000, "steps": 45, "pairs": 1459, "preferences": "own answers"},
    "ppo": {"parameters": 4_100_000, "steps": 48, "episodes": 1536, "checker_weight": 4.0},
}
RECIPES = {
    "pretrain": {"learning_rate": 0.008, "save_steps": 77},
    "sft": {"lora_r": 64, "lora_modules_to_save": ["model.norm"]},
}


def energy(number):
    """An energy record: `number` thousandths of a kWh of the processor, and as many millionths of the memory."""
    part = {"method": "estimated from the cores held", "source": "https://example.org/method"}
    return {
        "kilowatt_hours": number * 1.001e-3,
        "cpu": {**part, "kilowatt_hours": number * 1e-3, "idle_watts": 0.71, "busy_watts": 4.26},
        "memory": {**part, "method": "estimated", "kilowatt_hours": number * 1e-6, "watts_per_gigabyte": 0.392},
    }


def describe(root, value):
    if isinstance(value, list):
        return [describe(root, item) for item in value]
    is_run = value in STAGES
    return {"path": str(root / value), "run_id": f"id-{value}"} if is_run else {"path": value}


def change(root, stage, edit):
    """Apply `edit` to a stage's `metrics.json`."""
    path = root / stage / "metrics.json"
    report = json.loads(path.read_text(encoding="utf-8"))
    edit(report)
    write_json(path, report)


def write_card_road(root, skills=None):
    """All stages, with everything that a card says of them."""
    write_training(root)
    write_evaluation(root, skills)
    for number, stage in enumerate(STAGES, start=1):
        folder = root / stage
        if stage in MODELS:
            (folder / "model.safetensors").write_bytes(stage.encode())
            write_json(folder / "config.json", {"max_position_embeddings": 256, "vocab_size": 4096})

        def complete(report, stage=stage, folder=folder, number=number):
            report["inputs"] = {name: describe(root, value) for name, value in MADE_FROM[stage].items()}
            report["energy"] = energy(number)
            report["files"] = model_files(folder)
            report["environment"] |= {"hf_scratch_gpt": "0.1.0", "transformers": "5.23.0"}
            report["metrics"] |= SIZES.get(stage, {})

        change(root, stage, complete)
        recipe = {"output_dir": str(folder), **MADE_FROM[stage], **RECIPES.get(stage, {})}
        (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return root
