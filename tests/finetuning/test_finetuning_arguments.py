"""A tuning stage's settings: from YAML, stable, with defaults that run on any machine."""

import pytest
from torch import nn

from hf_scratch_gpt.alignment.dpo import Arguments as DPOArguments
from hf_scratch_gpt.alignment.reward import Arguments as RewardArguments
from hf_scratch_gpt.finetuning.arguments import make_lora_config
from hf_scratch_gpt.finetuning.sft import Arguments as SFTArguments
from hf_scratch_gpt.runs import parse_arguments
from hf_scratch_gpt.runs.hardware import has_fast_bf16
from hf_scratch_gpt.runs.identity import fingerprint

ALL = [SFTArguments, RewardArguments, DPOArguments]


@pytest.fixture
def recipe(tmp_path):
    (tmp_path / "base").mkdir()
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"model_name_or_path: {tmp_path / 'base'}\ndataset: data.jsonl\nlearning_rate: 1e-3\nlora_r: 4\n"
        f"lora_target_modules: [q_proj, v_proj]\nmax_steps: 7\nwarmup_steps: 2\noutput_dir: {tmp_path / 'out'}\n"
    )
    return path


@pytest.mark.parametrize("argument_class", ALL)
def test_yaml_and_command_line_give_the_settings_and_ours_are_the_defaults(argument_class, recipe, tmp_path):
    arguments = parse_arguments(argument_class, [str(recipe), "--lora_alpha", "8"])
    assert (arguments.lora_r, arguments.lora_alpha, arguments.learning_rate) == (4, 8, 1e-3)
    assert arguments.lora_target_modules == ["q_proj", "v_proj"]
    assert arguments.output_dir == str(tmp_path / "out")
    assert arguments.bf16 is has_fast_bf16()
    assert arguments.use_cpu
    assert not arguments.gradient_checkpointing
    assert arguments.report_to == []
    assert arguments.save_total_limit == 2


@pytest.mark.parametrize("argument_class", ALL)
def test_two_readings_of_a_recipe_have_one_fingerprint_and_another_setting_has_another(argument_class, recipe):
    first, second = (fingerprint(parse_arguments(argument_class, [str(recipe)]), "stage") for _ in range(2))
    assert first == second
    assert fingerprint(parse_arguments(argument_class, [str(recipe), "--seed", "3"]), "stage") != first
    # What only this machine decides (bf16) and where it is written do not count.
    moved = parse_arguments(argument_class, [str(recipe), "--output_dir", "elsewhere"])
    moved.bf16 = not moved.bf16
    assert fingerprint(moved, "stage") == first


@pytest.mark.parametrize("argument_class", ALL)
def test_settings_that_cannot_work_are_refused_by_name(argument_class, recipe):
    for flags, culprit in (
        (["--peft", "dara"], "'peft' is 'dara', expected one of lora, dora, none.*did you mean 'dora'"),
        (["--lora_r", "0"], "'lora_r'"),
        (["--heldout_fraction", "1.5"], "'heldout_fraction'"),
        (["--max_length", "1"], "'max_length'"),
        (["--max_seq_length", "9"], "did you mean 'max_length'"),
    ):
        with pytest.raises(ValueError, match=culprit):
            parse_arguments(argument_class, [str(recipe), *flags])
    with pytest.raises(ValueError, match="'output_dir' is missing"):
        parse_arguments(argument_class, ["--model_name_or_path", "x", "--dataset", "y"])
    with pytest.raises(ValueError, match="'dataset' is missing"):
        argument_class(output_dir="out", model_name_or_path="x").check_inputs()


@pytest.mark.parametrize("name", ["lm_head", "embed_tokens", "model.embed_tokens"])
def test_an_adapter_on_a_tied_head_or_embedding_is_refused(name):
    for field in ("lora_target_modules", "lora_modules_to_save"):
        arguments = SFTArguments(output_dir="out", **{field: ["q_proj", name]})
        with pytest.raises(ValueError, match=f"'{field}': '{name}'"):
            make_lora_config(arguments, "CAUSAL_LM", nn.Module())


def test_no_adapter_without_peft():
    assert make_lora_config(SFTArguments(output_dir="out", peft="none"), "CAUSAL_LM", nn.Module()) is None


def test_a_module_to_train_whole_that_does_not_exist_is_named_with_the_nearest():
    model = nn.ModuleDict({"norm": nn.LayerNorm(2), "up_proj": nn.Linear(2, 2)})
    arguments = SFTArguments(output_dir="out", lora_modules_to_save=["nrom"])
    with pytest.raises(ValueError, match="no module 'nrom'; did you mean 'norm'"):
        make_lora_config(arguments, "CAUSAL_LM", model)
    arguments.lora_modules_to_save = ["norm"]
    assert make_lora_config(arguments, "SEQ_CLS", model, ("score",)).modules_to_save == ["score", "norm"]


def test_packing_is_on_by_default_and_the_kind_that_needs_a_gpus_kernel_is_refused():
    assert SFTArguments(output_dir="out").packing
    assert not SFTArguments(output_dir="out", packing=False).packing
    with pytest.raises(ValueError, match="padding_free"):
        SFTArguments(output_dir="out", padding_free=True)


@pytest.mark.parametrize("argument_class", [DPOArguments, RewardArguments])
@pytest.mark.parametrize("method", ["qlora", "prefix", "adapter"])
def test_methods_that_only_sft_has_are_refused_by_name_elsewhere(argument_class, method):
    with pytest.raises(ValueError, match=f"'peft' is '{method}', expected one of lora, dora, none; .* for sft alone"):
        argument_class(output_dir="out", peft=method)
    assert argument_class(output_dir="out", peft="dora").peft == "dora"


@pytest.mark.parametrize("argument_class", ALL)
def test_a_tracker_that_is_not_installed_is_named_before_anything_is_loaded(argument_class, recipe, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'trackio', which is not installed: pip install"):
        parse_arguments(argument_class, [str(recipe), "--report_to", "trackio"])
