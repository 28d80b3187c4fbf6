"""A card says what the runs recorded, each figure with its file and key, or there is none and the error says why."""

import json
import math
import re
import shutil

import pytest
import yaml
from card_road import MODELS, STAGES, change, write_card_road
from huggingface_hub import InferenceClient, ModelCard

from hf_scratch_gpt.cli import main
from hf_scratch_gpt.reporting.card import make_card
from hf_scratch_gpt.reporting.card_metadata import TASKS, check_card
from hf_scratch_gpt.reporting.card_settings import HUB_LICENSES, WORLD_CARBON_INTENSITY, load_settings

DECLARED = {"license": "apache-2.0", "source_licenses": {"/home/somebody/secret/my|texts": "private"}}
SETTINGS = load_settings((DECLARED, "test"))
ANCESTORS = {
    "pretrain": ("tokenizer", "prepare", "pretrain"),
    "sft": ("tokenizer", "prepare", "pretrain", "sft", "evaluate"),
    "classify": ("tokenizer", "prepare", "pretrain", "classify"),
    "reward": ("tokenizer", "prepare", "pretrain", "sft", "reward"),
    "dpo": ("tokenizer", "prepare", "pretrain", "sft", "dpo", "evaluate"),
    "ppo": ("tokenizer", "prepare", "pretrain", "sft", "reward", "ppo", "evaluate"),
}
# Figures that a run may do without: the card then does not speak of them.
# The compressors' depend on another figure that is removed with them.
MAY_LACK = ("length_correlation", "heldout_compression", "heldout_f1")


@pytest.fixture(scope="module")
def whole_road(tmp_path_factory):
    """Read only: a test that changes something takes `road`."""
    return write_card_road(tmp_path_factory.mktemp("whole") / "mine")


@pytest.fixture
def road(tmp_path):
    return write_card_road(tmp_path / "mine")


def split_card(text):
    """Metadata, what is told, and the rows `(shown, [(file, key)], rule)` of the last section."""
    metadata, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", text, re.DOTALL).groups()
    told, listed = body.split("<details>")
    rows = []
    for line in listed.splitlines():
        match = re.fullmatch(r"\| (.+) \| (`.+`) \| (.*) \|", line)
        if match:
            places = re.findall(r"`([^`]+)` `([^`]+)`", match.group(2))
            rows.append((match.group(1), places, match.group(3)))
    return yaml.safe_load(metadata), told, rows


def keys_of(key):
    """`.a.b["c.d"][0][]` as `["a", "b", "c.d", 0, None]`."""
    return [
        name or (json.loads(quoted) if quoted else int(index) if index else None)
        for name, quoted, index, _ in re.findall(r'\.(\w+)|\[("(?:[^"\\]|\\.)*")\]|\[(\d+)\]|(\[\])', key)
    ]


def read_values(root, file, key):
    path = root / file
    if path.name == "card.yaml":
        content = {"carbon_intensity": WORLD_CARBON_INTENSITY}
    else:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    for name in keys_of(key):
        content = list(content.values()) if name is None else content[name]
    return content if isinstance(content, list) else [content]


def follow(rule, values):
    """The rules of the last section, written again."""
    if rule == "":
        (value,) = values
        return value
    return {
        "sum": sum(values),
        "sum / 60": sum(values) / 60,
        "sum × 1000": sum(values) * 1000,
        "sum of all but the last × the last": sum(values[:-1]) * values[-1],
        "first / second": values[0] / values[-1],
        "negated": -values[0],
        "/ 1000000000": values[0] / 1e9,
    }[rule]


def as_number(text):
    cleaned = text.replace(",", "")
    return float(cleaned) if re.fullmatch(r"[+-]?\d+(\.\d+)?(e[+-]?\d+)?", cleaned) else None


def check_origins(root, text):
    """Read each figure of a card again from where it says that it is from; returns how many are numbers."""
    _, _, rows = split_card(text)
    numbers = 0
    for shown, places, rule in rows:
        if any(file.endswith("card.yaml") and key != ".carbon_intensity" for file, key in places):
            continue
        values = [value for file, key in places for value in read_values(root, file, key)]
        number = as_number(shown)
        if number is None or isinstance(values[0], str):
            assert shown in (str(values[0]), ", ".join(map(str, values)))
            continue
        numbers += 1
        # As many digits as are shown have to be right: three behind the point, or three significant ones.
        decimals = len(shown.partition(".")[2])
        assert number == pytest.approx(follow(rule, values), abs=0.51 * 10**-decimals, rel=5e-3), (shown, places, rule)
    return numbers


@pytest.mark.parametrize("stage", MODELS)
def test_every_figure_is_in_the_file_that_the_card_names(whole_road, stage):
    assert check_origins(whole_road, make_card(whole_road / stage, SETTINGS)) > 40


@pytest.mark.parametrize("stage", MODELS)
def test_every_number_that_the_card_tells_has_an_origin(whole_road, stage):
    metadata, told, rows = split_card(make_card(whole_road / stage, SETTINGS))
    shown = {text for text, _, _ in rows}
    for text in sorted(shown, key=len, reverse=True):  # what has an origin but is no number: version 2.13.0
        if as_number(text) is None and " " in text:
            told = told.replace(text, "")
    told = re.sub(r"```.*?```|https?://[^\s)]+|95%", "", told, flags=re.DOTALL)
    for settings in re.findall(r"`([^`]*)`", told):  # `learning_rate: 0.008`: the value has an origin
        _, colon, value = settings.partition(": ")
        assert not colon or value in shown, settings
    words = re.sub(r"`[^`]*`", "", told)
    for text in sorted(shown, key=len, reverse=True):
        if as_number(text) is None:
            words = words.replace(text, "")
    found = re.findall(r"[+-]?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?", words)
    assert len(found) > 40
    assert not [word for word in found if word.strip(",") not in shown]

    def numbers(value):
        if isinstance(value, dict | list):
            for item in value.values() if isinstance(value, dict) else value:
                yield from numbers(item)
        elif isinstance(value, int | float):
            yield str(value)

    assert not set(numbers(metadata)) - shown


def figures_of(road, stage):
    """Each number of a `metrics.json` that the stage's card shows, as `(file, key)`."""
    _, _, rows = split_card(make_card(road / stage, SETTINGS))
    for shown, places, _ in rows:
        for file, key in places:
            if as_number(shown) is not None and file.endswith("metrics.json") and "[]" not in key:
                yield file, key


def edit_figures(road, figures, edit):
    """Apply `edit(holder, key)` to figures in their files; returns what puts the files back."""
    paths = {road / file for file, _ in figures}
    before = {path: path.read_text(encoding="utf-8") for path in paths}
    reports = {path: json.loads(text) for path, text in before.items()}
    for file, key in figures:
        *parents, last = keys_of(key)
        holder = reports[road / file]
        for name in parents:
            holder = holder[name]
        edit(holder, last)
    for path, report in reports.items():
        path.write_text(json.dumps(report), encoding="utf-8")
    return lambda: [path.write_text(text, encoding="utf-8") for path, text in before.items()]


def remove(holder, key):
    if isinstance(holder, list):
        holder[key] = None
    else:
        del holder[key]


def needed_figures(road, stage):
    figures = dict.fromkeys(figures_of(road, stage))
    return [(file, key) for file, key in figures if not any(name in key for name in MAY_LACK)]


@pytest.mark.parametrize("stage", MODELS)
def test_every_number_that_is_missing_is_named_with_its_file(road, stage):
    figures = needed_figures(road, stage)
    assert len(figures) > 36
    edit_figures(road, figures, remove)
    with pytest.raises(ValueError, match="no card, since nothing is made up") as caught:
        make_card(road / stage, SETTINGS)
    told = str(caught.value)
    assert "\n" not in told
    by_file = {part.partition(" lacks ")[0].rpartition(": ")[2]: part for part in told.split("; ")}
    unnamed = [(file, key) for file, key in figures if key not in by_file.get(file, "")]
    assert not unnamed


@pytest.mark.parametrize("stage", ["pretrain", "dpo"])
def test_one_missing_number_is_enough(road, stage):
    for file, key in needed_figures(road, stage)[::4]:
        put_back = edit_figures(road, [(file, key)], remove)
        with pytest.raises(ValueError, match=f"{re.escape(file)} lacks .*{re.escape(key)}"):
            make_card(road / stage, SETTINGS)
        put_back()
    assert make_card(road / stage, SETTINGS)


@pytest.mark.parametrize("stage", ["dpo", "ppo"])
def test_numbers_that_change_in_their_files_change_in_the_card(road, stage):
    """No figure stands in the template or the code: with all of them changed, each is still that of its file."""
    before = {row[0] for row in split_card(make_card(road / stage, SETTINGS))[2]}

    def change_number(holder, key):
        holder[key] = holder[key] * 3 + 7 if isinstance(holder[key], int) else holder[key] * 1.37 + 0.011

    edit_figures(road, list(dict.fromkeys(figures_of(road, stage))), change_number)
    text = make_card(road / stage, SETTINGS)
    check_origins(road, text)
    assert len({row[0] for row in split_card(text)[2]} - before) > 60


@pytest.mark.parametrize("value", [None, "many", True, math.inf])
def test_what_is_no_number_is_not_shown_as_one(road, value):
    change(road, "sft", lambda report: report["metrics"].update(examples=value if value != math.inf else "Infinity"))
    with pytest.raises(ValueError, match=r"sft/metrics.json lacks .metrics.examples \(found .*, expected a number\)"):
        make_card(road / "ppo", SETTINGS)


RELATIVES = {
    "kto": ({"answers": 1530}, "aligned by KTO"),
    "grpo": ({"episodes": 1537}, "aligned by GRPO"),
    "rloo": ({"episodes": 1538}, "aligned by RLOO"),
    "best_of_n": ({"answers": 1539, "chosen": 190}, "the best of several answers"),
}


@pytest.mark.parametrize("stage", RELATIVES)
def test_a_relative_of_ppo_has_a_card_with_its_own_figures(road, stage):
    figures, words = RELATIVES[stage]

    def rename(report):
        del report["metrics"]["episodes"]
        report["stage"] = stage
        report["metrics"] |= figures

    change(road, "ppo", rename)
    text = make_card(road / "ppo", SETTINGS)
    _, told, _ = split_card(text)
    assert words in told
    assert all(f"{figure:,}" in told for figure in figures.values())
    assert check_origins(road, text) > 40


def test_the_folder_of_iterated_rounds_names_the_folder_that_can_have_a_card(road):
    change(road, "ppo", lambda report: report.update(stage="iterate"))
    with pytest.raises(ValueError, match=r"holds a copy of its last round's model; a card is of .* round-N/ppo"):
        make_card(road / "ppo", SETTINGS)


@pytest.mark.parametrize("stage", MODELS)
@pytest.mark.parametrize("gone", STAGES)
def test_a_stage_of_the_lineage_that_is_gone_is_named(road, stage, gone):
    (road / gone / "metrics.json").unlink()
    if gone not in ANCESTORS[stage]:
        assert make_card(road / stage, SETTINGS)
        return
    with pytest.raises(FileNotFoundError, match=re.escape(str(road / gone))) as caught:
        make_card(road / stage, SETTINGS)
    assert "metrics.json" in str(caught.value)


def test_the_metadata_is_what_the_hub_wants(whole_road):
    # huggingface_hub's client has a method for each task of the Hub that can be asked for.
    assert all(hasattr(InferenceClient, task.replace("-", "_")) for task, _ in TASKS.values())
    for stage in MODELS:
        text = make_card(whole_road / stage, SETTINGS)
        card = ModelCard(text)
        again = ModelCard(str(card))
        assert again.data.to_dict() == card.data.to_dict()
        assert card.data.library_name == "transformers"
        assert card.data.license in HUB_LICENSES
        assert card.data.pipeline_tag == (
            "text-classification" if stage in ("classify", "reward") else "text-generation"
        )
        (result,) = card.data.eval_results
        assert card.data.model_name == f"mine-{stage}"
        low, high = result.metric_args["confidence_interval"]
        assert low <= result.metric_value <= high
        assert result.task_type == card.data.pipeline_tag
        assert "datasets" not in card.data.to_dict()
        assert "base_model" not in card.data.to_dict()


def test_energy_is_summed_over_the_lineage_and_turned_into_grams(whole_road):
    """Stages 1 to 4 and 6 took 1.001 Wh times their number: 16.016 Wh, times 458 g a kWh."""
    card = ModelCard(make_card(whole_road / "dpo", SETTINGS))
    assert card.data.co2_eq_emissions["emissions"] == pytest.approx(0.016016 * 458, rel=5e-3)
    assert "Training took **16.02 Wh**, about **7.34 g" in card.text
    assert "took another 8.008 Wh" in card.text  # the evaluation, told apart
    cleaner = load_settings(
        ({**DECLARED, "carbon_intensity": 45.8, "carbon_intensity_source": "the supplier", "location": "Here"}, "test")
    )
    card = ModelCard(make_card(whole_road / "dpo", cleaner))
    assert card.data.co2_eq_emissions["emissions"] == pytest.approx(0.734, rel=5e-3)
    assert card.data.co2_eq_emissions["geographical_location"] == "Here"
    assert "(the supplier; the machine stood in Here)" in card.text


def test_energy_that_was_not_measured_is_not_made_up(road):
    change(road, "pretrain", lambda report: report["energy"].update(kilowatt_hours=None, unmeasured="no counter here"))
    with pytest.raises(
        ValueError, match=r"pretrain/metrics.json lacks .*\.energy\.kilowatt_hours \(no counter here\)"
    ):
        make_card(road / "sft", SETTINGS)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_model_that_changed_since_it_was_measured_is_refused(road, name):
    path = road / "sft" / name
    path.write_bytes(path.read_bytes() + b" ")
    with pytest.raises(ValueError, match=f"sft/{name}: has changed since the run finished"):
        make_card(road / "sft", SETTINGS)
    path.unlink()
    with pytest.raises(ValueError, match=f"sft/{name}: is gone"):
        make_card(road / "sft", SETTINGS)


def test_new_weights_beside_the_measured_ones_are_refused(road):
    (road / "sft" / "model-00002-of-00002.safetensors").write_bytes(b"more")
    with pytest.raises(ValueError, match=r"sft/model-00002-of-00002.safetensors: is new"):
        make_card(road / "sft", SETTINGS)


def test_a_stage_that_was_made_anew_is_not_taken_for_the_old_one(road):
    change(road, "sft", lambda report: report.update(run_id="another"))
    with pytest.raises(ValueError, match=r"'model_name_or_path' is the run id-sft .* is of another run, made since"):
        make_card(road / "dpo", SETTINGS)


def test_a_stage_that_was_set_aside_is_still_the_one_it_was(road):
    shutil.copytree(road / "sft", road / "sft.old")
    change(road, "sft", lambda report: report.update(run_id="another"))
    assert "| sft.old (sft) |" in make_card(road / "reward", SETTINGS)


def test_an_evaluation_of_other_models_is_not_taken(road):
    def forget(report):
        report["inputs"]["models"][3]["run_id"] = "id-of-another"

    change(road, "evaluate", forget)
    with pytest.raises(FileNotFoundError, match=r"no other run beside .* measured this model"):
        make_card(road / "ppo", SETTINGS)
    with pytest.raises(ValueError, match="did not measure the model"):
        make_card(road / "ppo", SETTINGS, road / "evaluate")


@pytest.mark.parametrize("stage", ["tokenizer", "prepare", "evaluate"])
def test_a_stage_without_a_model_has_no_card(road, stage):
    with pytest.raises(ValueError, match="makes no model; a card is of pretrain, sft, classify, reward, dpo, ppo"):
        make_card(road / stage, SETTINGS)


def test_licences_that_nobody_declared_are_asked_for(road, capsys):
    assert main(["card", str(road / "sft")]) == 2
    told = capsys.readouterr().err
    assert "sft/card.yaml lacks license (the model's: set it" in told
    assert "source_licenses.my|texts" in told
    assert "--source-license my|texts=LICENSE" in told
    assert "python-docs" not in told  # its licence is known
    assert len(told.splitlines()) == 1
    assert not (road / "sft" / "card.yaml").exists()
    assert not (road / "sft" / "README.md").exists()


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"license": "apache2"}, "which the Hub does not know; did you mean 'apache-2.0'"),
        ({"license": "other"}, "'license_name' says which"),
        ({"licence": "mit"}, "unknown setting 'licence'; did you mean 'license'"),
        ({"language": ["english"]}, "expected an ISO 639 code"),
        ({"carbon_intensity": -1.0}, "expected grams a kWh above 0"),
        ({"carbon_intensity": 56.0}, "'carbon_intensity_source' is missing"),
        ({"base_model": "a/b/c"}, "'base_model' is no Hub id"),
        ({"source_licenses": ["mit"]}, "expected a mapping"),
    ],
)
def test_a_wrong_declaration_is_named(declared, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        load_settings((declared, "card.yaml"))
    assert str(caught.value).startswith("card.yaml: ")


def test_a_private_model_needs_no_licence_of_the_hub(whole_road):
    private = load_settings((DECLARED | {"license": "other", "license_name": "private"}, "test"))
    card = ModelCard(make_card(whole_road / "sft", private))
    assert (card.data.license, card.data.license_name) == ("other", "private")
    assert "The model: private." in card.text


def test_no_place_of_this_machine_is_told(whole_road):
    for stage in MODELS:
        text = make_card(whole_road / stage, SETTINGS)
        assert str(whole_road.parent) not in text
        assert "somebody" not in text
        assert "| my\\|texts | private | 210 | 50,000 | 11 | 1,000 |" in text
    with pytest.raises(ValueError, match="names a place on this machine, '/home/somebody/models'"):
        check_card(text.replace("a reward model", "", 1) + "kept in /home/somebody/models\n")


def test_hub_ids_become_metadata(road):
    def use_hub(report):
        report["inputs"]["dataset"] = {"path": "owner/questions:english"}
        report["inputs"]["model_name_or_path"] = {"path": "owner/base"}

    change(road, "sft", use_hub)
    settings = load_settings(
        (DECLARED, "test"), ({"source_licenses": {"owner/questions:english": "cc-by-4.0"}}, "test")
    )
    card = ModelCard(make_card(road / "sft", settings))
    assert card.data.datasets == ["owner/questions"]
    assert card.data.base_model == ["owner/base"]
    assert card.data.co2_eq_emissions["training_type"] == "fine-tuning"
    assert "| owner/questions:english | cc-by-4.0 |" in card.text


def test_a_model_from_a_folder_without_a_record_has_to_be_declared(road):
    folder = {"path": "/models/somewhere", "digest": "abc", "files": 3}
    change(road, "sft", lambda report: report["inputs"].update(model_name_or_path=folder))
    with pytest.raises(
        ValueError, match=r"base_model \(the stage 'sft' began with somewhere, which has no metrics.json"
    ):
        make_card(road / "sft", SETTINGS)
    declared = load_settings((DECLARED | {"base_model": "owner/base"}, "test"))
    assert ModelCard(make_card(road / "sft", declared)).data.base_model == ["owner/base"]


@pytest.mark.parametrize(
    ("greedy", "sampled", "words"),
    [
        ([-0.06, -0.01], [0.04, 0.10], "did not gain: it got worse"),
        ([-0.05, 0.01], [0.04, 0.10], "did not gain: there is no clear difference"),
        ([-0.05, 0.01], [-0.04, 0.10], "Neither sampled nor greedy answers differ clearly"),
        ([0.02, 0.06], [0.04, 0.10], None),
    ],
)
def test_a_gain_of_sampled_answers_alone_is_told_as_such(road, greedy, sampled, words):
    def set_differences(report):
        versus = report["metrics"]["models"]["dpo"]["versus_reference"]
        for name, (low, high) in (("gold_difference", greedy), ("sampled_gold_difference", sampled)):
            versus[name] = {"mean": (low + high) / 2, "low": low, "high": high, "n": 60}

    change(road, "evaluate", set_differences)
    text = make_card(road / "dpo", SETTINGS)
    if words is None:
        assert "did not gain" not in text
        assert "differ clearly" not in text
    else:
        assert words in text


def test_a_reader_learns_who_taught_the_alignment(whole_road):
    text = make_card(whole_road / "ppo", SETTINGS)
    assert "plus 4 times the verdict of the rule-based checker" in text
    assert "not on people's preferences; it ranks 0.891 of 800 held-out pairs" in text
    assert "DPO learnt from the model's own answers" in make_card(whole_road / "dpo", SETTINGS)


def test_what_it_cannot_do_is_told(road):
    def spoil(report):
        models, families = report["metrics"]["models"], report["metrics"]["families"]
        for number, family in enumerate(families):
            share = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 12}
            models["sft"]["exact_match_by_family"][family] = share
            families[family]["chance_level"] = 0.45 if number < 2 else 0.1
        models["sft"]["bits_per_byte"] |= {"mean": 2.0, "low": 1.9, "high": 2.1}

    change(road, "evaluate", spoil)
    text = make_card(road / "sft", SETTINGS)
    families = list(json.loads((road / "evaluate" / "metrics.json").read_text())["metrics"]["families"])
    assert f"guessing at these kinds of question: {families[0]}, {families[1]}.\n" in text
    assert "It predicts plain text worse than before" in text
    assert "It predicts plain text worse" not in make_card(road / "dpo", SETTINGS)


def test_a_base_model_learnt_from_no_questions(whole_road):
    assert "Questions with checkable answers" not in make_card(whole_road / "pretrain", SETTINGS)
    assert "1,000 for training and\n60 held out" in make_card(whole_road / "sft", SETTINGS)


MIXTURE = [
    {"source": "/home/somebody/secret/my|texts", "weight": 0.75, "share": 0.7481, "tokens": 37_405, "epochs": 0.7481},
    {"source": "python-docs", "weight": 0.25, "share": 0.2519, "tokens": 12_595, "epochs": 0.0041983},
]


@pytest.mark.parametrize("stage", ["pretrain", "ppo"])
def test_each_source_has_its_weight_share_and_epochs(road, stage):
    """50,000 and 3,000,000 of 3,050,000 tokens where no weights are asked for, each token as often as any other."""
    change(road, "prepare", lambda report: report["metrics"].update(train_tokens=3_050_000))
    heading = (
        "| source | weight asked for | realised share of training tokens | epochs |\n| --- | ---: | ---: | ---: |\n"
    )
    text = make_card(road / stage, SETTINGS)
    assert heading + "| my\\|texts | – | 0.016 | 1.57 |\n| python-docs | – | 0.984 | 1.57 |\n\n" in text
    assert "No weights were asked for" in text
    change(road, "pretrain", lambda report: report["metrics"].update(mixture=MIXTURE))
    text = make_card(road / stage, SETTINGS)
    assert heading + "| my\\|texts | 0.750 | 0.748 | 0.748 |\n| python-docs | 0.250 | 0.252 | 0.0042 |\n\n" in text
    assert "No weights were asked for" not in text
    check_origins(road, text)
    for key in ("weight", "share", "epochs"):
        put_back = edit_figures(road, [("pretrain/metrics.json", f".metrics.mixture[1].{key}")], remove)
        with pytest.raises(ValueError, match=rf"pretrain/metrics\.json lacks \.metrics\.mixture\[1\]\.{key}"):
            make_card(road / stage, SETTINGS)
        put_back()


def test_languages_are_told_only_if_all_are_known(road):
    assert "Which languages the text is in was not stated." in make_card(road / "sft", SETTINGS)
    declared = load_settings((DECLARED | {"language": ["de", "en", "code"]}, "test"))
    assert ModelCard(make_card(road / "sft", declared)).data.language == ["de", "en", "code"]
    change(road, "prepare", lambda report: report["metrics"]["by_source"].pop(0))
    for stage in ("prepare", "tokenizer"):
        change(road, stage, lambda report: report["inputs"].update(sources=[{"path": "python-docs"}]))
    assert ModelCard(make_card(road / "sft", SETTINGS)).data.language == ["en", "code"]


def test_settings_say_what_changes_results_and_no_places(whole_road):
    text = make_card(whole_road / "sft", SETTINGS)
    assert "- pretrain: `learning_rate: 0.008`\n" in text
    assert "- sft: `lora_modules_to_save: model.norm`, `lora_r: 64`\n" in text
    assert "save_steps" not in text


def test_the_command_writes_a_card_that_can_be_checked_and_made_again(road, tmp_path, capsys):
    model, output = str(road / "sft"), tmp_path / "cards" / "mine-sft.md"
    output.parent.mkdir()
    flags = ["--license", "mit", "--source-license", "my|texts=private"]
    assert main(["card", model, "--check", *flags]) == 1
    assert not (road / "sft" / "card.yaml").exists()
    assert main(["card", model, *flags]) == 0
    assert main(["card", model, "--output", str(output)]) == 0  # what was declared is kept
    assert output.read_text(encoding="utf-8") == (road / "sft" / "README.md").read_text(encoding="utf-8")
    assert main(["card", model, "--check"]) == 0
    change(road, "pretrain", lambda report: report["metrics"].update(steps=605))
    assert main(["card", model, "--check"]) == 1
    assert "not what the runs recorded" in capsys.readouterr().out
    assert main(["card", model, "--source-license", "nonsense"]) == 2
    assert "expected SOURCE=LICENSE" in capsys.readouterr().err


def test_a_masked_model_is_told_by_what_it_does(road):
    def mask(report):
        report["metrics"] |= {
            **{"objective": "masked", "heldout_masked_accuracy": 0.195, "heldout_masked_tokens": 22_504},
            **{"heldout_masked_accuracy_interval": [0.178, 0.206], "random_init_masked_accuracy": 0.0},
            "unigram_masked_accuracy": 0.024,
        }

    change(road, "pretrain", mask)
    shutil.rmtree(road / "evaluate")
    card = ModelCard(make_card(road / "pretrain", SETTINGS))
    assert card.data.pipeline_tag == "fill-mask"
    assert "| 0.000 | 0.195 | 0.178 to 0.206 | 22,504 masked tokens |" in card.text
    assert "Always filling in the most frequent token gives 0.024." in card.text
    assert "AutoModelForMaskedLM" in card.text
    assert "How it answers questions was not measured." in card.text
