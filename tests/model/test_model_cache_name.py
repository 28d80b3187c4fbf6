"""The cache under both of its names: transformers 5.23's `past_key_values` and 5.24's `cache`."""

import pytest
import torch
from model_tiny import make_model
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from hf_scratch_gpt.model import (
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
)
from hf_scratch_gpt.model.cache_name import CACHE_NAME, NEW_NAME, OLD_NAME, cache_argument, cache_of

HEADS = [
    ScratchGPTModel,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
]
IDS = torch.randint(1, 128, (2, 12), generator=torch.Generator().manual_seed(0))
LAST = torch.tensor([[0] * 11 + [1]] * 2)


def make_head(head_class):
    torch.manual_seed(0)
    return head_class(make_model("modern", pad_token_id=0).config).eval()


@pytest.mark.parametrize("head_class", HEADS)
def test_both_names_give_the_outputs_of_one_pass_on_the_trunk_and_every_head(head_class):
    model, found = make_head(head_class), {}
    with torch.no_grad():
        for name in (OLD_NAME, NEW_NAME):
            past = DynamicCache(config=model.config)
            model(IDS[:, :7], **{name: past})
            output = model(IDS[:, 7:], **{name: past})
            assert past.get_seq_length() == 12
            if head_class is not ScratchGPTForTokenClassification:  # whose output has no field for it
                assert output[CACHE_NAME] is past
            found[name] = output[0]
        whole, blind = model(IDS)[0], model(IDS[:, 7:])[0]
    assert torch.equal(found[OLD_NAME], found[NEW_NAME])
    if head_class is not ScratchGPTForSequenceClassification:  # which has one row of scores, the last token's
        whole = whole[:, 7:]
    torch.testing.assert_close(found[NEW_NAME], whole, atol=1e-5, rtol=1e-5)
    assert (blind - whole).abs().max() > 1e-3, "the test would not notice a cache that is ignored"


@pytest.mark.parametrize("head_class", HEADS)
@pytest.mark.parametrize("name", ["past_key_value", "layer_past", "cache_params"])
def test_a_cache_under_a_third_name_is_an_error_and_never_ignored(head_class, name):
    with pytest.raises(ValueError, match=f"`{name}` is a key-value cache, expected as `{CACHE_NAME}`"):
        make_head(head_class)(IDS, **{name: DynamicCache()})


@pytest.mark.parametrize("head_class", HEADS[:2])
def test_a_cache_under_both_names_is_an_error(head_class):
    with pytest.raises(ValueError, match=f"two names of one argument, and both were given; give `{CACHE_NAME}` alone"):
        make_head(head_class)(IDS, cache=DynamicCache(), past_key_values=DynamicCache())


def test_generate_reads_one_token_a_step_through_the_cache_and_writes_what_it_writes_without(model):
    lengths = []
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    written = {}
    for use_cache in (True, False):
        lengths.append([])

        def hear(_module, _arguments, inputs):
            lengths[-1].append(inputs["input_ids"].shape[1])

        hook = model.model.register_forward_pre_hook(hear, with_kwargs=True)
        written[use_cache] = model.generate(IDS, use_cache=use_cache, **settings)
        hook.remove()
    assert lengths == [[12, *[1] * 7], [*range(12, 20)]]
    assert torch.equal(written[True], written[False])
    assert len(written[True][:, 12:].unique()) > 1


def test_one_compiled_graph_takes_both_names_and_returns_the_cache(model_factory):
    model = model_factory(num_hidden_layers=1, layer_types=None)
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for name in (OLD_NAME, NEW_NAME):
            past = model(IDS[:, :7], use_cache=True)[CACHE_NAME]
            output = compiled(IDS[:, 7:], use_cache=True, **{name: past})
            torch.testing.assert_close(output.logits, model(IDS).logits[:, 7:], atol=1e-5, rtol=1e-5)
            assert cache_of(output).get_seq_length() == 12


@pytest.mark.parametrize("name", [OLD_NAME, NEW_NAME])
def test_a_model_that_knows_one_name_alone_is_given_that(name):
    class Model(nn.Module):
        if name == OLD_NAME:

            def forward(self, input_ids=None, past_key_values=None, **kwargs):
                """As remote code does that was written for 5.23."""
        else:

            def forward(self, input_ids=None, cache=None, **kwargs):
                """As remote code does that was written for 5.24."""

    assert cache_argument(Model()) == name


def test_the_argument_is_found_in_any_model_inside_an_adapter_and_under_a_hook(model_factory):
    from peft import LoraConfig, get_peft_model

    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4)).eval()
    ours = model_factory()
    adapted = get_peft_model(model_factory(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    hooked, plain = model_factory(), ours.forward
    hooked.forward = lambda *arguments, **inputs: plain(*arguments, **inputs)
    for model in (llama, ours, adapted.eval(), hooked):
        assert cache_argument(model) == CACHE_NAME
        with torch.no_grad():
            past = cache_of(model(input_ids=IDS[:, :7], use_cache=True))
            after = model(input_ids=IDS[:, 7:], use_cache=True, **{cache_argument(model): past}).logits
            torch.testing.assert_close(after, model(input_ids=IDS).logits[:, 7:], atol=1e-5, rtol=1e-5)


def test_a_model_without_a_cache_is_refused_by_name(model_factory):
    with pytest.raises(ValueError, match=f"Linear.forward names no `{CACHE_NAME}`"):
        cache_argument(nn.Linear(1, 1))
    with pytest.raises(ValueError, match=f"returned no `{CACHE_NAME}`"):
        cache_of(model_factory()(IDS, use_cache=False))


def test_no_warning_is_printed_on_the_way(model_factory, recwarn, caplog, monkeypatch):
    """5.24 warns of its old name wherever that is still used; `generate` and training must use the new one."""
    from transformers.utils import logging

    monkeypatch.setattr(logging.get_logger("transformers"), "propagate", True)
    model = model_factory()
    model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0)
    model.train().gradient_checkpointing_enable()
    model(IDS, labels=IDS, use_cache=False).loss.backward()
    told = [str(warning.message) for warning in recwarn] + [record.getMessage() for record in caplog.records]
    assert not [message for message in told if OLD_NAME in message], told
