"""The mathematics of PPO against numbers computed by hand."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor
from torch.testing import assert_close

from hf_scratch_gpt.alignment.ppo import losses
from hf_scratch_gpt.alignment.ppo.episodes import finish_scores


def test_advantages_of_two_padded_episodes_equal_hand_computed_ones():
    rewards = tensor([[1.0, 0.0, 2.0], [0.5, 3.0, 9.0]])
    values = tensor([[0.5, 1.0, 1.5], [1.0, 2.0, 7.0]])
    mask = tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
    advantages, returns = losses.generalised_advantages(rewards, values, mask, gamma=0.9, lam=0.5)
    # Episode 1: deltas 2-1.5=0.5, 0+0.9*1.5-1=0.35, 1+0.9*1-0.5=1.4; gamma*lam = 0.45.
    # Episode 2 ends at its second token: deltas 3-2=1, 0.5+0.9*2-1=1.3; what stands in the padding counts for nothing.
    expected = tensor([[1.4 + 0.45 * 0.575, 0.35 + 0.45 * 0.5, 0.5], [1.3 + 0.45 * 1.0, 1.0, 0.0]])
    assert_close(advantages, expected)
    assert_close(returns, expected + values * mask)


def test_with_lambda_one_returns_are_discounted_sums_of_rewards():
    rewards, values = torch.randn(3, 5), torch.randn(3, 5)
    _, returns = losses.generalised_advantages(rewards, values, torch.ones(3, 5), gamma=1.0, lam=1.0)
    assert_close(returns, rewards.flip(-1).cumsum(-1).flip(-1))


def test_whitening_ignores_padding_and_matches_hand_computed_numbers():
    whitened = losses.masked_whiten(tensor([[1.0, 3.0, 100.0]]), tensor([[1.0, 1.0, 0.0]]))
    assert_close(whitened, tensor([[-1.0, 1.0, 0.0]]))
    scaled = losses.masked_whiten(tensor([[1.0, 3.0, 100.0]]), tensor([[1.0, 1.0, 0.0]]), shift_mean=False)
    assert_close(scaled, tensor([[1.0, 3.0, 0.0]]))  # the mean 2 is kept, and the deviation was 1 already


def test_whitening_is_global_when_sums_are_reduced_over_processes():
    values, mask = torch.randn(4, 6), (torch.rand(4, 6) < 0.7).float()
    whole = losses.masked_whiten(values, mask)
    # Two processes: run once to learn what each adds to every sum, as an all-reduce would.
    halves = [(values[:2], mask[:2]), (values[2:], mask[2:])]
    mean = (values * mask).sum() / mask.sum()
    sums = iter([mask.sum(), (values * mask).sum(), ((values - mean) ** 2 * mask).sum()])
    first = losses.masked_whiten(*halves[0], reduce=lambda total: next(sums))
    assert_close(first, whole[:2])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 50), min_size=2, max_size=20).filter(lambda values: max(values) - min(values) > 1e-2))
def test_whitened_values_have_mean_zero_and_deviation_one(values):
    whitened = losses.masked_whiten(tensor(values, dtype=torch.double), torch.ones(len(values)))
    assert whitened.mean().abs() < 1e-6
    assert abs(whitened.std(unbiased=False) - 1) < 1e-2


def test_policy_loss_clips_only_where_the_clip_is_the_worse_bound():
    ratios = tensor([1.5, 1.5, 0.5, 0.5])
    advantages = tensor([1.0, -1.0, 1.0, -1.0])
    loss, ratio, clipped = losses.policy_losses(ratios.log(), torch.zeros(4), advantages, cliprange=0.2)
    assert_close(ratio, ratios)
    assert_close(loss, tensor([-1.2, 1.5, -0.5, 0.8]))
    assert clipped.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_value_loss_takes_the_larger_of_plain_and_clipped_error():
    loss, clipped = losses.value_losses(tensor([1.0, 0.1]), tensor([0.0, 0.0]), tensor([1.0, 1.0]), cliprange=0.2)
    assert_close(loss, tensor([0.5 * 0.8**2, 0.5 * 0.9**2]))  # 1.0 is clipped to 0.2, 0.1 is not clipped
    assert clipped.tolist() == [1.0, 0.0]


def test_kl_estimates_agree_with_the_true_divergence_and_k3_is_never_negative():
    policy, reference = tensor([0.6, 0.4]).log(), tensor([0.5, 0.5]).log()
    truth = float((policy.exp() * (policy - reference)).sum())
    assert float((policy.exp() * losses.kl_k1(policy, reference)).sum()) == pytest.approx(truth, abs=1e-6)
    assert float((policy.exp() * losses.kl_k3(policy, reference)).sum()) == pytest.approx(truth, abs=1e-6)
    assert (losses.kl_k3(policy, reference) >= 0).all()
    assert losses.kl_k1(policy, reference).min() < 0


def test_score_lands_on_the_last_real_token_and_kl_on_every_one():
    mask = tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 1.0]])
    kl = tensor([[0.1, 0.2, 5.0], [0.0, 0.0, 1.0]])
    rewards = losses.token_rewards(tensor([2.0, 3.0]), kl, mask, kl_coef=0.5)
    assert_close(rewards, tensor([[-0.05, 1.9, 0.0], [0.0, 0.0, 2.5]]))


def test_log_probabilities_and_entropy_use_the_temperature():
    logits = torch.randn(2, 3, 7)
    ids = torch.randint(0, 7, (2, 3))
    reference = torch.distributions.Categorical(logits=logits / 0.7)
    assert_close(losses.token_log_probs(logits, ids, 0.7), reference.log_prob(ids))
    assert_close(losses.token_entropy(logits, 0.7), reference.entropy())


def test_explained_variance_is_one_for_a_perfect_critic_and_zero_for_a_constant_one():
    returns, mask = tensor([[1.0, 2.0, 3.0, 50.0]]), tensor([[1.0, 1.0, 1.0, 0.0]])
    assert losses.explained_variance(returns, returns, mask) == 1.0
    assert losses.explained_variance(torch.full_like(returns, 2.0), returns, mask) == pytest.approx(0.0)
    assert losses.explained_variance(returns, torch.ones_like(returns), mask) == 0.0


def test_adaptive_coefficient_moves_by_the_clipped_error():
    assert losses.adapt_kl_coef(0.1, kl=60.0, target=6.0, episodes=100, horizon=10_000) == pytest.approx(0.1 * 1.002)
    assert losses.adapt_kl_coef(0.1, kl=0.0, target=6.0, episodes=100, horizon=10_000) == pytest.approx(0.1 * 0.998)
    assert losses.adapt_kl_coef(0.1, kl=6.6, target=6.0, episodes=100, horizon=10_000) == pytest.approx(0.1 * 1.001)


def test_a_response_without_end_never_scores_above_the_missing_end_score():
    scores, ended = tensor([5.0, 5.0, -3.0, 99.0]), tensor([True, False, False, True])
    assert finish_scores(scores, ended, clip=10.0, missing_end_score=-1.0).tolist() == [5.0, -1.0, -3.0, 10.0]
    assert finish_scores(scores, ended, clip=10.0, missing_end_score=None).tolist() == [5.0, 5.0, -3.0, 10.0]


def test_mean_of_an_empty_mask_is_zero():
    assert losses.masked_mean(tensor([1.0, math.pi]), torch.zeros(2)) == 0.0


def test_leave_one_out_takes_off_the_mean_of_the_other_responses_to_the_prompt():
    scores = torch.tensor([1.0, 2.0, 6.0, 10.0, 10.0, 10.0])
    assert losses.leave_one_out(scores, 3).tolist() == [1 - 4, 2 - 3.5, 6 - 1.5, 0, 0, 0]
    assert losses.leave_one_out(scores, 1) is scores
