"""A saved folder loads with the package and without it, and pipelines and adapters take it as a built-in model."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    pipeline,
)

from hf_scratch_gpt.model import _MODELS, ScratchGPTForMaskedLM, ScratchGPTTokenizer

SCRIPT = Path(__file__).with_name("without_the_package.py")


def save_every_class(folder: Path, model_factory, tokenizer) -> dict[str, torch.Tensor]:
    """Write a folder for each kind of model and Auto class, and what each computes: {"kind/class": first output}."""
    input_ids = torch.randint(0, 128, (2, 16))
    expected = {}
    for kind in ("modern", "gpt2", "sliding"):
        trunk = model_factory(kind)
        trunk.save_pretrained(folder / "trunk")
        for auto_class, model_class in _MODELS.items():
            name = f"{kind}/{auto_class.__name__}"
            torch.manual_seed(0)
            model = model_class.from_pretrained(folder / "trunk", pad_token_id=0).eval()
            model.save_pretrained(folder / name)
            with torch.no_grad():
                expected[name] = model(input_ids)[0].contiguous()
        shutil.rmtree(folder / "trunk")
    tokenizer.save_pretrained(folder / "tokenizer")
    expected["fill-mask"] = save_a_masked_model(folder / "masked", model_factory)
    save_file({"input_ids": input_ids}, folder / "inputs.safetensors")
    return expected


def save_a_masked_model(folder: Path, model_factory) -> torch.Tensor:
    """Write a masked model beside a tokenizer that has a mask token; its logits of one sentence."""
    tokenizer = ScratchGPTTokenizer.train(["The user asks and the assistant answers"] * 9, 300, mask_token=True)
    masked = ScratchGPTForMaskedLM(model_factory(vocab_size=len(tokenizer)).config).eval()
    masked.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    with torch.no_grad():
        return masked(**tokenizer("The user <|mask|> and", return_tensors="pt")).logits


def assert_works_without_the_package(folder: Path, python: str, expected: dict[str, torch.Tensor], tokenizer) -> None:
    """Run the script beside this file on the folder, offline, with that interpreter, and compare what it computed."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    command = [python, "-I", str(SCRIPT), str(folder)]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, cwd=folder)
    assert result.returncode == 0, result.stderr[-3000:]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    assert json.loads(result.stdout.splitlines()[-1]) == chat["input_ids"]
    actual = load_file(folder / "outputs.safetensors")
    assert actual.keys() == expected.keys()
    for name, output in expected.items():
        torch.testing.assert_close(actual[name], output, atol=1e-6, rtol=1e-6)


def test_folder_works_in_a_process_without_the_package(model_factory, tokenizer, tmp_path):
    expected = save_every_class(tmp_path, model_factory, tokenizer)
    assert_works_without_the_package(tmp_path, sys.executable, expected, tokenizer)
    input_ids = load_file(tmp_path / "inputs.safetensors")["input_ids"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved-again").eval()
    torch.testing.assert_close(again(input_ids).logits, expected["gpt2/AutoModelForCausalLM"], atol=1e-6, rtol=1e-6)


def test_every_head_carries_the_code_and_the_whole_auto_map(model_factory, tmp_path):
    model_factory().save_pretrained(tmp_path)
    written = {path.name for path in tmp_path.glob("*.py")}
    parts = (
        "cache_name",
        "configuration_scratch_gpt",
        "linear_cross_entropy",
        "modeling_scratch_gpt",
        "packed_linear",
    )
    assert written == {f"{part}.py" for part in parts}
    auto_map = json.loads((tmp_path / "config.json").read_text())["auto_map"]
    assert auto_map.pop("AutoConfig") == "configuration_scratch_gpt.ScratchGPTConfig"
    assert set(auto_map) == {auto_class.__name__ for auto_class in _MODELS}
    for auto_class in _MODELS:
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
