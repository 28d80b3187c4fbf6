"""Whatever shapes the sampling distribution shapes every log-probability: the first ratio stays 1."""

import pytest
import torch
from ppo_tiny import END, VOCABULARY, make_gpt2, make_llama, make_trainer
from torch.testing import assert_close
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from hf_scratch_gpt.alignment.ppo.sampling import SamplingRule, first_places, pack_bits, unpack_bits

NOTHING = torch.tensor([], dtype=torch.long)
RULES = {
    "top_k": {"top_k": 5},
    "top_p": {"top_p": 0.7, "temperature": 0.8},
    "min_p": {"min_p": 0.3},
    "repetition": {"repetition_penalty": 1.7},
    "all": {"top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.3, "temperature": 0.7},
    "end": {"min_new_tokens": 4},
}


def first_batch(trainer):
    trainer.create_optimizer_and_scheduler(8)
    return trainer._prepare_inputs({"micro_step": torch.tensor([0])})


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make_model", [make_llama, make_gpt2], ids=["llama", "gpt2"])
def test_first_ratio_is_exactly_one_and_first_kl_zero_under_every_sampling_setting(tmp_path, rule, make_model):
    model = make_model()
    # Peaked, so that much is cut off; but GPT-2's head is its embedding, which then says each token again.
    model.get_output_embeddings().weight.data.mul_(10 if make_model is make_llama else 3)
    trainer = make_trainer(tmp_path, model, max_new_tokens=8, critic="shared", **RULES[rule])
    inputs = first_batch(trainer)
    trainer.compute_loss(trainer.model, inputs)
    sums, tokens = trainer.records._pending[-1]
    assert float(sums["ratio"]) == float(tokens)
    assert trainer.records.rollouts[0]["kl"] == 0.0
    assert trainer.records.rollouts[0]["kl_k3"] == 0.0
    assert torch.isfinite(trainer.rollout.log_probs).all()
    # One minibatch later the ratio has moved: it is not one by being cut off from the weights.
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    trainer.optimizer.step()
    trainer.compute_loss(trainer.model, inputs)
    assert float(trainer.records._pending[-1][0]["ratio"]) != float(tokens)


@pytest.mark.parametrize("rule", [name for name in RULES if name != "end"])
def test_log_probabilities_are_those_of_transformers_own_processors(tmp_path, rule):
    """Each token's log-probability, and that of all others 0, by `generate`'s processors on each prefix alone."""
    options = {"temperature": 1.0, **RULES[rule]}
    model = make_llama()
    model.lm_head.weight.data.mul_(10)
    trainer = make_trainer(tmp_path, model, max_new_tokens=8, **options)
    first_batch(trainer)
    model.eval()
    rollout = trainer.rollout
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    never = [number for number in range(64) if number != END and not 3 <= number < len(VOCABULARY)]
    processors.append(lambda ids, scores: scores.index_fill(-1, torch.tensor(never), -torch.inf))
    processors.append(TemperatureLogitsWarper(options["temperature"]))
    if "top_k" in options:
        processors.append(TopKLogitsWarper(options["top_k"]))
    if "top_p" in options:
        processors.append(TopPLogitsWarper(options["top_p"]))
    if "min_p" in options:
        processors.append(MinPLogitsWarper(options["min_p"]))
    for row in range(6):
        prompt = rollout.prompt_ids[row][rollout.prompt_mask[row].bool()]
        response = rollout.response_ids[row][rollout.mask[row].bool()]
        for place, token in enumerate(response.tolist()):
            ids = torch.cat([prompt, response[:place]]).unsqueeze(0)
            with torch.no_grad():
                log_probs = processors(ids, model(ids).logits[:, -1]).log_softmax(-1)
            assert_close(rollout.log_probs[row, place], log_probs[0, token], atol=1e-4, rtol=1e-4)


def test_only_kept_tokens_are_sampled_and_no_end_comes_too_early(tmp_path):
    trainer = make_trainer(tmp_path, max_new_tokens=8, top_k=3, min_new_tokens=5)
    first_batch(trainer)
    rollout = trainer.rollout
    kept = unpack_bits(rollout.kept, 64)
    chosen = kept.gather(-1, rollout.response_ids.unsqueeze(-1)).squeeze(-1)
    assert chosen[rollout.mask.bool()].all()
    assert (kept.sum(-1)[rollout.mask.bool()] == 3).all()
    lengths = rollout.mask.sum(-1)
    assert lengths.min() >= 6
    assert not (rollout.response_ids[:, :5] == END).any()


def test_bits_and_first_places_against_the_plain_way():
    mask = torch.rand(3, 5, 21, generator=torch.Generator().manual_seed(0)) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), 21), mask)
    prompts, prompt_mask = torch.tensor([[0, 4, 7], [5, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    responses = torch.tensor([[9, 4, 9, 0], [6, 8, 8, 1]])
    table = first_places(prompts, prompt_mask, responses, 10)
    rule = SamplingRule(NOTHING, NOTHING, 0, 4, repetition_penalty=2.0)
    logits = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(1))
    shaped = rule.shape(logits, torch.arange(4), table, None)
    for row in range(2):
        for place in range(4):
            real = prompts[row][prompt_mask[row].bool()]
            ids = torch.cat([real, responses[row, :place]]).unsqueeze(0)
            expected = RepetitionPenaltyLogitsProcessor(2.0)(ids, logits[row : row + 1, place])
            assert_close(shaped[row, place], expected[0])


def test_what_sampling_kept_survives_a_checkpoint(tmp_path):
    options = {"top_p": 0.6, "save_strategy": "steps", "save_steps": 3, "max_steps": 8, "max_new_tokens": 8}
    whole = make_trainer(tmp_path, **options)
    whole.train()
    resumed = make_trainer(tmp_path, **{**options, "save_strategy": "no"})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for name, value in whole.model.named_parameters():
        assert torch.equal(value, dict(resumed.model.named_parameters())[name]), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_p": 0.0}, r"'top_p' is 0\.0, expected more than 0 and at most 1"),
        ({"top_k": -1}, "'top_k' is -1, expected 0 or more"),
        ({"min_p": 1.5}, r"'min_p' is 1\.5, expected 0 to 1"),
        ({"repetition_penalty": 0.0}, r"'repetition_penalty' is 0\.0, expected more than 0"),
        ({"min_new_tokens": 6}, r"'min_new_tokens' is 6, expected less than 'max_new_tokens' \(6\)"),
    ],
)
def test_settings_out_of_range_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **options)
