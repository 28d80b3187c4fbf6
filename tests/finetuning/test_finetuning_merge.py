"""Merging gives what the adapter on its base computes, keeps what training added, tells its lineage, happens once."""

import json
import shutil

import pytest
import torch
from finetuning_tiny import make_base
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from hf_scratch_gpt.evaluation.adapters import MERGED_ADAPTERS, adapter_digest, find_base, load_adapter
from hf_scratch_gpt.evaluation.models import load_model, load_reward_model
from hf_scratch_gpt.finetuning import merge as merging
from hf_scratch_gpt.finetuning.merge import TOLERANCES, main, merge, relative_error
from hf_scratch_gpt.finetuning.models import load_model as load_model_to_tune
from hf_scratch_gpt.finetuning.models import save_adapter, save_tuned
from hf_scratch_gpt.model.bottleneck_adapters import BottleneckConfig
from hf_scratch_gpt.reporting.lineage import Lineage
from hf_scratch_gpt.runs import StageArguments, StageRun, read_metrics

IDS = torch.randint(4, 300, (3, 11), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("models") / "base")


def shaken(model, seed=0):
    """The model with every trained weight far from where it was."""
    torch.manual_seed(seed)
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    return model.eval()


def lora(**settings):
    return LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", **settings)


def make_adapter(base, folder, config=None, auto_class=AutoModelForCausalLM, seed=0, **options):
    """An adapter folder of random weights as `sft` would write it, and the logits of its model."""
    model = load_model_to_tune(auto_class, str(base), AutoTokenizer.from_pretrained(base), **options)
    tuned = shaken(get_peft_model(model, config or lora(trainable_token_indices=[1, 2])), seed)
    save_adapter(tuned, folder)
    return folder, logits_of(tuned)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def make_run(base, folder, config=None, auto_class=AutoModelForCausalLM, added=None, seed=0, **options):
    """A finished run of a stage: the merged model, `adapter/` and `metrics.json`; and the logits of its model."""
    arguments = _RunArguments(output_dir=str(folder), model_name_or_path=str(base))
    with StageRun(arguments, "sft") as stage_run:
        tokenizer = AutoTokenizer.from_pretrained(base)
        model = load_model_to_tune(auto_class, str(base), tokenizer, **options)
        saved = save_tuned(shaken(get_peft_model(model, config or lora()), seed), tokenizer, folder, IDS.tolist())
        saved.config.update(added or {})
        saved.config.save_pretrained(folder)
        stage_run.finish({"steps": 1})
    return folder, logits_of(saved)


class _RunArguments(StageArguments):
    input_fields = ("model_name_or_path",)

    def __init__(self, output_dir, model_name_or_path):
        super().__init__(output_dir=output_dir)
        self.model_name_or_path = model_name_or_path


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"modules_to_save": ["model.norm"]}])
def test_merged_logits_are_those_of_the_adapter_on_its_base(base, tmp_path, settings):
    adapter, expected = make_adapter(base, tmp_path / "adapter", lora(trainable_token_indices=[1, 2], **settings))
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / "merged"))
    assert relative_error(logits_of(merged), expected) < 1e-5
    assert (expected - logits_of(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.1
    assert merged.lm_head.weight.data_ptr() == merged.get_input_embeddings().weight.data_ptr()  # still tied
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")
    assert read_metrics(tmp_path / "merged")["metrics"]["logit_error"] < 1e-5


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_the_type_of_the_weights_can_be_chosen_and_has_its_own_tolerance(base, tmp_path, dtype):
    adapter, expected = make_adapter(base, tmp_path / "adapter")
    assert main([str(adapter), str(tmp_path / "merged"), "--dtype", dtype]) == 0
    weights = load_file(tmp_path / "merged" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {getattr(torch, dtype)}
    metrics = read_metrics(tmp_path / "merged")["metrics"]
    error = relative_error(logits_of(load_model(str(tmp_path / "merged"))[0]), expected)
    assert error <= metrics["logit_tolerance"] == TOLERANCES[dtype]
    assert (error > 1e-5) is (dtype != "float32")
    with pytest.raises(ValueError, match=r"'dtype' is 'int8', expected one of float32"):
        merge(adapter, tmp_path / "other", dtype="int8")


def test_a_merge_that_changes_the_logits_is_refused_and_leaves_nothing(base, tmp_path, monkeypatch):
    adapter, _ = make_adapter(base, tmp_path / "adapter")
    save = merging.save_model

    def save_damaged(model, tokenizer, folder):
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[0] += 1
        save(model, tokenizer, folder)

    monkeypatch.setattr(merging, "save_model", save_damaged)
    with pytest.raises(ValueError, match=r"merging changed the logits by .* of their scale"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_an_untied_head_that_was_trained_survives(base, tmp_path):
    folder = tmp_path / "untied"
    shutil.copytree(base, folder)
    model = AutoModelForCausalLM.from_pretrained(base)
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    model.save_pretrained(folder)
    adapter, expected = make_adapter(folder, tmp_path / "adapter", lora(modules_to_save=["lm_head"]))
    merged = AutoModelForCausalLM.from_pretrained(merge(adapter, tmp_path / "merged"))
    assert relative_error(logits_of(merged), expected) < 1e-5
    trained = load_file(adapter / "adapter_model.safetensors")
    assert any(torch.equal(merged.lm_head.weight, value) for name, value in trained.items() if "lm_head" in name)


@pytest.mark.parametrize("labels", [1, 3])
@pytest.mark.parametrize("alone", [False, True])
def test_a_trained_score_head_survives_with_its_labels_and_calibration(base, tmp_path, labels, alone):
    config = LoraConfig(task_type="SEQ_CLS", r=4, target_modules="all-linear", modules_to_save=["score"])
    added = {"reward_mean": 1.5, "reward_std": 0.25}
    names = {number: f"label {number}" for number in range(labels)}
    run, expected = make_run(
        *(base, tmp_path / "run", config, AutoModelForSequenceClassification, added),
        num_labels=labels,
        id2label=names,
        label2id={name: number for number, name in names.items()},
    )
    adapter = run / "adapter"
    if alone:  # moved away from its run, which knows the names of the labels and the calibration
        shutil.copytree(adapter, tmp_path / "moved")
        adapter = tmp_path / "moved"
    merged = AutoModelForSequenceClassification.from_pretrained(merge(adapter, tmp_path / "merged"))
    assert relative_error(logits_of(merged), expected) < 1e-5
    trained = load_file(adapter / "adapter_model.safetensors")
    head = next(value for name, value in trained.items() if name.endswith("score.weight"))
    assert torch.equal(merged.score.weight, head)
    assert merged.config.num_labels == labels
    assert getattr(merged.config, "reward_mean", None) == (None if alone else 1.5)
    assert getattr(merged.config, "reward_std", None) == (None if alone else 0.25)
    if not alone:
        assert merged.config.id2label == names
    if labels == 1:
        for folder in (tmp_path / "merged", adapter):  # unmerged too, by the loader of reward models
            assert relative_error(logits_of(load_reward_model(str(folder))[0]), expected) < 1e-5


def test_merging_twice_is_refused_however_the_base_is_named(base, tmp_path):
    run, expected = make_run(base, tmp_path / "run")
    adapter = run / "adapter"
    told = "has this adapter .* in its weights already; it cannot be merged twice"
    with pytest.raises(ValueError, match="already a plain model, with nothing left to merge"):
        merge(run, tmp_path / "twice")
    with pytest.raises(ValueError, match=told):  # onto the run that has it
        merge(adapter, tmp_path / "twice", str(run))
    merged = merge(adapter, tmp_path / "merged")
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(merged)), expected) < 1e-5
    with pytest.raises(ValueError, match=told):  # onto the result of `merge`
        merge(adapter, tmp_path / "twice", str(merged))
    later, _ = make_run(merged, tmp_path / "later", seed=1)
    with pytest.raises(ValueError, match=told):  # onto what was tuned from that, and has it from its base
        merge(adapter, tmp_path / "twice", str(later))
    digests = getattr(AutoConfig.from_pretrained(later), MERGED_ADAPTERS)
    assert digests == [adapter_digest(adapter), adapter_digest(later / "adapter")]
    assert not (tmp_path / "twice").exists()
    # A stranger's adapter without our record, whose config names the merged model as its base.
    shutil.copytree(adapter, tmp_path / "stranger")
    (tmp_path / "stranger" / "base_model.json").unlink()
    config = json.loads((tmp_path / "stranger" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(merged)
    (tmp_path / "stranger" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=told):
        merge(tmp_path / "stranger", tmp_path / "twice")


def test_a_base_that_was_made_anew_at_its_place_is_refused(base, tmp_path, caplog):
    shutil.copytree(base, tmp_path / "base")
    adapter, expected = make_adapter(tmp_path / "base", tmp_path / "adapter")
    other = make_base(tmp_path / "other", seed=5)
    shutil.copy(other / "model.safetensors", tmp_path / "base" / "model.safetensors")
    with pytest.raises(ValueError, match=r"was trained on .*base, but the weights of .* are others, made since"):
        merge(adapter, tmp_path / "merged")
    merged = merge(adapter, tmp_path / "merged", str(base))  # the same weights elsewhere
    assert not [record for record in caplog.records if "other weights" in record.message]
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(merged)), expected) < 1e-5
    merge(adapter, tmp_path / "on_other", str(other))  # who insists is told
    assert [record for record in caplog.records if "was trained on other weights" in record.message]


def test_the_base_is_found_by_a_relative_path_and_after_all_has_moved(base, tmp_path, monkeypatch):
    (tmp_path / "here" / "runs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    shutil.copytree(base, "runs/pretrain")
    _, expected = make_run("runs/pretrain", tmp_path / "here" / "runs" / "sft")
    assert find_base("runs/sft/adapter") == "runs/pretrain"
    monkeypatch.chdir(tmp_path)  # from elsewhere the recorded path leads nowhere
    assert relative_error(logits_of(load_adapter(AutoModelForCausalLM, "here/runs/sft/adapter")), expected) < 1e-5
    (tmp_path / "here").rename(tmp_path / "there")
    merged = merge("there/runs/sft/adapter", "merged")
    assert relative_error(logits_of(AutoModelForCausalLM.from_pretrained(merged)), expected) < 1e-5
    shutil.rmtree("there/runs/pretrain")
    with pytest.raises(OSError, match="runs/pretrain"):
        load_adapter(AutoModelForCausalLM, "there/runs/sft/adapter")


def test_the_merged_folder_is_a_run_whose_lineage_is_the_adapters_and_the_bases(base, tmp_path):
    first, _ = make_run(base, tmp_path / "first")
    second, _ = make_run(first, tmp_path / "second", seed=1)
    merged = merge(second / "adapter", tmp_path / "merged")
    lineage = Lineage(merged)
    assert [run.name for run in lineage.runs] == ["first", "second", "merged"]
    assert {entry["run_id"] for _, entry in lineage.run.inputs()} == {
        read_metrics(folder)["run_id"] for folder in (first, second)
    }
    assert read_metrics(merged)["files"].keys() >= {"model.safetensors", "config.json", "tokenizer.json"}
    assert {"generation_config.json", "chat_template.jinja", "recipe.yaml"} <= {path.name for path in merged.iterdir()}
    with pytest.raises(ValueError, match="exists already"):
        merge(second / "adapter", merged)


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3), "prefix tuning"),
        (BottleneckConfig(task_type="CAUSAL_LM"), "bottleneck adapters"),
    ],
    ids=["prefix", "bottleneck"],
)
def test_what_cannot_be_merged_is_refused_by_name(base, tmp_path, config, told):
    adapter, expected = make_adapter(base, tmp_path / "adapter", config)
    with pytest.raises(ValueError, match=f"is of {told}, which cannot be merged into weights; chat, evaluate and"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()
    assert torch.equal(logits_of(load_adapter(AutoModelForCausalLM, adapter)), expected)


def test_a_damaged_adapter_is_named(base, tmp_path):
    adapter, _ = make_adapter(base, tmp_path / "adapter")
    weights = load_file(adapter / "adapter_model.safetensors")
    removed = sorted(weights)[0]
    save_file(
        {name: value for name, value in weights.items() if name != removed}, adapter / "adapter_model.safetensors"
    )
    with pytest.raises(ValueError, match="lacks weights that its config asks for"):
        merge(adapter, tmp_path / "merged")
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no weights \(adapter_model\.safetensors\)"):
        merge(adapter, tmp_path / "merged")
    (adapter / "adapter_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"adapter_config\.json: names no 'peft_type'"):
        merge(adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_plain_peft_reads_what_was_saved(base, tmp_path):
    run, expected = make_run(base, tmp_path / "run")
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), run / "adapter")
    assert relative_error(logits_of(plain), expected) < 1e-5
