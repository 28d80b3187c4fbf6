"""vLLM's Transformers modelling backend: its contract, and a stand-in that serves our models as it does.

vLLM itself is not needed. What it asks of a model, with the place that says or does it (repository vllm-project/vllm,
its main branch about v0.32.0: docs/models/supported_models.md at 0046f77, and below vllm/model_executor/models:
registry.py at 0002bff, transformers/__init__.py at 055e47c, base.py at 03bf3c9, causal.py at 0564ab2, utils.py at
02aa9ec, and fusers/ attention.py at 0848e67, glu.py at 19bde6f, qkv.py at 05cce93, rms_norm.py at 005af47):

- `config.json` names `auto_map.AutoModel`, whose class answers `is_backend_compatible()`, that is
  `_supports_attention_backend` (docs "Custom models"; registry `_try_resolve_transformers`).
- The trunk, not the head, is what is customised: the backend builds `AutoModel` alone and has its own head, tied by
  `tie_word_embeddings`, scaled and capped by `logit_scale` and `final_logit_softcapping` (docs; causal.py).
- It is built on the meta device, buffers alone on a real one, and once wholly on meta (base `__init__`,
  `_get_decoder_cls`; utils `init_on_device_without_buffers`): so nothing may depend on a parameter's value, and a
  buffer that is not in the checkpoint must be right from the constructor.
- Keyword arguments go down from the trunk to the attention function, which finds the layer's store of keys and values
  in `attention_instances[module.layer_idx]` and returns (tokens, heads × head_dim) (docs "Writing custom models";
  `vllm_attention_forward`). The function comes from `ALL_ATTENTION_FUNCTIONS` in the attention class's own forward, in
  one call with `scaling=` a number held by `self` (fusers/attention.py).
- The trunk takes one flat row (1, tokens) of many requests, `position_ids`, `use_cache=False`, `return_dict=False`,
  no mask, and returns a tuple whose first entry is the hidden states after the last norm (base `forward`). The row is
  as long as all requests together: memory is measured with `max_num_batched_tokens`, more than a model's positions.
- The config has `num_hidden_layers`, `num_attention_heads`, `num_key_value_heads`, `head_dim`, `hidden_size`,
  `vocab_size`, `max_position_embeddings`, `layer_types` and `sliding_window` (base `create_attention_instances`;
  vllm/transformers_utils/model_arch_config_convertor.py at 00bb6f5). `is_causal = False` on an attention module makes
  the model an encoder (base `_get_attn_cls`).
- `base_model_tp_plan` names every linear layer as colwise or rowwise: one that it leaves out is replicated, which is
  wrong beside a sharded one (base `recursive_replace`; docs). The replacements are no `nn.Linear`; the embedding is
  replaced by `set_input_embeddings`; RMSNorms by name or by what they compute, with `weight` and `variance_epsilon`.
- `base_model_pp_plan` names the trunk's children in order with one `nn.ModuleList`; on other stages they are
  `nn.Identity`s, and the input is `inputs_embeds` (base `pipeline_parallel`).
- For full speed the forwards admit a rewrite: q, k and v, and gate and up, each called once, with one argument, and
  mentioned nowhere else in that forward (fusers `update_forward`).
- The trunk compiles in one graph with the number of tokens dynamic (base `_decorate_for_torch_compile`).

Known limit: a classifier or reward model of ours is served by `TransformersForSequenceClassification`, which reads the
first token (`CLSPool`, transformers/pooling.py at 1c71367); a causal model's score stands at the last.
"""

import inspect
import json

import pytest
import torch
from model_tiny import make_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from vllm_stand_in import Engine, load_classes, parameters_on_meta, registered

from hf_scratch_gpt.model import ScratchGPTConfig, ScratchGPTForMaskedLM

BANDED = {"sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
KINDS = {
    "modern": ("modern", {}),
    "untied": ("modern", {"tie_word_embeddings": False}),
    "without QK-norm": ("modern", {"use_qk_norm": False}),
    "softcap": ("modern", {"final_logit_softcapping": 2.0}),
    "sliding": ("sliding", {}),
    "gpt1": ("gpt1", {}),
    "gpt2": ("gpt2", {}),
    "gpt3": ("gpt2", BANDED),
}
LAYOUTS = {
    "one process": {},
    "fused": {"fused": True},
    "two tensor ranks": {"tensor": 2, "fused": True},
    "two stages": {"pipeline": 2},
    "two by two": {"tensor": 2, "pipeline": 2, "fused": True},
}
PROMPTS = [[*range(3, 20)], [5], [100, 90, 80, 70, 60, 50], [7] * 9]


pytestmark = pytest.mark.usefixtures("module_cache")


def make(kind):
    """A tiny model of one kind; `llama` is transformers' own, the control that the stand-in is right."""
    if kind != "llama":
        name, changes = KINDS[kind]
        return make_model(name, **changes)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, bos_token_id=None, eos_token_id=None)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """For each kind a saved folder, what the model generates for each prompt, and its logits there."""
    told = {}
    for kind in [*KINDS, "llama"]:
        model = make(kind)
        folder = tmp_path_factory.mktemp(kind.replace(" ", "_").replace("-", "_"))
        model.save_pretrained(folder)
        tokens, logits = [], []
        for prompt in PROMPTS:
            ids = torch.tensor([prompt])
            whole = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, do_sample=False)
            tokens.append(whole[0, len(prompt) :].tolist())
            with torch.no_grad():
                logits.append(model(whole[:, :-1]).logits[0])
        told[kind] = folder, tokens, logits
    return told


def serve_and_compare(folder, expected, **layout):
    """Serve all prompts at once from `folder`; the engine, if tokens and logits are those of the model alone."""
    _, tokens, logits = expected
    engine = Engine(folder, **layout)
    served, served_logits = engine.generate(PROMPTS, new_tokens=9)
    for ours, theirs in zip(served_logits, logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert served == tokens
    return engine


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", [*KINDS, "llama"])
def test_requests_served_together_get_what_the_model_gives_each(saved, kind, layout):
    with registered():
        engine = serve_and_compare(saved[kind][0], saved[kind], **LAYOUTS[layout])
    names = {name for name, _ in engine.stages[0][0].model.named_modules()}
    is_fused, is_gated = LAYOUTS[layout].get("fused", False), not kind.startswith("gpt")
    assert ("layers.0.self_attn.qkv_proj" in names) == is_fused
    assert ("layers.0.mlp.gate_up_proj" in names) == (is_fused and is_gated)


def test_every_linear_layer_is_in_the_plan_and_every_plan_names_a_layer(saved):
    for kind in KINDS:
        with registered():
            rank = Engine(saved[kind][0]).stages[0][0]
        assert not any(isinstance(module, nn.Linear) for module in rank.model.modules())
        assert set(rank.styles.values()) == {"colwise", "rowwise"}
        rowwise = {name.rsplit(".", 1)[1] for name, style in rank.styles.items() if style == "rowwise"}
        assert rowwise == {"o_proj", "down_proj"}
        named = {pattern.rsplit(".", 1)[1] for pattern in rank.config.base_model_tp_plan}
        assert {name.rsplit(".", 1)[1] for name in rank.styles} == named - {"q_norm", "k_norm"}


def plant(folder, target, name, old, new):
    """A copy of a saved folder whose own code has one change."""
    target.mkdir()
    for path in folder.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    text = (target / name).read_text()
    assert text.count(old) == 1, f"the planted fault must change one place of {name}"
    (target / name).write_text(text.replace(old, new))
    return target


MODEL, CONFIG = "modeling_scratch_gpt.py", "configuration_scratch_gpt.py"
FAULTS = {
    "keyword arguments that stop at the layers": (
        "modern",
        (MODEL, "**{CACHE_NAME: cache},\n                **kwargs,\n            )\n        hidden_states = self.norm",
         "**{CACHE_NAME: cache},\n            )\n        hidden_states = self.norm"),
        (TypeError, "'NoneType' object is not subscriptable"),
    ),
    "rows no longer than the learned positions": (
        "gpt2",
        (MODEL, "if not is_packed:", "if True:"),
        (ValueError, "128 tokens are more than the 64 learned positions"),
    ),
    "a layer that the plan forgot": (
        "gpt2", (CONFIG, '"layers.*.mlp.down_proj": "rowwise",', ""), (KeyError, "replicate"),
    ),
    "a wrong style": (
        "modern",
        (CONFIG, '"layers.*.self_attn.o_proj": "rowwise"', '"layers.*.self_attn.o_proj": "colwise"'),
        (RuntimeError, "shapes cannot be multiplied"),
    ),
    "a model that does not support the backend": (
        "modern",
        (MODEL, "_supports_attention_backend = True", "_supports_attention_backend = False"),
        (AssertionError, "is_backend_compatible"),
    ),
    "a stage list without the norm": (
        "modern",
        (CONFIG, '"norm": (["hidden_states"], ["hidden_states"]),', ""),
        (AssertionError, "Tensor-likes are not close"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_stand_in_finds_a_model_that_breaks_the_contract(saved, tmp_path, fault):
    kind, change, (error, message) = FAULTS[fault]
    folder = plant(saved[kind][0], tmp_path / f"fault_{list(FAULTS).index(fault)}", *change)
    with registered(), pytest.raises(error, match=message):
        serve_and_compare(folder, saved[kind], tensor=2, pipeline=2)


def test_the_saved_folder_names_the_trunk_and_the_sizes(saved):
    for kind in KINDS:
        config = json.loads((saved[kind][0] / "config.json").read_text())
        assert config["auto_map"]["AutoModel"] == "modeling_scratch_gpt.ScratchGPTModel"
        assert next(iter(config["auto_map"])) == "AutoConfig"  # vLLM loads it before the model's class
        names = "num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_size vocab_size layer_types"
        assert all(config[name] for name in names.split()), "written out, so that nobody has to derive them"


def test_the_attention_class_calls_one_interface_with_a_plain_scale(saved):
    config, make_trunk = load_classes(saved["modern"][0])
    attention = make_trunk(config).layers[0].self_attn
    source = inspect.getsource(type(attention).forward)
    assert source.count("ALL_ATTENTION_FUNCTIONS.get_interface(") == source.count("attention_interface(") == 1
    assert "scaling=self.scaling" in source
    assert isinstance(attention.scaling, float)
    assert attention.layer_idx == 0


@pytest.mark.parametrize("kind", KINDS)
def test_any_keyword_reaches_the_attention_of_every_layer(saved, kind):
    seen = []

    def record(module, query, key, value, attention_mask, scaling=None, **kwargs):
        seen.append((module.layer_idx, kwargs["a_keyword_of_a_server"], attention_mask))
        return query.transpose(1, 2).flatten(2)[0], None

    config, make_trunk = load_classes(saved[kind][0])
    with registered(record), torch.no_grad():
        config._attn_implementation = "vllm"
        positions = torch.tensor([[0, 1, 2, 0, 1]])
        outputs = make_trunk(config).eval()(
            positions + 3, position_ids=positions, use_cache=False, return_dict=False, a_keyword_of_a_server="passed"
        )
    assert seen == [(layer, "passed", None) for layer in range(config.num_hidden_layers)]
    assert isinstance(outputs, tuple)
    assert outputs[0].shape == (1, 5, config.hidden_size)


@pytest.mark.parametrize("kind", ["modern", "gpt2"])
def test_the_meta_device_keeps_buffers_right(saved, kind):
    config, make_trunk = load_classes(saved[kind][0])
    with torch.device("meta"):
        assert all(parameter.is_meta for parameter in make_trunk(config).parameters())
    with parameters_on_meta():
        trunk = make_trunk(config, dtype=torch.bfloat16)
    assert all(parameter.is_meta for parameter in trunk.parameters())
    buffers, expected = dict(trunk.named_buffers()), dict(make(kind).model.named_buffers())
    assert buffers.keys() == expected.keys()
    for name, buffer in buffers.items():
        assert buffer.dtype == torch.float32
        assert torch.equal(buffer, expected[name])


def test_only_the_masked_model_is_an_encoder(tmp_path):
    model = make_model("modern")
    assert all(module.is_causal for module in model.modules() if hasattr(module, "layer_idx"))
    ScratchGPTForMaskedLM(ScratchGPTConfig(**model.config.to_dict())).save_pretrained(tmp_path / "masked")
    config, make_trunk = load_classes(tmp_path / "masked")
    assert not any(module.is_causal for module in make_trunk(config).modules() if hasattr(module, "layer_idx"))


@pytest.mark.parametrize("kind", ["modern", "gpt3"])
def test_the_trunk_compiles_once_for_any_number_of_tokens(saved, kind):
    """One graph without a break, for rows shorter and longer than the model's positions."""

    def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        output = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return output.transpose(1, 2).flatten(2)[0], None

    config, make_trunk = load_classes(saved[kind][0])
    with registered(attend), torch.no_grad():
        config._attn_implementation = "vllm"
        trunk = make_trunk(config).eval()
        compiled = torch.compile(trunk, fullgraph=True, backend="eager")
        for tokens in (100, 7, 65):
            positions = torch.arange(tokens)[None] % 50
            torch._dynamo.mark_dynamic(positions, 1)
            ids = positions + 3
            torch._dynamo.mark_dynamic(ids, 1)
            inputs = {"position_ids": positions, "use_cache": False, "return_dict": False}
            with torch._dynamo.config.patch(error_on_recompile=tokens != 100):
                output = compiled(ids, **inputs)[0]
            torch.testing.assert_close(output, trunk(ids, **inputs)[0])
