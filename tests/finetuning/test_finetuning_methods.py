"""Each method of `--peft` trains, saves and reloads as the same model, for our own loaders and for PEFT's."""

import json
import types

import pytest
import torch
from finetuning_tiny import make_base, make_rows, write_rows
from peft import AutoPeftModelForCausalLM, PeftModel, PrefixTuningConfig, get_peft_model
from test_finetuning_packing import make_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_scratch_gpt.alignment import dpo
from hf_scratch_gpt.chat.answering import find_model, load_chat_model
from hf_scratch_gpt.evaluation.adapters import attach
from hf_scratch_gpt.evaluation.generation import generate_answers
from hf_scratch_gpt.evaluation.mode import context_length_of
from hf_scratch_gpt.evaluation.models import load_model
from hf_scratch_gpt.finetuning import methods, sft
from hf_scratch_gpt.finetuning.models import save_tuned
from hf_scratch_gpt.model.bottleneck_adapters import BottleneckConfig, BottleneckLayer
from hf_scratch_gpt.runs import parse_arguments, read_metrics

PREFIX = 5
METHODS = {
    "lora": {"lora_r": 4},
    "dora": {"lora_r": 4},
    "prefix": {"prefix_tokens": PREFIX, "learning_rate": 0.1},
    "adapter": {"adapter_size": 6},
}
IDS = torch.randint(4, 300, (3, 11), generator=torch.Generator().manual_seed(1))
QUESTION = [{"role": "user", "content": "Which word follows red?"}]
LONGER = [{"role": "user", "content": "Which word follows white? Please. Please."}]


def tune(base, data, folder, **changes):
    values = {
        **{"model_name_or_path": str(base), "dataset": data, "output_dir": str(folder), "bf16": False},
        **{"max_steps": 10, "learning_rate": 0.02, "heldout_fraction": 0.2, "per_device_train_batch_size": 4},
        **changes,
    }
    folder.with_suffix(".yaml").write_text(json.dumps(values))
    return sft.run(parse_arguments(sft.Arguments, [str(folder.with_suffix(".yaml"))]))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = make_base(tmp_path_factory.mktemp("models") / "base")
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.manual_seed(0)
    model.config.tie_word_embeddings = False  # or it would say the same word again and again
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) / 4)
    with torch.no_grad():  # far from the first weights, at which attention hardly matters, and so no prefix
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", make_rows(40))


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory):
    """A run of each method, and the logits that its model had when it was saved."""
    folder, found = tmp_path_factory.mktemp("runs"), {}
    trained = sft.measure_heldout

    def note(model, *args):
        with torch.no_grad():
            found[folder.name] = model(input_ids=IDS).logits.clone()
        return trained(model, *args)

    logits = {}
    for method, settings in METHODS.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sft, "measure_heldout", note)
            tune(base, data, folder / method, peft=method, **settings)
        logits[method] = found.pop(folder.name)
    return folder, logits


def logits_of(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("method", METHODS)
def test_the_heldout_loss_falls(base, tuned, method):
    folder = tuned[0] / method
    arguments = parse_arguments(sft.Arguments, [str(folder.with_suffix(".yaml"))])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    heldout = sft.load_examples(arguments, "conversations", sft.conversation_encoder(tokenizer), 91).heldout
    before = sft.measure_heldout(AutoModelForCausalLM.from_pretrained(base), heldout, tokenizer.pad_token_id, 4)
    metrics = read_metrics(folder)["metrics"]
    assert metrics["peft"] == method
    assert metrics["heldout_tokens"] == before["heldout_tokens"]
    assert metrics["heldout_loss"] < 0.97 * before["heldout_loss"]


@pytest.mark.parametrize("method", METHODS)
def test_the_folder_is_complete_and_reloads_with_the_same_logits(base, tuned, method):
    folder, expected = tuned[0] / method, tuned[1][method]
    assert (expected - logits_of(AutoModelForCausalLM.from_pretrained(base))).abs().max() > 0.05
    torch.testing.assert_close(logits_of(load_model(str(folder))[0]), expected, rtol=0, atol=1e-6)
    names = {path.name for path in folder.iterdir()}
    assert {"tokenizer.json", "chat_template.jinja", "generation_config.json", "recipe.yaml", "metrics.json"} <= names
    assert "checkpoints" not in names
    is_merged = method in ("lora", "dora")
    assert ({"config.json", "model.safetensors", "adapter"} <= names) is is_merged
    assert ({"adapter_config.json", "adapter_model.safetensors", "base_model.json"} <= names) is not is_merged
    adapter = folder / "adapter" if is_merged else folder
    tolerance = 1e-4 if is_merged else 1e-6
    for reloaded in (
        AutoPeftModelForCausalLM.from_pretrained(adapter),
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter),
        load_model(str(adapter))[0],
    ):
        torch.testing.assert_close(logits_of(reloaded), expected, rtol=0, atol=tolerance)
    assert read_metrics(folder)["inputs"]["model_name_or_path"]["path"] == str(base)
    assert set(read_metrics(folder)["files"]) >= ({"config.json"} if is_merged else {"adapter_model.safetensors"})


def greedy_without_cache(model, prompt, ends, suppressed, count):
    ids = torch.tensor([prompt])
    for _ in range(count):
        logits = logits_of(model, ids)[0, -1]
        logits[suppressed] = -torch.inf
        ids = torch.cat([ids, logits.argmax()[None, None]], 1)
        if ids[0, -1] in ends:
            break
    return ids[0, len(prompt) :].tolist()


@pytest.mark.parametrize("method", ["prefix", "adapter"])
def test_generation_after_reloading_with_a_cache_is_that_without(tuned, method):
    """By `generate`, by our batched decoding with padding on the left, and by reading all anew at each token."""
    from hf_scratch_gpt.evaluation.generation import end_token_ids, suppressed_token_ids

    model, tokenizer = load_model(str(tuned[0] / method))
    ends, suppressed = end_token_ids(model, tokenizer), suppressed_token_ids(model, tokenizer)
    answers = generate_answers(model, tokenizer, [QUESTION, LONGER], max_new_tokens=8)
    chat = load_chat_model(str(tuned[0] / method))
    found = []
    for conversation, answer in zip((QUESTION, LONGER), answers, strict=True):
        prompt = tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
        expected = greedy_without_cache(model, prompt, ends, suppressed, 8)
        assert list(answer.token_ids) == expected
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": ends, "suppress_tokens": suppressed}
        ids = torch.tensor([prompt])
        generated = chat.model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, len(prompt) :].tolist()
        assert generated[: len(expected)] == expected
        found.append(tuple(expected))
    assert len(set(found[0] + found[1])) > 1  # not one word again and again


def test_a_prefix_takes_its_share_of_the_context(base, data, tuned, tmp_path):
    model, _ = load_model(str(tuned[0] / "prefix"))
    assert context_length_of(model) == 96 - PREFIX
    with pytest.raises(ValueError, match=r"'prefix_tokens' is 95, which leaves 1 of the context"):
        tune(base, data, tmp_path / "none_left", peft="prefix", prefix_tokens=95)
    with pytest.raises(ValueError, match="96 tokens"):
        tune(base, data, tmp_path / "too_long", peft="prefix", max_length=92, prefix_tokens=PREFIX)
    assert read_metrics(tuned[0] / "prefix")["metrics"]["packing"] is False
    assert read_metrics(tuned[0] / "adapter")["metrics"]["packing"] is True


@pytest.mark.parametrize("name", ["rotary", "learned", "banded", "gpt2", "llama"])
def test_a_prefix_starts_as_the_keys_and_values_of_real_tokens(name):
    """A prefix of the first tokens of a text, and then the rest of it, is the text."""
    model, text = make_model(name), IDS[:1]
    with torch.no_grad():
        expected = model(input_ids=text).logits[:, 4:]
    tuned = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    methods.initialise_prefix(tuned, text[0, :4].tolist())
    torch.testing.assert_close(logits_of(tuned, text[:, 4:]), expected, rtol=1e-4, atol=1e-4)
    methods.initialise_prefix(tuned, text[0, :2].tolist())  # repeated where the text is shorter
    assert tuned.prompt_encoder["default"].embedding.weight.shape[0] == 4


@pytest.mark.parametrize("name", ["rotary", "gpt2", "llama"])
def test_bottleneck_adapters_stand_behind_both_sublayers_and_start_as_the_identity(name):
    model = make_model(name)
    expected = logits_of(model)
    tuned = get_peft_model(model, BottleneckConfig(task_type="CAUSAL_LM", bottleneck_size=3))
    assert sum(isinstance(module, BottleneckLayer) for module in tuned.modules()) == 4  # two layers of two
    assert torch.equal(logits_of(tuned), expected)
    trained = {name.split(".")[-3] for name, weight in tuned.named_parameters() if weight.requires_grad}
    assert trained == {"bottleneck_down", "bottleneck_up"}
    for weight in tuned.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight)
    assert not torch.allclose(logits_of(tuned), expected)
    with tuned.disable_adapter():
        assert torch.equal(logits_of(tuned), expected)
    with pytest.raises(ValueError, match="cannot be merged"):
        tuned.merge_and_unload()
    assert torch.equal(logits_of(tuned.unload()), expected)


def test_a_bottleneck_by_hand():
    layer = BottleneckLayer(torch.nn.Linear(2, 2, bias=False), "default", size=1)
    torch.nn.init.eye_(layer.base_layer.weight)
    with torch.no_grad():
        layer.bottleneck_down["default"].weight.copy_(torch.tensor([[1.0, 1.0]]))
        layer.bottleneck_down["default"].bias.fill_(-1.0)
        layer.bottleneck_up["default"].weight.copy_(torch.tensor([[2.0], [0.0]]))
    # h = (1, 2); down: 1 + 2 - 1 = 2; gelu(2) = 1.9545; up: 3.9090 on the first channel
    torch.testing.assert_close(layer(torch.tensor([[1.0, 2.0]])), torch.tensor([[4.9090, 2.0]]), rtol=1e-4, atol=0)


def test_what_cannot_work_is_refused_by_name(base, data, tuned, tmp_path, monkeypatch):
    refused = {
        "'gradient_checkpointing' is on": {"peft": "prefix", "gradient_checkpointing": True},
        "'lora_modules_to_save' is set": {"peft": "prefix", "lora_modules_to_save": ["model.norm"]},
        "'adapter_size' is 0": {"peft": "adapter", "adapter_size": 0},
        "'prefix_tokens' is 0": {"peft": "prefix", "prefix_tokens": 0},
        "none of the modules wi_1": {"peft": "adapter", "lora_target_modules": ["wi_1"]},
        "did you mean 'prefix'": {"peft": "prefixx"},
    }
    for number, (told, settings) in enumerate(refused.items()):
        with pytest.raises(ValueError, match=told):
            tune(base, data, tmp_path / f"{number}", **settings)
    with pytest.raises(ValueError, match="an adapter without a model; tune its base"):
        tune(tuned[0] / "prefix", data, tmp_path / "on_top")
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c"}] * 4
    arguments = {"model_name_or_path": str(tuned[0] / "adapter"), "output_dir": str(tmp_path / "dpo")}
    with pytest.raises(ValueError, match="an adapter without a model"):
        dpo.run(dpo.Arguments(**arguments, dataset=write_rows(tmp_path / "pairs.jsonl", pairs)))
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_model(str(tuned[0] / "prefix"))[0] == str(tuned[0] / "prefix")


def test_qlora_needs_bitsandbytes_and_a_gpu_and_then_asks_for_four_bits(base, data, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="'qlora', which needs bitsandbytes: pip install bitsandbytes"):
        tune(base, data, tmp_path / "run", peft="qlora")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    with pytest.raises(ValueError, match="'qlora', which needs a GPU"):
        tune(base, data, tmp_path / "run", peft="qlora")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr("transformers.BitsAndBytesConfig", lambda **settings: types.SimpleNamespace(**settings))
    arguments = sft.Arguments(output_dir="out", peft="qlora")
    arguments.use_cpu = False
    methods.check_method(arguments)
    settings = methods.quantization_settings(arguments)
    config = settings["quantization_config"]
    assert (config.load_in_4bit, config.bnb_4bit_quant_type, config.bnb_4bit_use_double_quant) == (True, "nf4", True)
    assert settings["device_map"] == {"": 0}
    lora = methods.make_peft_config(arguments, make_model("rotary"), [1])
    assert (lora.r, lora.target_modules, lora.trainable_token_indices) == (16, "all-linear", [1])
    assert methods.quantization_settings(sft.Arguments(output_dir="out")) == {}


def test_what_was_trained_on_a_base_in_four_bits_is_merged_into_the_base_as_it_was(base, tmp_path):
    """Stand-in for a quantised base: the same model with rounded weights, and the flag that tells of it."""
    rounded = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_((weight * 32).round() / 32)
    arguments = sft.Arguments(output_dir="out", peft="lora", lora_r=4)
    tuned = get_peft_model(rounded, methods.make_peft_config(arguments, rounded, [1, 2]))
    for weight in tuned.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight, std=0.1)
    rounded.is_loaded_in_4bit = True
    saved = save_tuned(tuned, AutoTokenizer.from_pretrained(base), tmp_path / "tuned", IDS.tolist())
    exact = attach(PeftModel, AutoModelForCausalLM.from_pretrained(base), tmp_path / "tuned" / "adapter", str(base))
    torch.testing.assert_close(logits_of(saved), logits_of(exact), rtol=0, atol=1e-4)
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    torch.testing.assert_close(logits_of(reloaded), logits_of(exact), rtol=0, atol=1e-4)
    assert (logits_of(reloaded) - logits_of(tuned)).abs().max() > 1e-3
