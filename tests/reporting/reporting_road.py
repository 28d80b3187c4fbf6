"""The folders of a whole road, as the stages leave them, without training anything."""

import json
import math
import random

from hf_scratch_gpt.evaluation.comparison import summarise
from hf_scratch_gpt.runs import write_json

ENVIRONMENT = {"python": "3.11.2", "system": "Linux x86_64", "cpu": "A CPU", "cores": 2, "torch": "2.13.0"}
FAMILIES = ("module_of_a_name", "first_line", "signature", "arithmetic", "words")


def write_run(root, stage, metrics, number, seconds=12.5, curve=(), inputs=None, folder=None):
    """A finished run's folder with `metrics.json` and `curve.jsonl`."""
    path = root / (folder or stage)
    path.mkdir(parents=True)
    report = {
        "stage": stage,
        "fingerprint": f"print-{stage}",
        "run_id": f"id-{folder or stage}",
        "started_at": "2026-01-01T00:00:00+00:00",
        "seconds": seconds,
        "peak_rss_bytes": 2**30 + number,
        "finished_at": f"2026-01-01T00:{number:02d}:00+00:00",
        "inputs": inputs or {},
        "environment": ENVIRONMENT,
        "metrics": metrics,
    }
    write_json(path / "metrics.json", report)
    (path / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in curve), encoding="utf-8")
    return path


def make_rows(count=60):
    return [
        {
            "id": f"{FAMILIES[index % 5]}-{index}",
            "family": FAMILIES[index % 5],
            "prompt": [{"role": "user", "content": f"def f(a, b=1):\n    ...\nQuestion <{index}> & what is it?"}],
            "answer": f"answer {index % 17}",
        }
        for index in range(count)
    ]


def make_record(rows, skill, seed, kl=None):
    """A model that knows a share `skill` of the answers; some questions are easier than others."""
    draw = random.Random(seed)

    def judged(row, index, noise):
        right = (index * 7919 % 100) / 100 < skill + noise
        return {
            "text": row["answer"] if right else f"wrong <b>{seed}</b>",
            "ended": draw.random() < 0.98,
            "tokens": 7,
            "exact": right,
            "gold": 1.0 if right else 0.1,
            "reward": 1.0 if right else -1.0,
            **({} if kl is None else {"kl": draw.expovariate(1 / kl)}),
        }

    return {
        "parameters": 4_100_000,
        "text": {"mean": 1.6 + seed / 50, "low": 1.55 + seed / 50, "high": 1.65 + seed / 50, "n": 80, "bytes": 98_002},
        "greedy": [judged(row, index, 0.0) for index, row in enumerate(rows)],
        "few_shot": [{"text": "", "exact": index % 9 == 0, "examples": 3} for index in range(len(rows))],
        "sampled": [[judged(row, index, draw.uniform(-0.2, 0.1)) for _ in range(4)] for index, row in enumerate(rows)],
        "pair_log_ratios": [draw.gauss(skill, 1) for _ in range(100)],
    }


def _attention(layers=4, heads=4, text="The sorted() function returns <a new> list."):
    tokens = ["The", " sorted", "()", " function", " returns", " <", "a", " new", ">", " list", "."]
    draw, weights = random.Random(0), []
    for layer in range(layers):
        weights.append([])
        for head in range(heads):
            table = []
            for row in range(len(tokens)):
                raw = [
                    math.exp(draw.gauss(0, 1) - abs(row - column - head) * (layer + 1) / 2)
                    for column in range(row + 1)
                ]
                table.append([round(value / sum(raw), 4) for value in raw] + [0.0] * (len(tokens) - row - 1))
            weights[-1].append(table)
    return {"model": "ppo", "text": text, "tokens": tokens, "layers": layers, "heads": heads, "weights": weights}


def _curve(keys, points, noise=0.05):
    """Rows in which each key goes from its first to its last value, with noise."""
    draw, rows = random.Random(1), []
    for index in range(points):
        faded = math.exp(-4 * index / points)
        row = {"step": (index + 1) * 10, "seconds": float(index)}
        for key, (first, last) in keys.items():
            row[key] = last + (first - last) * faded + draw.gauss(0, noise * abs(first - last))
        rows.append(row)
    return rows


def write_training(root):
    """The stages before the evaluation."""
    write_run(
        root,
        "tokenizer",
        {
            "vocab_size": 4096,
            "bytes_per_token": 3.31,
            "vocabulary_used": 0.97,
            "longest_tokens": ["-" * 40, " NotImplementedError", "</script><b>", "\n        return "],
            "token_bytes_histogram": {
                str(size): int(900 * math.exp(-((size - 4) ** 2) / 20)) for size in range(1, 24)
            },
        },
        1,
    )
    compression = {"bytes": 300_000, "gzip_bits_per_byte": 1.912, "xz_bits_per_byte": 1.634}
    write_run(
        root,
        "prepare",
        {
            "train_tokens": 3_050_000,
            "train_documents": 1210,
            "heldout_documents": 80,
            "heldout_compression": compression,
        },
        2,
    )
    pretrain_curve = _curve({"loss": (8.3, 3.2), "tokens_per_second": (6900, 7100)}, 160)
    for row in pretrain_curve:
        row["tokens"] = row["step"] * 8192
    write_run(
        root,
        "pretrain",
        {
            "parameters": 4_100_000,
            "tokens": 2_150_000,
            "seconds": 300.0,
            "tokens_per_second": 7166.6,
            "heldout_bits_per_byte": 1.624,
            "heldout_bits_per_byte_interval": [1.585, 1.667],
            "random_init_bits_per_byte": 3.63,
        },
        3,
        seconds=341.0,
        curve=pretrain_curve,
    )
    write_run(root, "sft", {"examples": 14000, "last_train_loss": 0.4}, 4, 120.0, _curve({"loss": (2.4, 0.31)}, 60))
    write_run(
        root,
        "classify",
        {
            **{"examples": 4459, "heldout_examples": 1115, "heldout_accuracy": 0.981, "heldout_f1": 0.927},
            **{"heldout_accuracy_interval": [0.971, 0.988], "heldout_f1_interval": [0.891, 0.958], "f1_of": "spam"},
            **{"majority_accuracy": 0.866, "majority_label": "ham"},
        },
        9,
        45.0,
        _curve({"loss": (0.69, 0.04)}, 30),
    )
    write_run(
        root,
        "reward",
        {"heldout_accuracy": 0.891, "heldout_accuracy_interval": [0.867, 0.911], "heldout_pairs": 800, "chance": 0.5},
        5,
        40.0,
        _curve({"loss": (0.69, 0.24), "accuracy": (0.5, 0.92), "margin": (0.0, 1.9)}, 30),
    )
    write_run(
        root,
        "dpo",
        {"preference_accuracy": 0.81, "preference_accuracy_interval": [0.78, 0.84], "heldout_pairs": 800},
        6,
        50.0,
        _curve({"loss": (0.69, 0.4), "rewards/accuracies": (0.5, 0.85), "rewards/margins": (0.0, 1.2)}, 30),
    )
    write_run(
        root,
        "ppo",
        {"reward_start": -0.4, "reward_end": 0.35, "kl": 2.6, "share_ended": 0.9},
        7,
        150.0,
        _curve({"reward": (-0.4, 0.35), "kl": (0.0, 2.6), "share_ended": (0.93, 0.995), "entropy": (1.0, 0.7)}, 40),
    )


def write_evaluation(root, skills=None):
    """The stage `evaluate` of models whose run ids are those of the stages."""
    rows = make_rows()
    skills = skills or {"base": 0.0, "sft": 0.45, "dpo": 0.62, "ppo": 0.75}
    records = {
        name: make_record(rows, skill, seed, None if name == "sft" else 2.0)
        for seed, (name, skill) in enumerate(skills.items())
    }
    metrics = summarise(records, rows, "sft") | {"samples_per_prompt": 4, "temperature": 1.0}
    stages = {"base": "pretrain"}
    inputs = {"models": [{"path": name, "run_id": f"id-{stages.get(name, name)}"} for name in skills]}
    folder = write_run(root, "evaluate", metrics, 8, inputs=inputs, seconds=47.0)
    samples = [
        {**rows[index], "answers": {name: record["greedy"][index] for name, record in records.items()}}
        for index in range(5)
    ]
    write_json(folder / "samples.json", samples)
    write_json(folder / "attention.json", _attention())
    return metrics
