"""PPO (Schulman et al. 2017) for causal language models, as in InstructGPT (arXiv 2203.02155), on transformers.

    trainer = PPOTrainer(
        model="sft-folder",
        reward_funcs="reward-model-folder",            # or a function, or a list of both
        args=PPOConfig(output_dir="ppo", total_episodes=4096),
        train_dataset=dataset,                          # column `prompt`: messages or text
        peft_config=LoraConfig(target_modules="all-linear"),
    )
    trainer.train()

One optimizer step is one minibatch, so callbacks, logging, saving, `max_steps` and resume mean what they always mean.
Which prompts a rollout has, what is drawn from the policy, and how minibatches are cut are pure functions of the seed
and the step. A checkpoint adds only the current rollout and a small state file, and resume is exact.
"""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, set_seed

from hf_scratch_gpt.alignment.ppo import losses
from hf_scratch_gpt.alignment.ppo.config import PPOConfig
from hf_scratch_gpt.alignment.ppo.episodes import Episodes, find_end_ids, find_suppressed_ids, sample_and_score
from hf_scratch_gpt.alignment.ppo.generation import suppress
from hf_scratch_gpt.alignment.ppo.models import (
    VALUE_FOLDER,
    PolicyWithCritic,
    build_critic,
    disable_dropout,
    is_peft,
    load_critic,
    load_policy,
    load_policy_model,
    response_logits,
    save_critic,
)
from hf_scratch_gpt.alignment.ppo.prompts import Prompt, longest_prompt, read_prompts
from hf_scratch_gpt.alignment.ppo.records import Records
from hf_scratch_gpt.alignment.ppo.rewards import ModelReward, load_rewards
from hf_scratch_gpt.alignment.ppo.rollout import Rollout
from hf_scratch_gpt.alignment.ppo.schedule import Schedule, seed_of

STATE_FILE, ROLLOUT_FILE, COMPLETIONS_FILE = "ppo_state.json", "ppo_rollout_{}.safetensors", "completions.jsonl"


class PPOTrainer(Trainer):
    """Trains a causal LM by PPO against functions and reward models.

    Args:
        model (`PreTrainedModel` or `str`): The policy to start from, or its folder; also the reference of the KL.
            A PEFT model, or any model with `peft_config`, trains its adapter, and its reference is itself with the
            adapter switched off; else the reference is a frozen copy.
        reward_funcs: One or a list of: a function `(prompts, completions, **columns) -> list[float]`, a sequence
            classifier with one label, or its folder. `args.reward_weights` weighs them.
        args ([`PPOConfig`]): Settings.
        train_dataset: Rows with a column `prompt`: a list of messages, or text.
        eval_dataset (*optional*): Rows for `evaluate`, which samples them and logs reward and KL.
        processing_class (*optional*): The policy's tokenizer; loaded from the model's folder if not given.
        value_model (*optional*): Critic: a token classifier with one label. By default one is made as `args.critic`
            says, a separate one from the first reward model's trunk, or from the policy's if there is none.
        peft_config (*optional*): PEFT settings for the policy.

    Raises:
        ValueError: for settings, rows, rewards or tokenizers that cannot work, naming the one at fault.
    """

    # The loss is a sum divided by the tokens of the whole minibatch, so that accumulation changes nothing.
    loss_is_scaled_for_ga = True
    args: PPOConfig

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: PPOConfig,
        train_dataset: Any,
        eval_dataset: Any = None,
        processing_class: Any = None,
        value_model: Any = None,
        peft_config: Any = None,
        callbacks: list[Any] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        set_seed(args.seed)  # a new adapter's weights are random
        tokenizer = processing_class or AutoTokenizer.from_pretrained(_name_of(model))
        if tokenizer.eos_token_id is None:
            raise ValueError("the policy's tokenizer has no end token (eos_token), without which no response ends")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token  # only fills: no mask is ever made from it
        policy = load_policy_model(model, peft_config)
        self.rewards = load_rewards(reward_funcs, args.reward_weights, tokenizer, args.per_device_train_batch_size)
        self.reference = None if is_peft(policy) else copy.deepcopy(policy).eval().requires_grad_(False)
        first_model = next((reward.model for reward in self.rewards if isinstance(reward, ModelReward)), None)
        critic = value_model if value_model is not None else build_critic(policy, args.critic, first_model)
        module = PolicyWithCritic(policy, critic.requires_grad_(True).float())
        disable_dropout(module)

        self.end_ids = find_end_ids(policy, tokenizer, args.end_token_ids)
        self.suppressed_ids = find_suppressed_ids(policy, tokenizer, self.end_ids)
        self.longest_prompt = longest_prompt(policy, args.max_length, args.max_new_tokens)
        self.prompts = read_prompts(
            train_dataset, tokenizer, self.longest_prompt, getattr(args, "dataset", None) or "train_dataset"
        )
        self.eval_prompts = None
        if eval_dataset is not None:
            self.eval_prompts = read_prompts(eval_dataset, tokenizer, self.longest_prompt, "eval_dataset")
        self.schedule = Schedule(args, len(self.prompts))
        self.kl_coef = args.kl_coef
        self.rollout: Rollout | None = None
        self.records = Records(Path(args.output_dir) / COMPLETIONS_FILE)
        super().__init__(
            model=module,
            args=args,
            data_collator=_collate,
            train_dataset=range(self.schedule.micro_steps_per_epoch * args.world_size),
            eval_dataset=self.eval_prompts,
            processing_class=tokenizer,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        device = self.accelerator.device
        self.end_ids, self.suppressed_ids = self.end_ids.to(device), self.suppressed_ids.to(device)
        if self.reference is not None:
            self.reference.to(device)
            disable_dropout(self.reference)
        for reward in self.rewards:
            if isinstance(reward, ModelReward):
                reward.model.to(device)

    # ---- Steps: which episodes a micro-batch has is a function of the step alone

    def get_train_dataloader(self) -> DataLoader:
        """Yields numbers of micro-steps; `_prepare_inputs` turns them into episodes."""
        return self._get_dataloader(
            self.train_dataset, "Training", batch_size=1, sampler_fn=self._get_train_sampler, is_training=True
        )

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def num_examples(self, dataloader: DataLoader) -> int:
        """Episodes of an epoch, counted once for each pass over them."""
        return len(dataloader.dataset) * self.args.per_device_train_batch_size

    def _prepare_inputs(self, inputs: Any) -> dict[str, Any]:
        # Here and not in get_batch_samples: after that one, a resumed Trainer restores the random state.
        args = self.args
        accumulated = (int(inputs["micro_step"]) // args.world_size) % args.gradient_accumulation_steps
        rollout_index, step = divmod(self.state.global_step, args.steps_per_rollout)
        if step == 0 and accumulated == 0:
            self._roll_out(rollout_index)
        if self.rollout is None:
            raise ValueError(
                f"the checkpoint of step {self.state.global_step} has no {ROLLOUT_FILE.format(args.process_index)}"
            )
        rows = self.schedule.minibatch_rows(rollout_index, step).to(self.accelerator.device)
        tokens = self._sum_over_processes(self.rollout.mask[rows].sum())
        size = args.per_device_train_batch_size
        batch = self.rollout.select(rows[accumulated * size : (accumulated + 1) * size])
        model_inputs = batch.model_inputs()
        self.state.num_input_tokens_seen += int(model_inputs["attention_mask"].sum()) * args.world_size
        return {"batch": batch, "model_inputs": model_inputs, "tokens": tokens}

    def _sum_over_processes(self, total: Tensor) -> Tensor:
        return self.accelerator.reduce(total, "sum") if self.args.world_size > 1 else total

    # ---- Rollout

    @torch.no_grad()
    def _roll_out(self, rollout_index: int) -> None:
        """Sample, score, and compute what stays fixed while the rollout is used."""
        self.rollout = None  # frees the last one's memory first
        prompts = [self.prompts[index] for index in self.schedule.rollout_prompts(rollout_index)]
        episodes = self._sample(prompts, self.schedule.sampling_seed(rollout_index))
        rollout, ref_log_probs, entropy = self._evaluate_policy(episodes)
        mask = rollout.mask
        kl = losses.kl_k1(rollout.log_probs, ref_log_probs) * mask
        scores = losses.leave_one_out(episodes.scores, self.args.responses_per_prompt)
        rewards = losses.token_rewards(scores.to(mask.device), kl, mask, self.kl_coef)
        if self.args.whiten_rewards:
            rewards = losses.masked_whiten(rewards, mask, False, self._sum_over_processes)
        advantages, rollout.returns = losses.generalised_advantages(
            rewards, rollout.values, mask, self.args.gamma, self.args.lam
        )
        rollout.advantages = losses.masked_whiten(advantages, mask, reduce=self._sum_over_processes)
        self.rollout = rollout
        self._record(rollout_index, episodes, kl, ref_log_probs, entropy)

    def _sample(self, prompts: list[Prompt], seed: int) -> Episodes:
        self.model.eval()
        with self.accelerator.autocast():
            return sample_and_score(
                self.model.policy, self.processing_class, prompts, self.rewards, self.args,
                self.end_ids, self.suppressed_ids, seed,
            )  # fmt: skip

    def _evaluate_policy(self, episodes: Episodes) -> tuple[Rollout, Tensor, Tensor]:
        """Old log-probabilities and values, the reference's log-probabilities, and the entropy, each (R, T)."""
        blank = torch.zeros_like(episodes.mask)
        rollout = Rollout(
            episodes.prompt_ids, episodes.prompt_mask, episodes.response_ids, episodes.mask,
            *(blank.clone() for _ in range(4)),
        )  # fmt: skip
        ref_log_probs, entropy = blank.clone(), blank.clone()
        temperature = self.args.temperature
        for rows in torch.arange(len(blank), device=blank.device).split(self.args.per_device_train_batch_size):
            batch = rollout.select(rows)
            inputs, width = batch.model_inputs(), batch.mask.shape[1]
            with self.accelerator.autocast():
                logits, values = self.model(**inputs, response_length=width)
                with self._as_reference() as reference:
                    ref_logits, _ = response_logits(reference, inputs, width)
            logits, ref_logits = suppress(logits, self.suppressed_ids), suppress(ref_logits, self.suppressed_ids)
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

    def _record(self, index: int, episodes: Episodes, kl: Tensor, ref_log_probs: Tensor, entropy: Tensor) -> None:
        assert self.rollout is not None
        rollout, mask = self.rollout, self.rollout.mask
        row = self._describe(episodes, kl, losses.kl_k3(rollout.log_probs, ref_log_probs) * mask)
        row["entropy"] = self._mean(entropy[mask.bool()])
        row["explained_variance"] = losses.explained_variance(rollout.values, rollout.returns, mask)
        row["kl_coef"] = self.kl_coef
        row["episodes"] = (index + 1) * self.args.rollout_batch_size
        self.records.add_rollout(self.state.global_step, row)
        if self.is_world_process_zero():
            self.records.write_completions(self.state.global_step, episodes.samples(self.args.log_completions))
        if self.args.kl_target is not None:
            self.kl_coef = losses.adapt_kl_coef(
                self.kl_coef, row["kl"], self.args.kl_target, self.args.rollout_batch_size, self.args.kl_horizon
            )

    def _describe(self, episodes: Episodes, kl: Tensor, kl_k3: Tensor) -> dict[str, float]:
        """Means over all processes' episodes; the KLs are those of whole responses, in nats."""
        row = {
            "reward": episodes.scores,
            "reward_raw": episodes.raw_scores,
            "kl": kl.sum(-1),
            "kl_k3": kl_k3.sum(-1),
            "response_length": episodes.mask.sum(-1),
            "share_ended": episodes.ended.float(),
        }
        if len(self.rewards) > 1:
            row.update({f"rewards/{name}": scores for name, scores in episodes.by_reward.items()})
        return {name: self._mean(values) for name, values in row.items()}

    def _mean(self, values: Tensor) -> float:
        sums = torch.stack([values.double().sum(), values.new_tensor(values.numel(), dtype=torch.double)])
        total, count = self._sum_over_processes(sums.to(self.accelerator.device)).tolist()
        return total / max(count, 1)

    # ---- Loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Clipped surrogate and value loss of a micro-batch, as its share of the minibatch's mean over tokens."""
        batch: Rollout = inputs["batch"]
        args = self.args
        logits, values = model(**inputs["model_inputs"], response_length=batch.mask.shape[1])
        log_probs = losses.token_log_probs(suppress(logits, self.suppressed_ids), batch.response_ids, args.temperature)
        policy_loss, ratio, clipped = losses.policy_losses(
            log_probs, batch.log_probs, batch.advantages, args.cliprange
        )
        value_loss, value_clipped = losses.value_losses(values, batch.values, batch.returns, args.cliprange_value)
        total = ((policy_loss + args.vf_coef * value_loss) * batch.mask).sum()
        with torch.no_grad():
            parts = {
                "policy_loss": policy_loss,
                "value_loss": value_loss,
                "clip_fraction": clipped,
                "value_clip_fraction": value_clipped,
                "ratio": ratio,
                "update_kl": losses.kl_k3(batch.log_probs, log_probs),
            }
            self.records.add_step({name: (part * batch.mask).sum() for name, part in parts.items()}, batch.mask.sum())
        # Wrappers average gradients over processes, and `tokens` already counts all of them.
        loss = total * args.world_size / inputs["tokens"]
        return (loss, {"logits": logits, "values": values}) if return_outputs else loss

    def _track_num_input_tokens(self, inputs: Any) -> None:
        """Counted in `_prepare_inputs`, where the episodes are known."""

    def create_optimizer(self, model: Any = None) -> Any:
        """As the Trainer's, and with `critic_learning_rate` the critic's parameters in groups of their own."""
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if is_new and self.args.critic_learning_rate is not None:
            critic = {id(parameter) for parameter in self.model.critic.parameters()}
            for group in list(optimizer.param_groups):
                own = [parameter for parameter in group["params"] if id(parameter) in critic]
                group["params"] = [parameter for parameter in group["params"] if id(parameter) not in critic]
                if own:
                    rest = {name: value for name, value in group.items() if name != "params"}
                    optimizer.add_param_group({**rest, "params": own, "lr": self.args.critic_learning_rate})
        return optimizer

    # ---- Evaluation and logging

    @torch.no_grad()
    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample the prompts of `eval_dataset` and log reward, KL, length and share ended, under `eval_…`."""
        prompts = self.eval_prompts
        if eval_dataset is not None and eval_dataset is not self.eval_prompts:
            prompts = read_prompts(eval_dataset, self.processing_class, self.longest_prompt, "eval_dataset")
        if not prompts:
            raise ValueError("evaluate needs an 'eval_dataset'")
        rows, size = [], self.args.rollout_batch_size
        for start in range(0, len(prompts), size):
            chunk = prompts[start : start + size]
            episodes = self._sample(chunk, seed_of(self.args.seed, start, -1))
            rollout, ref_log_probs, _ = self._evaluate_policy(episodes)
            kl = losses.kl_k1(rollout.log_probs, ref_log_probs)
            kl_k3 = losses.kl_k3(rollout.log_probs, ref_log_probs)
            rows.append((len(chunk), self._describe(episodes, kl * rollout.mask, kl_k3 * rollout.mask)))
        metrics = {
            f"{metric_key_prefix}_{name}": sum(count * row[name] for count, row in rows) / len(prompts)
            for name in rows[0][1]
        }
        self.log(metrics)
        self.control: Any = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds to a training log line the means of the rollouts and the steps since the last one."""
        if "loss" in logs:
            previous = max((row["step"] for row in self.state.log_history if "loss" in row), default=0)
            logs = {**logs, **self.records.take(previous)}
            # The Trainer's own sum of losses does not survive in a checkpoint.
            logs["loss"] = logs["policy_loss"] + self.args.vf_coef * logs["value_loss"]
        super().log(logs, start_time)

    # ---- Checkpoints: the policy or its adapter at the root, the critic in value_model/, and the rollout in use

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            self.model.policy.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            save_critic(self.model.critic, folder / VALUE_FOLDER, self.processing_class)

    def _save_rng_state(self, output_dir: str) -> None:
        # Every process comes by here, before older checkpoints are removed.
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        if self.args.should_save:
            self.records.save(folder / STATE_FILE, kl_coef=self.kl_coef)
        if self.rollout is not None and self.state.global_step % self.args.steps_per_rollout:
            self.rollout.save(folder / ROLLOUT_FILE.format(self.args.process_index))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise ValueError(f"{folder}: not a checkpoint of PPO (it has no {STATE_FILE})")
        load_policy(self.model.policy, folder)
        load_critic(self.model.critic, folder / VALUE_FOLDER)
        self.kl_coef = self.records.load(folder / STATE_FILE)["kl_coef"]
        path = folder / ROLLOUT_FILE.format(self.args.process_index)
        self.rollout = Rollout.load(path, self.accelerator.device) if path.is_file() else None


def _name_of(model: Any) -> str:
    return model if isinstance(model, str) else str(model.config.name_or_path)


def _collate(micro_steps: list[int]) -> dict[str, Tensor]:
    return {"micro_step": torch.tensor(micro_steps)}
