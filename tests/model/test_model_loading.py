"""A saved folder loads with the package and without it, and pipelines and adapters take it as a built-in model."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    pipeline,
)

from hf_scratch_gpt.model import ScratchGPTForMaskedLM, ScratchGPTForSequenceClassification, ScratchGPTTokenizer

# Runs where the package cannot be imported, as on a machine that only has transformers.
WITHOUT_THE_PACKAGE = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_scratch_gpt":
            raise ModuleNotFoundError("No module named 'hf_scratch_gpt'", name="hf_scratch_gpt")

sys.meta_path.insert(0, Absent())
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

folder = sys.argv[1]
inputs = load_file(f"{folder}/inputs.safetensors")["input_ids"]
logits = {}
for kind in ("modern", "gpt2"):
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/{kind}", trust_remote_code=True).eval()
    with torch.no_grad():
        logits[kind] = model(inputs).logits
    try:
        type(model.config).from_preset("modern-5m")
    except ImportError as error:
        assert "pip install hf_scratch_gpt" in str(error)
    else:
        raise AssertionError("the package was found after all")
model.generate(inputs, max_new_tokens=3, do_sample=False, pad_token_id=0)
reward = AutoModelForSequenceClassification.from_pretrained(f"{folder}/reward", trust_remote_code=True).eval()
with torch.no_grad():
    logits["reward"] = reward(inputs[:1]).logits
fill = pipeline("fill-mask", model=f"{folder}/masked", trust_remote_code=True)
assert type(fill.model).__name__ == "ScratchGPTForMaskedLM"
assert not fill.model.config.is_causal
logits["masked"] = fill.model(**fill.tokenizer("The user <|mask|> and", return_tensors="pt")).logits.detach()
assert fill("The user <|mask|> and")[0]["token"] == logits["masked"][0].softmax(-1)[-2].argmax().item()
save_file(logits, f"{folder}/logits.safetensors")
model.save_pretrained(f"{folder}/saved-again")
tokenizer = AutoTokenizer.from_pretrained(f"{folder}/tokenizer")
print(tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)["input_ids"])
assert "hf_scratch_gpt" not in sys.modules
"""


def test_folder_works_in_a_process_without_the_package(model_factory, tokenizer, tmp_path):
    input_ids = torch.randint(0, 128, (2, 16))
    expected = {}
    for kind in ("modern", "gpt2"):
        model = model_factory(kind)
        model.save_pretrained(tmp_path / kind)
        expected[kind] = model(input_ids).logits
    model_factory().save_pretrained(tmp_path / "base")
    reward = ScratchGPTForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=1).eval()
    reward.save_pretrained(tmp_path / "reward")
    expected["reward"] = reward(input_ids[:1]).logits
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    mask_tokenizer = ScratchGPTTokenizer.train(["The user asks and the assistant answers"] * 9, 300, mask_token=True)
    masked = ScratchGPTForMaskedLM(model_factory(vocab_size=len(mask_tokenizer)).config).eval()
    masked.save_pretrained(tmp_path / "masked")
    mask_tokenizer.save_pretrained(tmp_path / "masked")
    expected["masked"] = masked(**mask_tokenizer("The user <|mask|> and", return_tensors="pt")).logits
    save_file({"input_ids": input_ids}, tmp_path / "inputs.safetensors")

    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", "-c", WITHOUT_THE_PACKAGE, str(tmp_path)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=tmp_path)
    assert result.returncode == 0, result.stderr[-3000:]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert json.loads(result.stdout.splitlines()[-1]) == chat["input_ids"]
    actual = load_file(tmp_path / "logits.safetensors")
    for name, logits in expected.items():
        torch.testing.assert_close(actual[name], logits.detach(), atol=1e-6, rtol=1e-6)

    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved-again").eval()
    torch.testing.assert_close(again(input_ids).logits, expected["gpt2"], atol=1e-6, rtol=1e-6)


def test_every_head_carries_the_code_and_the_whole_auto_map(model_factory, tmp_path):
    model_factory().save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.glob("*.py")}
    assert written == {"configuration_scratch_gpt.py", "modeling_scratch_gpt.py"}
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.pop("AutoConfig") == "configuration_scratch_gpt.ScratchGPTConfig"
    classes = [
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForMaskedLM,
        AutoModelForSequenceClassification,
        AutoModelForTokenClassification,
    ]
    assert set(auto_map) == {auto_class.__name__ for auto_class in classes}
    for auto_class in classes:
        model = auto_class.from_pretrained(tmp_path)
        assert f"modeling_scratch_gpt.{type(model).__name__}" == auto_map[auto_class.__name__]
        assert type(model).__module__ == "hf_scratch_gpt.model.modeling_scratch_gpt"
    assert type(AutoConfig.from_pretrained(tmp_path)).__module__ == "hf_scratch_gpt.model.configuration_scratch_gpt"


def test_text_generation_pipeline_takes_text_and_chat(model_factory, tokenizer, tmp_path):
    model_factory(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generate = pipeline("text-generation", str(tmp_path), max_new_tokens=4, do_sample=False)
    assert generate("The user")[0]["generated_text"].startswith("The user")
    answer = generate([{"role": "user", "content": "hi"}])[0]["generated_text"][-1]
    assert answer["role"] == "assistant"


@pytest.mark.parametrize("kind", ["modern", "gpt2"])
def test_lora_on_all_linear_layers_trains_merges_and_checkpoints(model_factory, kind):
    from peft import LoraConfig, get_peft_model

    model = model_factory(kind)
    input_ids = torch.randint(0, 128, (2, 12))
    before = model(input_ids).logits.detach()
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    torch.testing.assert_close(adapted(input_ids).logits, before)
    targets = {name.split(".")[-4] for name, _ in adapted.named_parameters() if "lora_A" in name}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"} | (
        {"gate_proj"} if kind == "modern" else set()
    )
    adapted.train()
    adapted.gradient_checkpointing_enable()
    adapted.enable_input_require_grads()
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.5)
    for _ in range(3):
        loss = adapted(input_ids, labels=input_ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.eval()
    with torch.no_grad():
        tuned = adapted(input_ids).logits
        assert (tuned - before).abs().max() > 1e-3
        merged = adapted.merge_and_unload()
        torch.testing.assert_close(merged(input_ids).logits, tuned, atol=1e-5, rtol=1e-4)
