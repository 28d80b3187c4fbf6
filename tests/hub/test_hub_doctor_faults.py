"""Each fault that is planted in a model's code, tokenizer or settings fails its own checks and no others."""

import pytest
import template_faults
from doctor_tiny import make_tokenizer, names, outcomes_of, shrunk, write, write_with_code
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from hf_scratch_gpt.hub.doctor import checks_chat
from hf_scratch_gpt.hub.doctor.main import CHECKS

ROTATION = "self.rotary_emb(hidden_states, position_ids)"
LOSS = "self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)"
TRUNK_CALL = "        outputs: BaseModelOutputWithPast = self.model("
MASKS = "        masks = self._attention_masks("

# What is wrong, where the code is changed and to what, the checks that must fail, and fields of the config.
CODE_FAULTS = {
    "position ids ignored": (
        {ROTATION: "self.rotary_emb(hidden_states, self._position_ids(inputs_embeds, None, cache))"},
        {"position-ids"},
    ),
    "past_seen_tokens ignored": (
        {"start = cache.get_seq_length() if cache is not None else 0": "start = 0"},
        {"cache-steps", "cache-chunks"},
    ),
    "second chunk blind to the first": (
        {
            MASKS: "        if inputs_embeds.shape[1] > 1 and cache is not None:\n"
            "            cache = DynamicCache(config=self.config)\n" + MASKS
        },
        {"cache-chunks"},
    ),
    "cache that is given under either name and not heard": (
        {"cache = given_cache(cache, past_key_values, kwargs)": "cache = None"},
        {"cache-steps", "cache-chunks", "generate-greedy"},
    ),
    "kwargs dropped before the layers": (
        {
            "**{CACHE_NAME: cache},\n                **kwargs,\n            )\n        hidden_states = self.norm": (
                "**{CACHE_NAME: cache},\n            )\n        hidden_states = self.norm"
            )
        },
        {"attention-kwargs"},
    ),
    "untied head": (
        {
            '    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}\n': "",
            '"tie_word_embeddings": false': '"tie_word_embeddings": true',
        },
        {"tied-weights"},
        {"tie_word_embeddings": False},
    ),
    "scaled residual init skipped, as it is for modules without parameters of their own": (
        {
            'if getattr(module, "is_residual_projection", False) and': "if isinstance(module, ScratchGPTMLP) and",
            "init.normal_(module.weight, mean=0.0, std=std)": "init.normal_(module.down_proj.weight, std=std)",
        },
        {"residual-init"},
    ),
    "packed documents leaking": (
        {
            MASKS: "        if attention_mask is None:\n"
            "            past = cache.get_seq_length() if cache is not None else 0\n"
            "            shape = (inputs_embeds.shape[0], past + inputs_embeds.shape[1])\n"
            "            attention_mask = torch.ones(shape, dtype=torch.long)\n" + MASKS
        },
        {"packed-documents"},
    ),
    "padding attended to": (
        {
            "                attention_mask=attention_mask,\n                position_ids=position_ids,\n"
            "                **{CACHE_NAME: cache},\n            )\n            for": (
                "                attention_mask=None,\n                position_ids=None,\n"
                "                **{CACHE_NAME: cache},\n            )\n            for"
            )
        },
        {"left-padding", "packed-documents"},
    ),
    "logits_to_keep ignored": (
        {"slice_logits_to_keep(outputs.last_hidden_state, logits_to_keep)": "outputs.last_hidden_state"},
        {"logits-to-keep"},
    ),
    "softcap under a name that TRL does not read": (
        {"final_logit_softcapping": "soft_cap"},
        {"trl-fused-head"},
        {"final_logit_softcapping": 0.5},
    ),
    "final norm in the head": (
        {
            "        hidden_states = self.norm(hidden_states)\n": "",
            "self.lm_head(slice_logits": "self.lm_head(self.model.norm(slice_logits",
            "_to_keep(outputs.last_hidden_state, logits_to_keep))": (
                "_to_keep(outputs.last_hidden_state, logits_to_keep)))"
            ),
        },
        {"trl-fused-head"},
    ),
    "loss not divided by num_items_in_batch": (
        {
            LOSS: "self.loss_function(logits, labels, self.config.vocab_size, "
            "kwargs.get('num_items_in_batch') and torch.tensor(1))"
        },
        {"loss-accumulation"},
    ),
    "num_items_in_batch unheard": (
        {LOSS: "self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size)"},
        {"loss-accumulation"},
    ),
    "loss without the shift": (
        {LOSS: "self.loss_function(logits, labels, self.config.vocab_size, shift_labels=labels, **kwargs)"},
        {"loss", "loss-accumulation"},
    ),
    "eager attention unscaled": (
        {"torch.matmul(query, key.transpose(2, 3)) * scaling": "torch.matmul(query, key.transpose(2, 3))"},
        {"eager-sdpa"},
    ),
    "flex attention scaled twice": (
        {
            "            scaling=self.scaling,\n": "            scaling=self.scaling\n"
            "            * (self.scaling if self.config._attn_implementation == 'flex_attention' else 1),\n"
        },
        {"flex-attention"},
    ),
    "noise in eval()": (
        {
            "        hidden_states = self.norm(hidden_states)\n": "        hidden_states = self.norm(hidden_states)\n"
            "        hidden_states = hidden_states + 3e-5 * torch.randn_like(hidden_states)\n"
        },
        {"eval-deterministic"},
    ),
    "attention lost on the way to the residual": (
        {"return self.o_proj(attn_output), attn_weights": "return 0 * self.o_proj(attn_output), attn_weights"},
        {"looks-back", "position-ids"},
    ),
    "checkpointing that checkpoints nothing": (
        {
            "class ScratchGPTDecoderLayer(GradientCheckpointingLayer)": "class ScratchGPTDecoderLayer(nn.Module)",
        },
        {"gradient-checkpointing"},
    ),
    "vocabulary size remembered from the beginning": (
        {
            "logits = self.lm_head(": "logits = nn.Linear.forward(self.lm_head, ",
            "logits_to_keep))\n        # CODEPATH": (
                "logits_to_keep))[..., : self.__dict__['vocab_size_']]\n        # CODEPATH"
            ),
            "        self.vocab_size = config.vocab_size\n": "        self.vocab_size_ = config.vocab_size\n",
        },
        {"resize-embeddings"},
    ),
    "fp32 forced before the head": (
        {
            "slice_logits_to_keep(outputs.last_hidden_state, ": (
                "slice_logits_to_keep(outputs.last_hidden_state.float(), "
            )
        },
        {"bf16"},
    ),
    "generation that takes the least likely token": (
        {
            "class ScratchGPTForCausalLM(ScratchGPTPreTrainedModel, GenerationMixin):\n": (
                "class ScratchGPTForCausalLM(ScratchGPTPreTrainedModel, GenerationMixin):\n"
                "    def _get_logits_processor(self, *args, **kwargs):\n"
                "        return [lambda input_ids, scores: -scores]\n"
            )
        },
        {"generate-greedy", "generate-end-token"},
    ),
}


@pytest.mark.parametrize("fault", CODE_FAULTS)
def test_a_fault_in_the_code_fails_its_own_checks(fault, tmp_path):
    changes, expected, *overrides = CODE_FAULTS[fault]
    folder = write_with_code(tmp_path / "model", changes, **(overrides[0] if overrides else {}))
    outcomes = outcomes_of(folder, trust_remote_code=True)
    assert names(outcomes, "fail") == expected, [outcomes[name] for name in names(outcomes, "fail")]
    assert all(outcomes[name].remedy for name in expected)


def test_unchanged_code_passes_as_custom_code(tmp_path):
    outcomes = outcomes_of(write_with_code(tmp_path / "model", {}, make_tokenizer()), trust_remote_code=True)
    assert names(outcomes, "fail") == set()


def test_rope_buffers_lost_on_reload_are_seen_in_a_fresh_process(tmp_path):
    """The base `_init_weights` rebuilds these buffers by the class's name."""
    folder = write_with_code(tmp_path / "model", {"ScratchGPTRotaryEmbedding": "ScratchGPTRotation"})
    outcomes = outcomes_of(folder, trust_remote_code=True, fresh_process=True)
    assert names(outcomes, "fail") == {"round-trip"}
    assert "model.rotary_emb.inv_freq" in outcomes["round-trip"].measured


def _pad_is_end_everywhere(model, tokenizer):
    tokenizer.pad_token = tokenizer.eos_token
    model.generation_config.pad_token_id = tokenizer.eos_token_id


def _space_in_front(model, tokenizer):
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=True)


def _too_many_tokens(model, tokenizer):
    tokenizer.add_tokens(["<new>"])


def _length_beyond_the_context(model, tokenizer):
    model.generation_config.max_length = 65


def _another_end(model, tokenizer):
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")


OTHER_FAULTS = {
    _pad_is_end_everywhere: {"special-tokens", "generation-config"},
    _space_in_front: {"tokenizer-round-trip"},
    _too_many_tokens: {"token-ids"},
    _length_beyond_the_context: {"generation-config"},
    _another_end: {"generation-config", "chat-end-token"},
}
# Those of the template that the doctor of models looks for too, one for each check.
TEMPLATE_FAULTS = {
    check: plant for plant, check in template_faults.FAULTS.items() if check in {check.name for check in CHECKS}
}


@pytest.mark.parametrize("plant", OTHER_FAULTS, ids=lambda plant: plant.__name__.strip("_"))
def test_a_fault_in_tokenizer_or_settings_fails_its_own_checks(plant, tmp_path):
    model, tokenizer = shrunk("modern-5m"), make_tokenizer()
    plant(model, tokenizer)
    outcomes = outcomes_of(write(model, tmp_path, tokenizer))
    assert names(outcomes, "fail") == OTHER_FAULTS[plant], [outcomes[name] for name in names(outcomes, "fail")]


@pytest.mark.parametrize("check", TEMPLATE_FAULTS)
def test_a_fault_in_the_chat_template_fails_its_own_check(check, tmp_path):
    model, tokenizer = shrunk("modern-5m"), make_tokenizer()
    TEMPLATE_FAULTS[check](tokenizer)
    outcomes = outcomes_of(write(model, tmp_path, tokenizer))
    assert names(outcomes, "fail") == {check}, [outcomes[name] for name in names(outcomes, "fail")]


def test_an_encoder_that_trusts_the_user_is_seen(monkeypatch, tmp_path):
    def encode_rendered_text(tokenizer, messages, **settings):
        encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, **settings)
        return {"input_ids": encoded["input_ids"], "assistant_masks": encoded["assistant_masks"]}

    monkeypatch.setattr(checks_chat, "encode_conversation", encode_rendered_text)
    outcomes = outcomes_of(write(shrunk("modern-5m"), tmp_path, make_tokenizer()))
    assert names(outcomes, "fail") == {"chat-control-tokens"}


def test_a_damaged_tokenizer_is_one_failure_and_skips_what_needs_it(tmp_path):
    write(shrunk("modern-5m"), tmp_path, make_tokenizer())
    (tmp_path / "tokenizer.json").write_text("{", encoding="utf-8")
    outcomes = outcomes_of(tmp_path)
    assert names(outcomes, "fail") == {"tokenizer-loads"}
    assert outcomes["special-tokens"].status == "skip"


def test_every_check_has_a_fault_that_it_finds():
    elsewhere = {"round-trip", "chat-control-tokens", "tokenizer-loads", "checkpoint-complete"}  # tests of their own
    planted = set().union(
        elsewhere, *(fault[1] for fault in CODE_FAULTS.values()), *OTHER_FAULTS.values(), TEMPLATE_FAULTS
    )
    assert planted == {check.name for check in CHECKS}


def test_a_weight_missing_from_the_checkpoint_is_told_by_name(tmp_path):
    write(shrunk("modern-5m"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    outcomes = outcomes_of(tmp_path)
    assert names(outcomes, "fail") == {"checkpoint-complete"}
    assert "model.layers.1.mlp.up_proj.weight" in outcomes["checkpoint-complete"].measured
