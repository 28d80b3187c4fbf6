"""A stage's settings: recipe, then command line; each mistake is one line that names the culprit."""

import dataclasses
from typing import ClassVar, Literal

import pytest
from hypothesis import given as given_example
from hypothesis import settings
from hypothesis import strategies as st

from hf_scratch_gpt.runs import StageArguments, given_settings, parse_arguments
from hf_scratch_gpt.runs.arguments import read_recipe
from hf_scratch_gpt.runs.files import yaml_text


@dataclasses.dataclass
class ToyArguments(StageArguments):
    """Settings of every type that stages use."""

    input_fields: ClassVar[tuple[str, ...]] = ("model",)

    model: str = dataclasses.field(default="", metadata={"help": "Folder of the model, 100% of it."})
    max_steps: int = dataclasses.field(default=10, metadata={"help": "Steps."})
    learning_rate: float = dataclasses.field(default=1e-3, metadata={"help": "Peak rate."})
    packing: bool = dataclasses.field(default=False, metadata={"help": "Pack documents."})
    compile: bool | None = dataclasses.field(default=None, metadata={"help": "Compile; by default where it pays."})
    verify: bool = dataclasses.field(default=True, metadata={"help": "Check afterwards."})
    sources: list[str] = dataclasses.field(default_factory=list, metadata={"help": "Where text comes from."})
    limit: int | None = dataclasses.field(default=None, metadata={"help": "At most so many."})
    schedule: Literal["cosine", "linear"] = dataclasses.field(default="cosine", metadata={"help": "Shape."})
    hub_token: str | None = dataclasses.field(default=None, metadata={"help": "A secret."})


@pytest.fixture
def parse(tmp_path):
    def parse_text(recipe, *flags):
        path = tmp_path / "recipe.yaml"
        path.write_bytes(recipe.encode() if isinstance(recipe, str) else recipe)
        return parse_arguments(ToyArguments, [str(path), "--output_dir", "out", *flags], program="scratch-gpt toy")

    return parse_text


def test_the_command_line_wins_over_the_recipe_over_the_default(parse):
    parsed = parse("max_steps: 3\nlearning_rate: 1e-4\n", "--max_steps", "5")
    assert (parsed.max_steps, parsed.learning_rate, parsed.packing) == (5, 1e-4, False)


@pytest.mark.parametrize("flag", [["--max-steps", "7"], ["--max_steps=7"], ["--max-steps=7"]])
def test_flags_are_written_with_dashes_underscores_or_an_equals_sign(parse, flag):
    assert parse("{}", *flag).max_steps == 7


@pytest.mark.parametrize(
    ("flags", "packing", "verify"), [([], False, True), (["--packing", "--no_verify"], True, False)]
)
def test_booleans_are_switched_on_and_off(parse, flags, packing, verify):
    parsed = parse("{}", *flags)
    assert (parsed.packing, parsed.verify) == (packing, verify)


def test_lists_come_from_yaml_and_from_the_command_line(parse):
    assert parse("sources: [a, b]").sources == ["a", "b"]
    assert parse("sources: [a, b]", "--sources", "c", "d").sources == ["c", "d"]


@pytest.mark.parametrize(
    ("recipe", "told"),
    [
        ("max_step: 3", "unknown setting 'max_step'; did you mean 'max_steps'?"),
        ("learning-rate: 3", "unknown setting 'learning-rate'; did you mean 'learning_rate'?"),
        ("1: 2", "unknown setting '1'"),
        ("max_steps: abc", "'max_steps' is 'abc', expected an integer"),
        ("max_steps: 1.5", "'max_steps' is 1.5, expected an integer"),
        ("max_steps: true", "'max_steps' is True, expected an integer"),
        ("max_steps:", "'max_steps' has no value, expected an integer"),
        ("max_steps: [3]", "'max_steps' is [3], expected an integer"),
        ("limit: many", "'limit' is 'many', expected an integer"),
        ("learning_rate: fast", "'learning_rate' is 'fast', expected a number"),
        ("learning_rate: true", "'learning_rate' is True, expected a number"),
        ("packing: 3", "'packing' is 3, expected true or false"),
        ("packing: perhaps", "'packing' is 'perhaps', expected true or false"),
        ("sources: a.txt", "'sources' is 'a.txt', expected a list of texts"),
        ("sources: [1]", "'sources' is [1], expected a list of texts"),
        ("model: 2024", "'model' is 2024, expected a text (quote it)"),
        ("schedule: cosin", "'schedule' is 'cosin', expected one of cosine, linear; did you mean 'cosine'?"),
        ("schedule: no", "(quote it: YAML reads a bare yes, no, on and off as true, false)"),
        ("max_steps: 1\nmax_steps: 2", "'max_steps' is given twice"),
        ("- max_steps", "expected 'setting: value' lines, found a list"),
        ("", "expected 'setting: value' lines, found an empty file"),
        ("max_steps: [", "line 1: not valid YAML"),
        (b"model: \xff", "not UTF-8 at byte 7"),
        ("model: a\0b", "not valid YAML"),
        ("env: x", "'env' is 'x', expected a mapping"),
    ],
)
def test_a_mistake_in_a_recipe_is_told_in_one_line_with_its_name(parse, tmp_path, recipe, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse(recipe)
    assert told in str(caught.value)
    assert f"recipe {tmp_path / 'recipe.yaml'}" in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--max_step", "3"], "command line: unknown setting 'max_step'; did you mean 'max_steps'?"),
        (["--max_steps", "abc"], "invalid int value: 'abc'"),
        (["--max_steps"], "expected one argument"),
        (["--packing", "perhaps"], "command line: "),
        (["--schedule", "cosin"], "invalid choice: 'cosin'"),
        (["other.yaml"], "unexpected 'other.yaml'"),
        (["--config", "other.yaml"], "unknown setting 'config'"),
    ],
)
def test_a_mistake_on_the_command_line_is_told_as_such(parse, flags, told):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        parse("max_steps: 3", *flags)
    assert told in str(caught.value)
    assert str(caught.value).startswith("command line: ")


def test_a_missing_recipe_and_a_missing_output_folder_are_named():
    with pytest.raises(FileNotFoundError, match=r"no such recipe: nowhere\.yaml"):
        parse_arguments(ToyArguments, ["nowhere.yaml"])
    with pytest.raises(ValueError, match="'output_dir' is missing"):
        parse_arguments(ToyArguments, [])


def test_the_settings_recorded_are_those_that_differ_from_the_defaults(parse):
    parsed = parse("max_steps: 3\nlearning_rate: 0.001\nseed: 1\nhub_token: secret\n", "--seed", "42", "--packing")
    assert given_settings(parsed) == {"output_dir": "out", "max_steps": 3, "packing": True}


def test_settings_made_in_python_are_recorded_as_those_from_a_recipe(parse):
    made = ToyArguments(output_dir="out", max_steps=3, sources=["a"])
    assert given_settings(made) == given_settings(parse("max_steps: 3\nsources: [a]"))


plain_text = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=20)


@settings(max_examples=40, deadline=None)
@given_example(
    model=plain_text | st.sampled_from(["no", "1e3", "null", "2024-01-01", "~", "é: {", "%"]),
    max_steps=st.integers(),
    learning_rate=st.floats(allow_nan=False, allow_infinity=False),
    packing=st.booleans(),
    sources=st.lists(plain_text, max_size=3),
    limit=st.none() | st.integers(),
)
def test_a_recorded_recipe_makes_the_same_settings_again(tmp_path_factory, **values):
    first = ToyArguments(output_dir="out", **values)
    path = tmp_path_factory.getbasetemp() / "again.yaml"
    path.write_text(yaml_text(given_settings(first)), encoding="utf-8")
    again = parse_arguments(ToyArguments, [str(path)])
    assert {**vars(again), "given": None} == {**vars(first), "given": None}
    assert given_settings(again) == given_settings(first)


def test_a_recipe_sets_environment_variables(parse, monkeypatch):
    monkeypatch.setenv("SCRATCH_GPT_TOY", "old")
    parse("env: {SCRATCH_GPT_TOY: 5}")
    import os

    assert os.environ["SCRATCH_GPT_TOY"] == "5"


def test_help_lists_each_setting_with_its_meaning(capsys):
    with pytest.raises(SystemExit) as caught:
        parse_arguments(ToyArguments, ["--help"], program="scratch-gpt toy")
    printed = capsys.readouterr().out
    assert caught.value.code == 0
    assert printed.startswith("usage: scratch-gpt toy [RECIPE.yaml] [--field value ...]")
    assert "--max_steps" in printed
    assert "100% of it" in printed


def test_settings_of_a_trl_trainer_are_read_and_checked_alike(tmp_path):
    from trl import SFTConfig

    @dataclasses.dataclass
    class TunedConfig(SFTConfig):
        input_fields: ClassVar[tuple[str, ...]] = ("model_name",)
        model_name: str = dataclasses.field(default="", metadata={"help": "Folder of the base model."})

    path = tmp_path / "sft.yaml"
    path.write_text("max_steps: 3\nbf16: false\nuse_cpu: true\nlearning_rate: 1e-3\nmodel_name: base\n")
    parsed = parse_arguments(TunedConfig, [str(path), "--output_dir", str(tmp_path / "out")])
    assert (parsed.max_steps, parsed.learning_rate, parsed.bf16) == (3, 1e-3, False)
    assert given_settings(parsed) == {
        "output_dir": str(tmp_path / "out"),
        "max_steps": 3,
        "bf16": False,
        "use_cpu": True,
        "learning_rate": 1e-3,
        "model_name": "base",
    }
    path.write_text("max_seq_length: 3\n")
    with pytest.raises(ValueError, match="unknown setting 'max_seq_length'; did you mean 'max_length'"):
        parse_arguments(TunedConfig, [str(path)])
    path.write_text("save_strategy: no\n")
    with pytest.raises(ValueError, match="'save_strategy' is False, expected one of no, steps, epoch, best"):
        parse_arguments(TunedConfig, [str(path)])


def test_a_recipe_is_read_as_utf8_whatever_the_locale(tmp_path):
    path = tmp_path / "récipe.yaml"
    path.write_bytes("model: modèle-日本\n".encode())
    assert read_recipe(path) == {"model": "modèle-日本"}
