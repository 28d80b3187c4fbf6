"""All ways to generate agree: caches, batching, drafts and continuous batching, on every kind of model."""

import pytest
import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, QuantizedCache

from hf_scratch_gpt.model.cache_name import CACHE_NAME

NEW = 8
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}


def random_ids(batch: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 128, (batch, length), generator=torch.Generator().manual_seed(seed))


def continued(model, input_ids: torch.Tensor, steps: int = NEW) -> torch.Tensor:
    """Greedy decoding written out: a whole pass for each new token, no cache, no `generate`."""
    with torch.no_grad():
        for _ in range(steps):
            best = model(input_ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, best], dim=1)
    return input_ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_greedy_search_is_the_argmax_of_whole_passes_with_every_cache(model, cache):
    prompt = random_ids(2, 6)
    assert torch.equal(model.generate(prompt, cache_implementation=cache, **GREEDY), continued(model, prompt))


def test_quantised_cache_decodes_what_an_exact_cache_nearly_does(model_factory):
    """The fp8 backend needs no library; 8 bits of each key and value leave the logits close."""
    model = model_factory()
    prompt = random_ids(2, 6)
    settings = {"return_dict_in_generate": True, "output_logits": True, "cache_implementation": "quantized"}
    output = model.generate(prompt, cache_config={"backend": "fp8"}, **settings, **GREEDY)
    assert isinstance(output[CACHE_NAME], QuantizedCache)
    with torch.no_grad():
        exact = model(output.sequences[:, :-1]).logits[:, 5:]
    error = (torch.stack(output.logits, dim=1) - exact).abs().max()
    assert 0 < error < 0.1 * exact.std()


def test_sampling_follows_the_seed_and_its_filters(model):
    prompt = random_ids(1, 6).expand(64, -1)
    settings = {"max_new_tokens": 1, "do_sample": True, "pad_token_id": 0}
    torch.manual_seed(0)
    first = model.generate(prompt, **settings)
    torch.manual_seed(0)
    assert torch.equal(model.generate(prompt, **settings), first)
    assert len(first[:, -1].unique()) > 10
    with torch.no_grad():
        best_three = model(prompt[:1]).logits[0, -1].topk(3).indices
    few = model.generate(prompt, top_k=3, **settings)[:, -1].unique()
    assert set(few.tolist()) <= set(best_three.tolist())
    assert len(few) > 1


def test_beam_search_finds_the_best_of_all_continuations(model):
    """With as many beams as there are tokens, two steps of beam search are an exhaustive search."""
    prompt = random_ids(1, 5)
    settings = {"max_new_tokens": 2, "num_beams": 128, "do_sample": False, "pad_token_id": 0, "length_penalty": 0.0}
    found = model.generate(prompt, **settings)[0, 5:]
    with torch.no_grad():
        first = model(prompt).logits[0, -1].log_softmax(-1)
        pairs = torch.cat([prompt.expand(128, -1), torch.arange(128)[:, None]], dim=1)
        second = model(pairs).logits[:, -1].log_softmax(-1)
    best = (first[:, None] + second).flatten().argmax().item()
    assert found.tolist() == [best // 128, best % 128]


@pytest.mark.parametrize("settings", [{"prompt_lookup_num_tokens": 3}, {"assistant_early_exit": 1}, {}])
def test_assisted_decoding_gives_what_the_model_alone_gives(model_factory, model, settings):
    """By another model's drafts, by n-grams of the prompt, and by the model's own first layer."""
    prompt = random_ids(1, 4).repeat(1, 3)
    if not settings:
        settings = {"assistant_model": model_factory(seed=1, num_hidden_layers=1)}
    assert torch.equal(model.generate(prompt, **settings, **GREEDY), continued(model, prompt))


def test_a_batch_padded_on_the_left_gives_what_each_row_gives_alone(model):
    rows = [random_ids(1, length, seed=length) for length in (3, 9, 6)]
    batch = torch.cat([torch.cat([torch.zeros(1, 9 - row.shape[1], dtype=torch.long), row], dim=1) for row in rows])
    mask = torch.tensor([[0] * (9 - row.shape[1]) + [1] * row.shape[1] for row in rows])
    for cache in ("dynamic", "static"):
        together = model.generate(batch, attention_mask=mask, cache_implementation=cache, **GREEDY)[:, 9:]
        for index, row in enumerate(rows):
            assert torch.equal(together[index], continued(model, row)[0, row.shape[1] :]), (cache, index)


def test_generation_from_embeddings_is_generation_from_their_tokens(model):
    prompt = random_ids(2, 6)
    embeddings = model.get_input_embeddings()(prompt)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **GREEDY), continued(model, prompt)[:, 6:])


@pytest.mark.parametrize("kind", ["modern", "gpt2"])
def test_continuous_batching_gives_what_each_prompt_gives_alone(model_factory, kind):
    """Prompts of different lengths share one paged cache and one packed pass, longer than the 64 positions."""
    model = model_factory(kind)
    prompts = [random_ids(1, length, seed=length)[0].tolist() for length in (3, 51, 27)]
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0)
    small = ContinuousBatchingConfig(page_size=8, num_blocks=32, max_batch_tokens=96)
    outputs = model.generate_batch(prompts, generation_config=config, continuous_batching_config=small)
    for prompt, output in zip(prompts, outputs.values(), strict=True):
        assert output.prompt_ids == prompt
        assert output.generated_tokens == continued(model, torch.tensor([prompt]))[0, len(prompt) :].tolist()
