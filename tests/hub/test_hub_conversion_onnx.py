"""An ONNX export in ONNX Runtime computes what the model does: any rows and tokens, padded, and with its cache."""

import copy
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from doctor_tiny import make_tokenizer, shrunk
from transformers import AutoTokenizer, DynamicCache, GenerationConfig
from transformers.exporters.base import ExportedModel

from hf_scratch_gpt.hub.conversion import onnx_file
from hf_scratch_gpt.hub.conversion.onnx_file import FILE_NAME, write_onnx
from hf_scratch_gpt.hub.conversion.onnx_runtime import OnnxModel, compare_with_onnxruntime
from hf_scratch_gpt.model.cache_name import CACHE_NAME

NEW = 64
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
# Together: each norm, MLP, kind of position and of head, grouped heads, biases, band, cap, and the saved dtypes.
KINDS = {
    "modern, tied, saved in bf16": ("modern-5m", {"num_hidden_layers": 1}, torch.bfloat16),
    "modern without QK-norm, biases, cap, untied, yarn": (
        "modern-5m",
        {
            "num_hidden_layers": 1,
            "use_qk_norm": False,
            "attention_bias": True,
            "mlp_bias": True,
            "final_logit_softcapping": 2.0,
            "tie_word_embeddings": False,
            "rope_parameters": YARN,
        },
        torch.float32,
    ),
    "gpt3, banded": ("gpt3-125m", {}, torch.float32),
    "gpt1": ("gpt1", {"num_hidden_layers": 1}, torch.float32),
}


@dataclass
class Export:
    """A model in fp32, where it was exported to, and the figures of that."""

    model: torch.nn.Module
    folder: Path
    figures: dict


@pytest.fixture(scope="module", params=KINDS)
def export(request, tmp_path_factory) -> Export:
    preset, fields, dtype = KINDS[request.param]
    model = shrunk(preset, max_position_embeddings=96, **fields).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():  # logits far from each other, and no vector of ones or zeros
        parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
    model = model.to(dtype)
    folder = tmp_path_factory.mktemp("onnx")
    figures = write_onnx(model, make_tokenizer(), folder)
    assert model.dtype == dtype  # the caller's model stays as it was
    return Export(model.float(), folder, figures)


def padded_batch(vocab_size: int, rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random ids and a mask that pads each row on the left, one token more than the row before."""
    ids = torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(2))
    return ids, (torch.arange(length) >= torch.arange(rows)[:, None]).long()


def test_any_shape_is_exact_and_64_greedy_tokens_with_the_cache_are_equal(export):
    assert "onnxruntime" in export.figures["checked_with"]
    assert export.figures["largest_logit_difference"] <= 1e-5
    graph, model = OnnxModel(export.folder / FILE_NAME), export.model
    for rows, length in ((1, 1), (1, 96), (4, 31)):
        ids, mask = padded_batch(model.config.vocab_size, rows, length)
        logits, cache = graph.forward(ids, mask, graph.empty_cache(rows))
        with torch.no_grad():
            expected = model(input_ids=ids, attention_mask=mask).logits
        assert (logits - expected)[mask.bool()].abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
        assert {array.shape[2] for array in cache} == {length}
    ids, mask = padded_batch(model.config.vocab_size, 4, 9)
    options = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW, "pad_token_id": 1}
    expected = model.generate(ids, attention_mask=mask, **options, eos_token_id=model.config.vocab_size)
    written = graph.greedy(ids, mask, NEW)
    assert torch.equal(written, expected[:, 9:])
    assert len(written.unique()) > 4  # or all would be equal whatever was computed


def test_transformers_loads_the_folder_back(export):
    loaded = ExportedModel.from_pretrained(export.folder, device="cpu")
    ids, mask = padded_batch(export.model.config.vocab_size, 2, 7)
    config, cache = export.model.config, DynamicCache()
    empty = torch.zeros(2, config.num_key_value_heads, 0, config.head_dim)
    for layer in range(config.num_hidden_layers):
        cache.update(empty, empty.clone(), layer)
    outputs = loaded(input_ids=ids, attention_mask=mask, **{CACHE_NAME: cache})
    with torch.no_grad():
        expected = export.model(input_ids=ids, attention_mask=mask).logits
    assert torch.allclose(outputs.logits[mask.bool()], expected[mask.bool()], rtol=1e-5, atol=1e-5)
    assert loaded.config.dtype == torch.float32
    tokenizer, text = AutoTokenizer.from_pretrained(export.folder), "naïve 你好 🙂 <|im_end|>"
    assert tokenizer(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
    assert tokenizer.chat_template == make_tokenizer().chat_template
    saved = GenerationConfig.from_pretrained(export.folder)
    assert saved.eos_token_id == export.model.generation_config.eos_token_id


def test_the_graph_tells_no_path_of_the_machine(export):
    graph = (export.folder / FILE_NAME).read_bytes()
    for path in (Path(onnx_file.__file__).parent, Path(torch.__file__).parent):
        assert str(path).encode() not in graph
    assert b"modeling_scratch_gpt" not in graph


def test_a_damaged_weight_is_found(export):
    weights = export.folder / f"{FILE_NAME}.data"
    whole = weights.read_bytes()
    damaged = bytearray(whole)
    place = len(whole) // 2 // 4 * 4
    damaged[place + 3] ^= 0x40  # the highest bit of an exponent
    try:
        weights.write_bytes(damaged)
        with pytest.raises(ValueError, match="not usable"):
            compare_with_onnxruntime(export.folder / FILE_NAME, export.model)
    finally:
        weights.write_bytes(whole)


def test_another_models_logits_are_found(export):
    other = copy.deepcopy(export.model)
    other.lm_head.weight.data += 1e-3 * torch.randn(other.lm_head.weight.shape)
    with pytest.raises(ValueError, match=r"in onnxruntime the logits of 1 x 1 tokens"):
        compare_with_onnxruntime(export.folder / FILE_NAME, other)


@pytest.mark.parametrize("rope_type", ["dynamic", "longrope"])
def test_frequencies_that_follow_the_length_are_refused_by_name(tmp_path, rope_type):
    rope = {"rope_type": rope_type, "rope_theta": 1e4, "factor": 2.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    with pytest.raises(ValueError, match=rf"`rope_parameters\['rope_type'\]` = '{rope_type}'"):
        write_onnx(shrunk("modern-5m", rope_parameters=rope), None, tmp_path)


def test_a_bidirectional_model_is_refused(tmp_path):
    model = shrunk("modern-5m")
    model.config.is_causal = False
    with pytest.raises(ValueError, match="`is_causal` = False"):
        write_onnx(model, None, tmp_path)


def test_missing_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"onnx and onnxscript: pip install 'hf_scratch_gpt\[export\]'"):
        write_onnx(shrunk("modern-5m"), None, tmp_path)
