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

import copy
import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoTokenizer, Trainer, set_seed

from hf_scratch_gpt.alignment.ppo import losses
from hf_scratch_gpt.alignment.ppo.collection import EpisodeCollection
from hf_scratch_gpt.alignment.ppo.config import PPOConfig
from hf_scratch_gpt.alignment.ppo.episodes import find_end_ids, find_suppressed_ids
from hf_scratch_gpt.alignment.ppo.models import (
    VALUE_FOLDER,
    PolicyWithCritic,
    build_critic,
    disable_dropout,
    is_peft,
    load_critic,
    load_policy,
    load_policy_model,
    load_value_model,
    save_critic,
)
from hf_scratch_gpt.alignment.ppo.pretraining_mix import PretrainingMix, to_device
from hf_scratch_gpt.alignment.ppo.prompts import Prompt, longest_prompt, read_prompts
from hf_scratch_gpt.alignment.ppo.records import Records
from hf_scratch_gpt.alignment.ppo.rewards import CallableReward, ModelReward, load_rewards
from hf_scratch_gpt.alignment.ppo.rollout import Rollout
from hf_scratch_gpt.alignment.ppo.sampling import SamplingRule
from hf_scratch_gpt.alignment.ppo.schedule import Schedule
from hf_scratch_gpt.runs.checkpoints import MANIFEST, newest_checkpoint, write_manifest
from hf_scratch_gpt.runs.training import AlreadyTrained, RunCallback

logger = logging.getLogger(__name__)

STATE_FILE, ROLLOUT_FILE = "ppo_state.json", "ppo_rollout.safetensors"
COMPLETIONS_FILE, ROLLOUTS_FILE = "completions.jsonl", "rollouts.jsonl"


class PPOTrainer(EpisodeCollection, Trainer):
    """Trains a causal LM by PPO against functions and reward models.

    Args:
        model (`PreTrainedModel` or `str`): The policy to start from, or its folder; also the reference of the KL.
            A PEFT model, or any model with `peft_config`, trains its adapter, and its reference is itself with the
            adapter switched off; else the reference is a frozen copy.
        reward_funcs: One or a list of: a function `(prompts, completions, **columns) -> list[float]`, sync or async,
            a sequence classifier with one label, or its folder. `args.reward_weights` weighs them. A reward of weight
            0, or one called `gold`, is the truth that the others stand for: its curve is kept beside theirs.
        args ([`PPOConfig`]): Settings.
        train_dataset: Rows with a column `prompt`: a list of messages, or text.
        eval_dataset (*optional*): Rows for `evaluate`, which samples them and logs reward and KL.
        processing_class (*optional*): The policy's tokenizer; loaded from the model's folder if not given.
        value_model (*optional*): Critic: a token classifier with one label, or its folder. By default one is made as
            `args.critic` says, a separate one from the trunk of the first reward model that reads the policy's ids,
            or from the policy's if there is none.
        reward_processing_classes (*optional*): The rewards' own tokenizers: one, or a list with `None` for functions.
            A reward model's folder brings its own; without either it is taken to share the policy's.
        peft_config (*optional*): PEFT settings for the policy.
        ptx_dataset (*optional*): Pretraining text for PPO-ptx: a folder that `prepare` wrote, a file, or rows with
            `text`.

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
        reward_processing_classes: Any = None,
        peft_config: Any = None,
        ptx_dataset: Any = None,
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
        self.rewards = load_rewards(
            reward_funcs, args.reward_weights, tokenizer, args.per_device_train_batch_size, reward_processing_classes
        )
        self.reference = None if is_peft(policy) else copy.deepcopy(policy).eval().requires_grad_(False)
        critic = load_value_model(value_model)
        if critic is None:
            critic = build_critic(policy, args.critic, self._critic_source())
        module = PolicyWithCritic(policy, critic.requires_grad_(True).float())
        disable_dropout(module)

        end_ids = find_end_ids(policy, tokenizer, args.end_token_ids)
        suppressed_ids = find_suppressed_ids(policy, tokenizer, end_ids)
        self.rule = SamplingRule.from_args(args, end_ids, suppressed_ids, tokenizer.pad_token_id)
        self.longest_prompt = longest_prompt(policy, args.max_length, args.max_new_tokens)
        self.prompts = self._read(train_dataset, tokenizer, getattr(args, "dataset", None) or "train_dataset")
        self.eval_prompts = self._read_eval(eval_dataset, tokenizer)
        self.ptx = None if ptx_dataset is None else PretrainingMix(ptx_dataset, tokenizer, policy, args)
        self.schedule = Schedule(args, len(self.prompts))
        self.kl_coef = args.kl_coef
        self.rollout: Rollout | None = None
        self.records = Records(Path(args.output_dir) / COMPLETIONS_FILE, self._sum_over_processes)
        if args.precision_is_chosen and not args.bf16:
            logger.warning(
                "PPO computes in fp32: bf16 is not faster on this hardware (set bf16 to have it all the same)"
            )
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
        self.rule.to(device)
        if self.reference is not None:
            self.reference.to(device)
            disable_dropout(self.reference)
        for reward in self.rewards:
            if isinstance(reward, ModelReward):
                reward.model.to(device)

    def _critic_source(self) -> Any:
        """The first reward model whose trunk a critic can begin from: one that reads the policy's ids."""
        models = (reward for reward in self.rewards if isinstance(reward, ModelReward))
        return next((reward.model for reward in models if reward.reads_ids), None)

    def _read(self, rows: Any, tokenizer: Any, what: str) -> list[Prompt]:
        """The prompts of a data set, refused at once where a reward cannot judge them."""
        prompts = read_prompts(rows, tokenizer, self.longest_prompt, what)
        columns = sorted(set.intersection(*(set(prompt.columns) for prompt in prompts)))
        for reward in self.rewards:
            if isinstance(reward, CallableReward):
                reward.check_columns(columns, what)
            elif not reward.reads_ids:
                reward.check_prompts(prompts)
        return prompts

    def _read_eval(self, dataset: Any, tokenizer: Any) -> Any:
        """The prompts of the held-out data set, or of each of a dictionary of them."""
        if dataset is None:
            return None
        if isinstance(dataset, dict) and not _is_columns(dataset):
            return {name: self._read(rows, tokenizer, f"eval_dataset {name}") for name, rows in dataset.items()}
        return self._read(dataset, tokenizer, "eval_dataset")

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
            raise ValueError(f"the checkpoint of step {self.state.global_step} has no {ROLLOUT_FILE}")
        minibatch = self.schedule.minibatch_rows(rollout_index, step).to(self.accelerator.device)
        rows = self.schedule.micro_batch_rows(minibatch, accumulated)
        batch = self.rollout.select(rows[args.process_index])
        every = rows.flatten()
        self.state.num_input_tokens_seen += int(self.rollout.prompt_mask[every].sum() + self.rollout.mask[every].sum())
        prepared = {"batch": batch, "tokens": self.rollout.mask[minibatch].sum()}
        prepared["model_inputs"] = {**batch.model_inputs(), "response_length": batch.mask.shape[1]}
        if self.ptx is not None:
            windows = self.ptx.batch(self.state.global_step * args.gradient_accumulation_steps + accumulated)
            prepared["model_inputs"]["windows"] = to_device(windows, self.accelerator.device)
        return prepared

    def _sum_over_processes(self, total: Tensor) -> Tensor:
        if self.args.world_size == 1:
            return total
        return self.accelerator.reduce(total.to(self.accelerator.device), "sum").cpu()

    # ---- Loss

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Clipped surrogate and value loss of a micro-batch, as its share of the minibatch's mean over tokens."""
        batch: Rollout = inputs["batch"]
        args = self.args
        logits, values, ptx_loss = model(**inputs["model_inputs"])
        shaped = self.rule.shape_response(logits, batch)
        log_probs = losses.token_log_probs(shaped, batch.response_ids, args.temperature)
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
            if ptx_loss is not None:
                parts["ptx_loss"] = ptx_loss.detach()
            self.records.add_step({name: (part * batch.mask).sum() for name, part in parts.items()}, batch.mask.sum())
        # Wrappers average gradients over processes, and `tokens` already counts all of them.
        loss = total * args.world_size / inputs["tokens"]
        if ptx_loss is not None:
            loss = loss + args.ptx_coef * ptx_loss / args.gradient_accumulation_steps
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
            prompts = self._read_eval(eval_dataset, self.processing_class)
        if not prompts:
            raise ValueError("evaluate needs an 'eval_dataset'")
        if isinstance(prompts, dict):
            told = {f"{metric_key_prefix}_{name}": self._measure(rows) for name, rows in prompts.items()}
        else:
            told = {metric_key_prefix: self._measure(prompts)}
        metrics = {f"{prefix}_{name}": value for prefix, row in told.items() for name, value in row.items()}
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
            logs["loss"] += self.args.ptx_coef * logs.get("ptx_loss", 0.0)
        super().log(logs, start_time)

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; `True` resumes from the newest checkpoint that is whole. Ends with `rollouts.jsonl`."""
        if resume_from_checkpoint is True:
            found = newest_checkpoint(self.args.output_dir)
            if found is None:
                raise ValueError(f"{self.args.output_dir}: holds no whole checkpoint to resume from")
            resume_from_checkpoint = str(found)
        if self.args.save_total_limit == 1:  # the older one goes before the newer one has its manifest
            self.args.save_total_limit = 2
        try:
            result = super().train(resume_from_checkpoint, *args, **kwargs)
        except AlreadyTrained:
            self._write_rollouts()
            raise
        self._write_rollouts()
        return result

    def _write_rollouts(self) -> None:
        if self.args.should_save:
            self.records.write_rollouts(Path(self.args.output_dir) / ROLLOUTS_FILE)

    # ---- Checkpoints: the policy or its adapter at the root, the critic in value_model/, and the rollout in use

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        folder = Path(output_dir if output_dir is not None else self.args.output_dir)
        if self.args.should_save:
            self.model.policy.save_pretrained(folder)
            self.processing_class.save_pretrained(folder)
            save_critic(self.model.critic, folder / VALUE_FOLDER, self.processing_class)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            (folder / MANIFEST).unlink(missing_ok=True)  # of a checkpoint that is written anew
        super()._save_checkpoint(model, trial)
        if any(isinstance(callback, RunCallback) for callback in self.callback_handler.callbacks):
            return  # the run that owns the trainer writes the manifest
        if dist.is_available() and dist.is_initialized():
            dist.barrier()
        if self.args.should_save:
            write_manifest(folder)

    def _save_rng_state(self, output_dir: str) -> None:
        # Every process comes by here, before older checkpoints are removed.
        super()._save_rng_state(output_dir)
        folder = Path(output_dir)
        self.records.drain()
        if not self.args.should_save:
            return
        self.records.save(folder / STATE_FILE, kl_coef=self.kl_coef, settings=self._fixed_settings())
        if self.rollout is not None and self.state.global_step % self.args.steps_per_rollout:
            self.rollout.save(folder / ROLLOUT_FILE)

    def _fixed_settings(self) -> dict[str, Any]:
        """What a step means hangs on these, so a resumed run has to have the same."""
        names = ("rollout_batch_size", "minibatch_size", "num_ppo_epochs", "responses_per_prompt", "seed")
        precision = next((name for name in ("bf16", "fp16") if getattr(self.args, name)), "fp32")
        return {**{n: getattr(self.args, n) for n in names}, "prompts": len(self.prompts), "precision": precision}

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        if not (folder / STATE_FILE).is_file():
            raise ValueError(f"{folder}: not a checkpoint of PPO (it has no {STATE_FILE})")
        state = self.records.load(folder / STATE_FILE)
        for name, value in self._fixed_settings().items():
            saved = state.get("settings", {}).get(name, value)
            if saved != value:
                raise ValueError(f"{folder}: was saved with {name} {saved}, and now it is {value}; set it as it was")
        load_policy(self.model.policy, folder)
        load_critic(self.model.critic, folder / VALUE_FOLDER)
        self.kl_coef = state["kl_coef"]
        path = folder / ROLLOUT_FILE
        self.rollout = Rollout.load(path, self.accelerator.device) if path.is_file() else None

    def _load_best_model(self) -> None:
        folder = Path(self.state.best_model_checkpoint or "")
        load_policy(self.model.policy, folder)
        load_critic(self.model.critic, folder / VALUE_FOLDER)


def _name_of(model: Any) -> str:
    return model if isinstance(model, str) else str(model.config.name_or_path)


def _collate(micro_steps: list[int]) -> dict[str, Tensor]:
    return {"micro_step": torch.tensor(micro_steps)}


def _is_columns(dataset: dict[str, Any]) -> bool:
    """Whether a dictionary is one data set's columns and not several data sets."""
    return "prompt" in dataset
