"""Settings of PPO, named as in TRL where TRL has the setting."""

from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments

from hf_scratch_gpt.runs.hardware import has_fast_bf16

CRITICS = ("separate", "shared")


@dataclass
class PPOConfig(TrainingArguments):
    r"""Settings of [`PPOTrainer`], beyond those of `transformers.TrainingArguments`.

    One optimizer step is one minibatch of `per_device_train_batch_size * gradient_accumulation_steps * processes`
    episodes; one rollout of `rollout_batch_size` episodes is used for `num_ppo_epochs` passes, so it lasts
    `num_ppo_epochs * rollout_batch_size / minibatch` steps. `max_steps` counts optimizer steps, an epoch is one
    rollout for each prompt.

    Parameters:
        rollout_batch_size (`int`, *optional*, defaults to `256`):
            Episodes sampled at a time, over all processes; a multiple of the minibatch.
        responses_per_prompt (`int`, *optional*, defaults to `1`):
            Responses sampled to each prompt of a rollout. Above 1 the mean score of a prompt's other responses is
            taken off a response's score, so that how hard a prompt is tells nothing (leave-one-out baseline of
            Kool et al. 2019 and Ahmadian et al. 2024, arXiv 2402.14740).
        num_ppo_epochs (`int`, *optional*, defaults to `4`):
            Passes over the episodes of a rollout.
        total_episodes (`int`, *optional*):
            Episodes in all; sets `max_steps` (whole rollouts, rounded up).
        max_new_tokens (`int`, *optional*, defaults to `32`):
            Longest response in tokens.
        max_length (`int`, *optional*):
            Longest prompt and response together in tokens; the model's context if not given.
        temperature (`float`, *optional*, defaults to `1.0`):
            Divides the logits in sampling and in every log-probability.
        top_k, top_p, min_p (`int`, `float`, `float`, *optional*, default to `0`, `1.0` and `0.0`):
            Sample only the likeliest tokens, as in `generate`; off by default. Log-probabilities are those of the
            distribution over the tokens that were kept, which stay the same while a rollout is used (so the first
            ratio is 1), the reference's too. A rollout then holds episodes x tokens x vocabulary / 8 bytes more.
        repetition_penalty (`float`, *optional*, defaults to `1.0`):
            As in `generate`, over prompt and response; part of every log-probability.
        min_new_tokens (`int`, *optional*, defaults to `0`):
            No end token is sampled before so many tokens.
        critic (`str`, *optional*, defaults to `"separate"`):
            `"separate"`: a token classifier of its own; `"shared"`: a value head on the policy's trunk, half the cost.
        critic_learning_rate (`float`, *optional*):
            Learning rate of the critic; `learning_rate` if not given.
        gamma, lam (`float`, *optional*, default to `1.0` and `0.95`):
            Discount and λ of generalised advantage estimation.
        cliprange, cliprange_value, vf_coef (`float`, *optional*, default to `0.2`, `0.2` and `0.1`):
            Clip of the probability ratio, clip of the value around its old value, weight of the value loss.
        whiten_rewards (`bool`, *optional*, defaults to `False`):
            Scale the per-token rewards to deviation 1, keeping their mean.
        kl_coef (`float`, *optional*, defaults to `0.05`):
            Weight of the per-token KL to the reference in the reward (its first value if `kl_target` is given).
        kl_target (`float`, *optional*):
            Adapt `kl_coef` so that the KL of a response comes to this (Ziegler et al. use 6).
        kl_horizon (`float`, *optional*, defaults to `10000`):
            Episodes over which the adaptive coefficient reacts.
        reward_clip (`float`, *optional*, defaults to `10.0`):
            The normalised score is clipped to ± this.
        missing_end_score (`float`, *optional*, defaults to `-1.0`):
            A response that does not end by an end token scores at most this; `None` switches it off.
        reward_weights (`list[float]`, *optional*):
            Weight of each reward; all 1 if not given. A reward of weight 0 is only logged.
        end_token_ids (`list[int]`, *optional*):
            What ends a response; by default the end tokens of the generation config and the tokenizer.
        ptx_coef (`float`, *optional*, defaults to `27.8`):
            With a `ptx_dataset`: weight of the mean next-token loss on pretraining text, which each minibatch has some
            of (PPO-ptx of Ouyang et al. 2022, who take 27.8, and 0.02 for `kl_coef`).
        ptx_batch_size (`int`, *optional*, defaults to `8`):
            Windows of pretraining text in a forward pass, on each process.
        ptx_length (`int`, *optional*):
            Tokens of such a window; the model's context if not given, but 512 at most.
        bf16 (`bool`, *optional*):
            bf16 autocast, in sampling, log-probabilities and training alike; by default where the hardware computes
            it faster than fp32 (CUDA from Ampere on, AMX, AVX-512 bf16), and a warning says where not.
        log_completions (`int`, *optional*, defaults to `4`):
            Responses of each rollout that are kept in `completions.jsonl`.
    """

    # What TrainingArguments has another default for.
    adam_epsilon: float = field(default=1e-5, metadata={"help": "Epsilon of Adam; PPO's usual value."})
    learning_rate: float = field(default=1e-5, metadata={"help": "Learning rate of the policy."})
    per_device_train_batch_size: int = field(default=64, metadata={"help": "Episodes in a forward pass."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Rollouts for each prompt."})
    logging_steps: float = field(default=10, metadata={"help": "Optimizer steps between two log lines."})

    max_steps: int = field(default=-1, metadata={"help": "Optimizer steps; -1 to go by epochs or total_episodes."})

    rollout_batch_size: int = field(default=256, metadata={"help": "Episodes sampled at a time, over all processes."})
    responses_per_prompt: int = field(default=1, metadata={"help": "Responses sampled to each prompt of a rollout."})
    num_ppo_epochs: int = field(default=4, metadata={"help": "Passes over the episodes of a rollout."})
    total_episodes: int | None = field(default=None, metadata={"help": "Episodes in all; sets max_steps."})
    max_new_tokens: int = field(default=32, metadata={"help": "Longest response in tokens."})
    max_length: int | None = field(
        default=None, metadata={"help": "Longest prompt and response together in tokens; unset: the model's context."}
    )
    temperature: float = field(default=1.0, metadata={"help": "Divides the logits in every log-probability."})
    top_k: int = field(default=0, metadata={"help": "Sample only the k likeliest tokens; 0: all."})
    top_p: float = field(default=1.0, metadata={"help": "Sample only the likeliest tokens of this share; 1: all."})
    min_p: float = field(default=0.0, metadata={"help": "Sample no token below this share of the likeliest; 0: all."})
    repetition_penalty: float = field(default=1.0, metadata={"help": "Penalty on tokens that occurred; 1: none."})
    min_new_tokens: int = field(default=0, metadata={"help": "Tokens before which no end is sampled."})
    critic: str = field(default="separate", metadata={"help": "separate, or shared: a head on the policy's trunk."})
    critic_learning_rate: float | None = field(default=None, metadata={"help": "Learning rate of the critic."})
    gamma: float = field(default=1.0, metadata={"help": "Discount."})
    lam: float = field(default=0.95, metadata={"help": "Lambda of generalised advantage estimation."})
    cliprange: float = field(default=0.2, metadata={"help": "Clip of the probability ratio."})
    cliprange_value: float = field(default=0.2, metadata={"help": "Clip of the value around its old value."})
    vf_coef: float = field(default=0.1, metadata={"help": "Weight of the value loss."})
    whiten_rewards: bool = field(default=False, metadata={"help": "Scale the per-token rewards to deviation 1."})
    kl_coef: float = field(default=0.05, metadata={"help": "Weight of the KL to the reference in the reward."})
    kl_target: float | None = field(default=None, metadata={"help": "KL of a response that kl_coef adapts to."})
    kl_horizon: float = field(default=10000.0, metadata={"help": "Episodes over which kl_coef adapts."})
    reward_clip: float = field(default=10.0, metadata={"help": "The normalised score is clipped to +- this."})
    missing_end_score: float | None = field(
        default=-1.0, metadata={"help": "A response without an end token scores at most this."}
    )
    reward_weights: list[float] | None = field(default=None, metadata={"help": "Weight of each reward."})
    end_token_ids: list[int] | None = field(default=None, metadata={"help": "Ids of the tokens that end a response."})
    ptx_coef: float = field(default=27.8, metadata={"help": "Weight of the loss on ptx_dataset, if there is one."})
    ptx_batch_size: int = field(default=8, metadata={"help": "Windows of ptx_dataset in a forward pass."})
    ptx_length: int | None = field(
        default=None, metadata={"help": "Tokens of such a window; unset: the model's context, 512 at most."}
    )
    bf16: bool | None = field(default=None, metadata={"help": "bf16 autocast; unset: where bf16 is faster than fp32."})
    log_completions: int = field(default=4, metadata={"help": "Responses of each rollout kept in completions.jsonl."})

    def __post_init__(self) -> None:
        self.use_cpu: bool = bool(getattr(self, "use_cpu", False)) or not torch.accelerator.is_available()
        self.precision_is_chosen = getattr(self, "precision_is_chosen", self.bf16 is None and not self.fp16)
        if self.bf16 is None:
            self.bf16 = self.precision_is_chosen and has_fast_bf16("cpu" if self.use_cpu else None)
        super().__post_init__()
        self._check_ranges()
        if self.rollout_batch_size % self.minibatch_size:
            raise ValueError(
                f"'rollout_batch_size' is {self.rollout_batch_size}, not a multiple of the minibatch of "
                f"{self.minibatch_size} episodes (per_device_train_batch_size x gradient_accumulation_steps x "
                "processes)"
            )
        if self.rollout_batch_size % self.responses_per_prompt:
            raise ValueError(
                f"'rollout_batch_size' is {self.rollout_batch_size}, not a multiple of 'responses_per_prompt' "
                f"({self.responses_per_prompt})"
            )
        if self.total_episodes is not None:
            if self.max_steps > 0:
                raise ValueError("'total_episodes' and 'max_steps' both say how long to train; give one of them")
            self.max_steps = -(-self.total_episodes // self.rollout_batch_size) * self.steps_per_rollout

    def _check_ranges(self) -> None:
        if self.critic not in CRITICS:
            raise ValueError(f"'critic' is {self.critic!r}, expected one of {', '.join(CRITICS)}")
        for name in (
            "rollout_batch_size", "responses_per_prompt", "num_ppo_epochs",
            "max_new_tokens", "temperature", "kl_horizon", "repetition_penalty", "ptx_batch_size", "reward_clip",
        ):  # fmt: skip
            if getattr(self, name) <= 0:
                raise ValueError(f"'{name}' is {getattr(self, name)}, expected more than 0")
        for name in ("total_episodes", "kl_target", "max_length", "ptx_length"):
            if getattr(self, name) is not None and getattr(self, name) <= 0:
                raise ValueError(f"'{name}' is {getattr(self, name)}, expected more than 0, or leave it out")
        for name in ("gamma", "lam", "min_p"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"'{name}' is {getattr(self, name)}, expected 0 to 1")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"'top_p' is {self.top_p}, expected more than 0 and at most 1")
        for name in ("top_k", "min_new_tokens", "ptx_coef", "kl_coef", "log_completions"):
            if getattr(self, name) < 0:
                raise ValueError(f"'{name}' is {getattr(self, name)}, expected 0 or more")
        if self.min_new_tokens >= self.max_new_tokens:
            raise ValueError(
                f"'min_new_tokens' is {self.min_new_tokens}, expected less than 'max_new_tokens' "
                f"({self.max_new_tokens})"
            )

    @property
    def minibatch_size(self) -> int:
        """Episodes in one optimizer step, over all processes."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that one rollout lasts."""
        return self.num_ppo_epochs * self.rollout_batch_size // self.minibatch_size
