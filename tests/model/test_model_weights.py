"""Weights in every form: types, shards, devices, no memory, another vocabulary; and attention in every backend."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForCausalLM

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
INPUT = torch.randint(0, 128, (2, 16), generator=torch.Generator().manual_seed(0))


def logits_of(model) -> torch.Tensor:
    with torch.no_grad():
        return model(INPUT).logits


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loads_trains_and_stays_close(model, dtype, tmp_path):
    expected = logits_of(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}
    if loaded.model.rotary_emb is not None:
        assert loaded.model.rotary_emb.inv_freq.dtype == torch.float32, "angles of far positions need fp32"
    actual = logits_of(loaded)
    assert actual.dtype == dtype
    assert (actual.float() - expected).abs().mean() < 0.02 * expected.std()
    loaded(INPUT, labels=INPUT).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in loaded.parameters())
    loaded.save_pretrained(tmp_path / "half")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "half")  # "auto" is the default: the type it was saved in
    assert again.dtype == dtype
    assert torch.equal(logits_of(again), actual)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_checkpoint_loads_to_the_same_logits(model_factory, tied, tmp_path):
    model = model_factory(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) >= 3
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert ("lm_head.weight" in index["weight_map"]) is not tied
    assert set(index["weight_map"].values()) == {shard.name for shard in shards}
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(model))


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_device_map_places_every_tensor(model, device_map, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map)
    assert {tensor.device.type for tensor in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_layers_that_do_not_fit_are_read_from_disk(model, tmp_path):
    """Tied head and embedding stay together, and no layer is split: what `_no_split_modules` promises."""
    model.save_pretrained(tmp_path)
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map="auto", max_memory={"cpu": int(0.7 * size)}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in loaded.hf_device_map.values()
    assert not any("self_attn" in name or "mlp" in name for name in loaded.hf_device_map)
    assert torch.equal(logits_of(loaded), logits_of(model))


def test_a_model_made_without_memory_takes_weights_later(model):
    with torch.device("meta"):
        empty = ScratchGPTForCausalLM(model.config)
    assert {parameter.device.type for parameter in empty.parameters()} == {"meta"}
    assert empty.num_parameters() == model.num_parameters()
    loaded = ScratchGPTForCausalLM.from_pretrained(None, config=model.config, state_dict=model.state_dict()).eval()
    assert torch.equal(logits_of(loaded), logits_of(model))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [160, 96])
def test_resized_vocabulary_keeps_the_old_rows_and_survives_a_round_trip(model_factory, tied, size, tmp_path):
    model = model_factory(tie_word_embeddings=tied)
    inputs = INPUT.clamp(max=95)
    with torch.no_grad():
        before = model(inputs).logits
        model.resize_token_embeddings(size, mean_resizing=False)
        after = model(inputs).logits
    kept = min(size, 128)
    assert after.shape[-1] == model.config.vocab_size == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept], **TOLERANCE)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is tied
    model(inputs, labels=inputs).loss.backward()
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(AutoModelForCausalLM.from_pretrained(tmp_path)(inputs).logits, after, **TOLERANCE)


@pytest.mark.parametrize("inputs", ["plain", "padded", "packed"])
def test_eager_sdpa_and_flex_attention_agree(model, inputs):
    """Flex attention runs uncompiled here: the same mathematics and masks, without minutes of code generation."""
    mask = torch.ones_like(INPUT)
    mask[0, :5] = 0
    positions = torch.cat([torch.arange(7), torch.arange(9)])[None].expand(2, -1)
    arguments = {
        "plain": {},
        "padded": {"attention_mask": mask},
        "packed": {"position_ids": positions, "use_cache": False},
    }[inputs]
    seen = mask.bool() if inputs == "padded" else torch.ones_like(mask).bool()
    logits = {}
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        for name in ("eager", "sdpa", "flex_attention"):
            model.set_attn_implementation(name)
            logits[name] = model(INPUT, **arguments).logits[seen]
    torch.testing.assert_close(logits["sdpa"], logits["eager"], **TOLERANCE)
    torch.testing.assert_close(logits["flex_attention"], logits["eager"], **TOLERANCE)


def test_compiled_code_gives_the_same_logits():
    """One small layer, whole graph, real code generation."""
    torch.compiler.reset()
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 1}
    model = ScratchGPTForCausalLM(ScratchGPTConfig(vocab_size=128, **sizes)).eval()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(INPUT, use_cache=False).logits, logits_of(model), **TOLERANCE)
