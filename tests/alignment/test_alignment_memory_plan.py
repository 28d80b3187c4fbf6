"""DPO's memory is planned before it starts: weights to the byte, activations as an estimate, and refused in time."""

import json

import pytest
import torch
from alignment_tiny import make_model, write_preferences, write_recipe
from transformers import AutoConfig, LlamaConfig

from hf_scratch_gpt.alignment import dpo, memory_plan
from hf_scratch_gpt.alignment.memory_plan import DPOMemory, machine_memory, plan_memory
from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM
from hf_scratch_gpt.runs import parse_arguments, read_metrics


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("models") / "sft")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_preferences(tmp_path_factory.mktemp("data") / "pairs.jsonl")


def recipe(folder, model, data, **settings):
    return parse_arguments(dpo.Arguments, [write_recipe(folder, model, data, kl_prompts=0, **settings)])


@pytest.mark.parametrize("settings", [{}, {"peft": "none"}, {"lora_modules_to_save": ["model.norm"]}])
def test_weights_gradients_and_states_are_planned_to_the_byte(settings, model, data, tmp_path, monkeypatch):
    found = {}

    def look(trainer, stage_run, tokenizer, sample):
        trainer.train()
        weights = list(trainer.model.parameters())
        states = trainer.optimizer.state if hasattr(trainer.optimizer, "state") else {}
        found["policy"] = sum(weight.numel() * weight.element_size() for weight in weights)
        found["gradients"] = sum(4 * weight.numel() for weight in weights if weight.requires_grad)
        found["optimizer"] = sum(
            tensor.numel() * tensor.element_size()
            for state in states.values()
            for name, tensor in state.items()
            if name != "step"
        )
        found["reference"] = trainer.ref_model
        raise RuntimeError("looked")

    monkeypatch.setattr(dpo, "train_and_save", look)
    arguments = recipe(tmp_path / "run", model, data, max_steps=1, **settings)
    with pytest.raises(RuntimeError, match="looked"):
        dpo.run(arguments)
    plan = plan_memory(AutoConfig.from_pretrained(model), arguments, 46, keeps_reference=False)
    assert found["reference"] is None
    assert plan.reference == 0
    for name in ("policy", "gradients", "optimizer"):
        assert getattr(plan, name) == found[name], name


def test_a_second_model_is_counted_where_there_is_one(model, data, tmp_path):
    arguments = recipe(tmp_path / "run", model, data, peft="none")
    plan = plan_memory(AutoConfig.from_pretrained(model), arguments, 46, keeps_reference=True)
    assert plan.reference == plan.policy == plan.gradients
    assert plan.optimizer == 2 * plan.policy
    assert plan.certain == 5 * plan.policy


@pytest.mark.parametrize("bf16", [False, True])
def test_activations_are_near_what_autograd_keeps(bf16, data, tmp_path):
    config = ScratchGPTConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=32,
        max_position_embeddings=128,
    )
    arguments = recipe(tmp_path / "run", "x", data, peft="none", bf16=bf16, per_device_train_batch_size=4)
    plan = plan_memory(config, arguments, 128, keeps_reference=False)
    model, kept = ScratchGPTForCausalLM(config).train(), {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)
        return tensor

    alive = []
    ids = torch.randint(512, (8, 128))
    owned = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    measured = sum(size for pointer, size in kept.items() if pointer not in owned)
    assert plan.activations == pytest.approx(measured, rel=0.35)


def test_other_families_are_planned_too(data, tmp_path):
    config = LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4
    )
    arguments = recipe(tmp_path / "run", "x", data)
    plan = plan_memory(config, arguments, 100, keeps_reference=False)
    assert plan.activations == 68 * 2 * 4 * 100 * 64 * 2
    assert 0 < plan.gradients < plan.policy
    arguments.gradient_checkpointing = True
    assert plan_memory(config, arguments, 100, keeps_reference=False).activations < plan.activations


def test_what_can_never_fit_is_refused_before_the_model_is_loaded(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(dpo, "machine_memory", lambda use_cpu: 100_000)
    monkeypatch.setattr(dpo, "load_model", lambda *args: pytest.fail("loaded"))
    arguments = recipe(tmp_path / "run", model, data, peft="none")
    message = r"weights, gradients and optimizer states take \d+ KiB, and there are 97.7 KiB; set peft to lora"
    with pytest.raises(ValueError, match=message):
        dpo.run(arguments)


PLAN = DPOMemory(policy=40, reference=0, gradients=4, optimizer=8, activations=30, logits=10, rows=8, tokens=46)


def test_what_a_smaller_batch_makes_fit_is_warned_of():
    assert PLAN.check(None, "m") is None
    assert PLAN.check(103, "m") is None  # a tenth stays free
    assert "m: may not fit" in PLAN.check(100, "m")
    assert "lower per_device_train_batch_size" in PLAN.check(60, "m")
    with pytest.raises(ValueError, match="take a smaller model"):
        PLAN.check(51, "m")


def test_the_plan_is_printed_before_the_first_step_and_recorded(model, data, tmp_path, capsys):
    folder = dpo.run(recipe(tmp_path / "run", model, data, max_steps=1))
    printed = capsys.readouterr().out
    assert "dpo: memory about" in printed
    assert "for 8 rows of up to" in printed
    plan = read_metrics(folder)["metrics"]["planned_memory"]
    assert plan["reference"] == 0
    assert plan == json.loads(json.dumps(plan))
    assert plan["rows"] == 8


def test_a_containers_limit_counts_and_no_limit_does_not(tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       2000 kB\nMemFree: 1 kB\n")
    assert machine_memory(True, tmp_path, meminfo) == 2_048_000
    (tmp_path / "memory.max").write_text("1000000\n")
    assert machine_memory(True, tmp_path, meminfo) == 1_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert machine_memory(True, tmp_path, meminfo) == 2_048_000
    assert machine_memory(True, tmp_path, tmp_path / "none") is None
    assert memory_plan.machine_memory(True) > 2**28
