"""What one rollout is, from prompts to advantages: the part of the trainer that takes no gradient."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from hf_scratch_gpt.alignment.ppo import losses
from hf_scratch_gpt.alignment.ppo.config import PPOConfig
from hf_scratch_gpt.alignment.ppo.episodes import Episodes, sample_and_score
from hf_scratch_gpt.alignment.ppo.generation import draw_uniforms
from hf_scratch_gpt.alignment.ppo.models import response_logits
from hf_scratch_gpt.alignment.ppo.prompts import Prompt
from hf_scratch_gpt.alignment.ppo.records import Records
from hf_scratch_gpt.alignment.ppo.rewards import Reward
from hf_scratch_gpt.alignment.ppo.rollout import Rollout
from hf_scratch_gpt.alignment.ppo.sampling import SamplingRule
from hf_scratch_gpt.alignment.ppo.schedule import Schedule, seed_of


class EpisodeCollection:
    """Samples, scores and measures; mixed into [`PPOTrainer`], whose attributes it reads."""

    args: PPOConfig
    accelerator: Any
    model: Any
    state: Any
    processing_class: Any
    prompts: list[Prompt]
    rewards: list[Reward]
    reference: Any
    rule: SamplingRule
    schedule: Schedule
    records: Records
    rollout: Rollout | None
    kl_coef: float

    @torch.no_grad()
    def _roll_out(self, rollout_index: int) -> None:
        """Sample, score, and compute what stays fixed while the rollout is used."""
        self.rollout = None  # frees the last one's memory first
        args, shares = self.args, self.schedule.shares()
        own = shares[args.process_index]
        places = self.schedule.rollout_prompts(rollout_index)
        uniforms = draw_uniforms(len(places), args.max_new_tokens, self.schedule.sampling_seed(rollout_index))
        episodes = self._sample([self.prompts[places[row]] for row in own.tolist()], uniforms[own])
        rollout, ref_log_probs, entropy = self._evaluate_policy(episodes)
        order = shares.flatten().argsort().to(rollout.mask.device)
        # From here on all processes compute the same from the same.
        rollout = Rollout(**{n: self._gather(v, n.startswith("prompt")) for n, v in rollout.tensors().items()})
        rollout = rollout.in_order(order)
        ref_log_probs, entropy = self._gather(ref_log_probs)[order], self._gather(entropy)[order]
        columns = {name: self._gather(value)[order] for name, value in self._columns(episodes).items()}
        mask = rollout.mask
        kl = losses.kl_k1(rollout.log_probs, ref_log_probs) * mask
        scores = losses.leave_one_out(columns["reward"], args.responses_per_prompt)
        rewards = losses.token_rewards(scores, kl, mask, self.kl_coef)
        if args.whiten_rewards:
            rewards = losses.masked_whiten(rewards, mask, shift_mean=False)
        advantages, rollout.returns = losses.generalised_advantages(
            rewards, rollout.values, mask, args.gamma, args.lam
        )
        rollout.advantages = losses.masked_whiten(advantages, mask)
        self.rollout = rollout
        columns |= {"kl": kl.sum(-1), "kl_k3": (losses.kl_k3(rollout.log_probs, ref_log_probs) * mask).sum(-1)}
        row = {name: _mean(value) for name, value in columns.items()}
        row["entropy"] = _mean(entropy[mask.bool()])
        row["explained_variance"] = losses.explained_variance(rollout.values, rollout.returns, mask)
        self._record(rollout_index, episodes, row)

    def _sample(self, prompts: list[Prompt], uniforms: Tensor) -> Episodes:
        """Episodes of this process.

        Raises:
            ValueError: if a reward fails on any process: on each of them, so that none waits for another.
        """
        self.model.eval()
        episodes, told = None, None
        try:
            with self.accelerator.autocast():
                episodes = sample_and_score(
                    self.model.policy, self.processing_class, prompts, self.rewards, self.args, self.rule, uniforms,
                    self.state,
                )  # fmt: skip
        except ValueError as error:
            if self.args.world_size == 1:
                raise
            told = str(error)
        failures = [text for text in gather_object([told]) if text] if self.args.world_size > 1 else []
        if failures:
            raise ValueError(failures[0])
        assert episodes is not None
        return episodes

    def _gather(self, values: Tensor, is_left_padded: bool = False) -> Tensor:
        """Rows of all processes, one process after another, padded with zeros to the longest."""
        values = values.to(self.accelerator.device)
        if self.args.world_size == 1:
            return values
        if values.dim() > 1:
            values = self.accelerator.pad_across_processes(values, dim=1, pad_first=is_left_padded)
        return self.accelerator.gather(values.contiguous())

    def _evaluate_policy(self, episodes: Episodes) -> tuple[Rollout, Tensor, Tensor]:
        """Old log-probabilities and values, the reference's log-probabilities, and the entropy, each (R, T)."""
        blank = torch.zeros_like(episodes.mask)
        rollout = Rollout(
            prompt_ids=episodes.prompt_ids,
            prompt_mask=episodes.prompt_mask,
            response_ids=episodes.response_ids,
            mask=episodes.mask,
            **{name: blank.clone() for name in ("log_probs", "values", "advantages", "returns")},
            kept=episodes.kept,
        )
        ref_log_probs, entropy = blank.clone(), blank.clone()
        temperature = self.args.temperature
        for rows in torch.arange(len(blank), device=blank.device).split(self.args.per_device_train_batch_size):
            batch = rollout.select(rows)
            inputs, width = batch.model_inputs(), batch.mask.shape[1]
            with self.accelerator.autocast():
                logits, values, _ = self.model(**inputs, response_length=width)
                with self._as_reference() as reference:
                    ref_logits, _ = response_logits(reference, inputs, width)
            logits, ref_logits = (self.rule.shape_response(each, batch) for each in (logits, ref_logits))
            for target, value in (
                (rollout.log_probs, losses.token_log_probs(logits, batch.response_ids, temperature)),
                (rollout.values, values),
                (ref_log_probs, losses.token_log_probs(ref_logits, batch.response_ids, temperature)),
                (entropy, losses.token_entropy(logits, temperature)),
            ):
                target[rows, :width] = value * batch.mask
        return rollout, ref_log_probs, entropy

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Any]:
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.policy.disable_adapter():
                yield self.model.policy

    def _columns(self, episodes: Episodes) -> dict[str, Tensor]:
        """What is told of each episode (R), by the names of the log."""
        columns = {
            "reward": episodes.scores,
            "reward_raw": episodes.raw_scores,
            "response_length": episodes.mask.sum(-1),
            "share_ended": episodes.ended.float(),
            "share_without_end": 1 - episodes.ended.float(),
        }
        if len(self.rewards) > 1:
            columns |= {f"rewards/{name}": scores for name, scores in episodes.by_reward.items()}
        if episodes.gold is not None and episodes.learnt is not None:
            columns |= {"reward_learnt": episodes.learnt, "reward_gold": episodes.gold}
        return columns

    def _record(self, index: int, episodes: Episodes, row: dict[str, float]) -> None:
        row |= {"kl_coef": self.kl_coef, "episodes": (index + 1) * self.args.rollout_batch_size}
        self.records.add_rollout(self.state.global_step, row)
        if self.state.is_world_process_zero:
            self.records.write_completions(self.state.global_step, episodes.samples(self.args.log_completions))
        if self.args.kl_target is not None:
            self.kl_coef = losses.adapt_kl_coef(
                self.kl_coef, row["kl"], self.args.kl_target, self.args.rollout_batch_size, self.args.kl_horizon
            )

    @torch.no_grad()
    def _measure(self, prompts: list[Prompt]) -> dict[str, float]:
        """Means over one response to each prompt; the draws are the same at each call, on any number of processes."""
        world, rank = self.args.world_size, self.args.process_index
        rows: list[dict[str, Any]] = []
        for start in range(0, len(prompts), self.args.rollout_batch_size):
            chunk = prompts[start : start + self.args.rollout_batch_size]
            own = range(len(chunk))[rank::world]
            if not own:
                own = range(1)  # its process has to take part, and its row is left out below
            uniforms = draw_uniforms(len(chunk), self.args.max_new_tokens, seed_of(self.args.seed, start, -1))
            episodes = self._sample([chunk[row] for row in own], uniforms[list(own)])
            rollout, ref_log_probs, _ = self._evaluate_policy(episodes)
            columns = self._columns(episodes)
            for name, estimate in (("kl", losses.kl_k1), ("kl_k3", losses.kl_k3)):
                columns[name] = (estimate(rollout.log_probs, ref_log_probs) * rollout.mask).sum(-1)
            if rank < len(chunk):
                values = zip(*(value.double().tolist() for value in columns.values()), strict=True)
                rows += [dict(zip(columns, numbers, strict=True)) for numbers in values]
        if world > 1:
            rows = gather_object(rows)
        return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}


def _mean(values: Tensor) -> float:
    return float(values.double().mean()) if values.numel() else 0.0
