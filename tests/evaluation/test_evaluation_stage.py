"""The stage `evaluate` on two tiny models: its folder, its resumption, its messages."""

import json

import pytest

from hf_scratch_gpt.evaluation import measure
from hf_scratch_gpt.evaluation.evaluate import Arguments, run
from hf_scratch_gpt.evaluation.questions import FewShotPrompts, first_line, pick, pick_texts, with_answers
from hf_scratch_gpt.runs import read_json, read_metrics


def arguments(tmp_path, prepared, model_folders, **changes):
    settings = {
        "output_dir": str(tmp_path / "evaluate"),
        "dataset_dir": str(prepared),
        "model_names": ["base", "tuned"],
        "models": [str(model_folders / "base"), str(model_folders / "tuned")],
        "reference": "base",
        "reward_model": str(model_folders / "reward"),
        "samples_per_prompt": 2,
        "max_new_tokens": 4,
        "few_shot": 1,
        "attention_text": "a b c",
    }
    return Arguments(**{**settings, **changes})


def test_the_folder_tells_all_models(tmp_path, prepared, model_folders):
    folder = run(arguments(tmp_path, prepared, model_folders))
    metrics = read_metrics(folder)["metrics"]
    assert metrics["questions"] == 12
    assert set(metrics["models"]) == {"base", "tuned"}
    tuned = metrics["models"]["tuned"]
    assert tuned["bits_per_byte"]["n"] == 5
    assert tuned["kl"]["mean"] > 0
    assert tuned["reward"]["n"] == 12
    assert tuned["versus_reference"]["preference_accuracy"]["n"] == 12
    assert metrics["reward_model"]["pairs"] == 12
    samples = read_json(folder / "samples.json")
    assert [row["family"] for row in samples] == ["double", "upper"]
    assert set(samples[0]["answers"]) == {"base", "tuned"}
    assert len((folder / "answers.jsonl").read_text().splitlines()) == 12
    assert read_json(folder / "attention.json")["model"] == "tuned"
    assert [json.loads(line)["model"] for line in (folder / "curve.jsonl").read_text().splitlines()] == [
        "base",
        "tuned",
    ]
    run_id = read_metrics(folder)["run_id"]
    run(arguments(tmp_path, prepared, model_folders))
    assert read_metrics(folder)["run_id"] == run_id


def test_an_interrupted_run_does_not_measure_a_model_twice(tmp_path, prepared, model_folders, monkeypatch):
    settings = arguments(tmp_path, prepared, model_folders)
    measured, real = [], measure.Measurer.measure

    def stop_at_the_second(self, name, folder):
        measured.append(name)
        if measured == ["base", "tuned"]:
            raise KeyboardInterrupt
        return real(self, name, folder)

    monkeypatch.setattr(measure.Measurer, "measure", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        run(settings)
    resumed = read_metrics(run(settings))["metrics"]
    assert measured == ["base", "tuned", "tuned"]
    straight = arguments(tmp_path, prepared, model_folders, output_dir=str(tmp_path / "straight"))
    assert read_metrics(run(straight))["metrics"] == resumed


def test_own_questions_without_families_are_judged_by_equality(tmp_path, model_folders, prepared):
    path = tmp_path / "own.jsonl"
    path.write_text(
        "".join(
            json.dumps(
                {
                    "prompt": [{"role": "user", "content": f"say {word}"}],
                    "completion": [{"role": "assistant", "content": word}],
                }
            )
            + "\n"
            for word in ("a", "b", "c")
        )
    )
    pytest.importorskip("hf_scratch_gpt.data.conversations")
    settings = arguments(
        tmp_path,
        "",
        model_folders,
        questions_source=str(path),
        model_names=["base"],
        models=[str(model_folders / "base")],
        reward_model="",
    )
    metrics = read_metrics(run(settings))["metrics"]
    assert list(metrics["families"]) == ["all"]
    assert metrics["models"]["base"]["bits_per_byte"] is None
    assert metrics["reference"] is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ["a"]}, "found 1 and 2"),
        ({"model_names": ["base", "base"]}, "each name may occur once"),
        ({"model_names": ["base", "../x"]}, "plain word"),
        ({"reference": "sft"}, r"'reference': no model is called 'sft' \(base, tuned\)"),
        ({"few_shot_models": ["ppo"]}, "'few_shot_models': no model is called 'ppo'"),
        ({"dataset_dir": ""}, "'dataset_dir' is missing"),
        ({"temperature": 0.0}, "'temperature' is 0.0"),
    ],
)
def test_mistakes_in_the_settings_are_named(tmp_path, prepared, model_folders, changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, prepared, model_folders, **changes)


def test_missing_material_is_named_before_a_model_is_loaded(tmp_path, prepared, model_folders):
    with pytest.raises(FileNotFoundError, match=r"nothing: no such folder; 'dataset_dir'"):
        run(arguments(tmp_path, tmp_path / "nothing", model_folders))
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"heldout\.jsonl: no such file"):
        run(arguments(tmp_path, tmp_path / "empty", model_folders))
    with pytest.raises(FileNotFoundError, match="no such model folder"):
        run(arguments(tmp_path, prepared, model_folders, models=["/no/model", str(model_folders / "tuned")]))


def test_few_shot_prompts_hold_solved_examples_of_the_family(tiny_tokenizer):
    def row(family, question, answer):
        return {"id": question, "family": family, "prompt": [{"role": "user", "content": question}], "answer": answer}

    prompts = FewShotPrompts([row("a", "1+1", "2"), row("a", "2+2", "4"), row("b", "say x", "x")], 2, seed=0)
    token_ids, shown = prompts.encode(tiny_tokenizer, row("a", "3+3", "6"), 200)
    text = tiny_tokenizer.decode(token_ids[1:])
    assert shown == 2
    assert text.endswith("Question: 3+3\nAnswer:")
    assert "1+1\nAnswer: 2" in text
    assert "say x" not in text
    assert token_ids[0] == tiny_tokenizer.convert_tokens_to_ids("<|endoftext|>")
    short, shown = prompts.encode(tiny_tokenizer, row("a", "3+3", "6"), len(token_ids) - 1)
    assert shown == 1
    assert len(short) < len(token_ids)
    with pytest.raises(ValueError, match=r"question '3\+3': 22 tokens, and only 10"):
        prompts.encode(tiny_tokenizer, row("a", "3+3", "6"), 10)


def test_choices_are_functions_of_the_seed_and_keep_the_order():
    items = list(range(100))
    chosen = pick(items, 10, seed=1)
    assert chosen == sorted(chosen) == pick(items, 10, seed=1)
    assert chosen != pick(items, 10, seed=2)
    assert pick(items, 0, 1) == items
    assert pick_texts(["aaaa", "bbbb"], 4, 0) in (["aaaa"], ["bbbb"])
    assert len(pick_texts(["a" * 99], 4, 0)) == 1
    texts = ["a" * 10, "b" * 10, "c" * 10]
    assert pick_texts(texts, 0, 0) == texts
    assert len(pick_texts(texts, 25, 0)) == 2
    assert pick_texts(texts, 25, 0) == pick_texts(texts, 25, 0)


def test_answers_are_filled_in_for_other_data():
    rows = with_answers([{"prompt": [], "completion": [{"role": "assistant", "content": "yes"}]}])
    assert rows[0]["answer"] == "yes"
    assert rows[0]["family"] == "all"
    assert first_line("\n  yes \nQuestion: next") == "yes"
    assert first_line("") == ""
