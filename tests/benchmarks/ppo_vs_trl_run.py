"""One run of the toy task that `ppo_vs_trl.py` compares by: with TRL's PPOTrainer of 1.12.0, or with ours.

    python tests/benchmarks/ppo_vs_trl_run.py NAME --seed 0 --episodes 4096 --out FILE

The task: a Llama of two layers continues prompts of 8 tokens by up to 16, and each token has a fixed value; the reward
is their sum. Weights, prompts, values and settings are the same for all, and so is the number of optimizer steps: TRL
takes one for four minibatches where its accumulation is 4, and fewer, larger steps give more reward for the same KL.
It runs in either library's environment.
"""

import argparse
import contextlib
import json
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

PAD, END = 0, 1
VOCABULARY, FIRST_VALUED, PROMPT_TOKENS, RESPONSE_TOKENS = 64, 16, 8, 16
ROLLOUT, EPOCHS = 64, 4
SHARED = {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "adam_epsilon": 1e-5, "kl_coef": 0.05}
SHARED |= {"num_ppo_epochs": EPOCHS, "gamma": 1.0, "lam": 0.95, "cliprange": 0.2, "cliprange_value": 0.2}
SHARED |= {"vf_coef": 0.1, "temperature": 1.0, "bf16": False, "use_cpu": True, "report_to": "none"}
SHARED |= {"save_strategy": "no", "disable_tqdm": True, "per_device_train_batch_size": ROLLOUT}


def token_values() -> torch.Tensor:
    """The value of each token (V,): those of prompts and the control tokens have none."""
    values = 0.4 * torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(7))
    values[:FIRST_VALUED] = 0
    return values


def make_prompts(count: int, seed: int) -> list[list[int]]:
    """Prompts of tokens without value."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, FIRST_VALUED, (count, PROMPT_TOKENS), generator=generator).tolist()


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Words `t0`, `t1`, …: the ids themselves."""
    words = {"<pad>": PAD, "<end>": END, **{f"t{number}": number for number in range(2, VOCABULARY)}}
    backend = Tokenizer(models.WordLevel(words, unk_token="t2"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>", padding_side="left")


def config(**options) -> LlamaConfig:
    """A Llama of two layers."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, pad_token_id=PAD, eos_token_id=END, bos_token_id=None,
        tie_word_embeddings=False, **options,
    )  # fmt: skip


def fill(model: nn.Module, seed: int) -> nn.Module:
    """The same weights in every version of transformers."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() > 1:
                parameter.copy_(0.08 * torch.randn(parameter.shape, generator=generator))
    return model


class Timed:
    """Adds up the CPU seconds of a function."""

    def __init__(self, function):
        self.function, self.seconds = function, 0.0

    def __call__(self, *args, **kwargs):
        begin = time.process_time()
        try:
            return self.function(*args, **kwargs)
        finally:
            self.seconds += time.process_time() - begin


class ToyReward(nn.Module):
    """What TRL takes for a reward model: a trunk whose hidden state is the sum of the values so far, and no head."""

    base_model_prefix = "model"

    def __init__(self):
        super().__init__()
        self.model, self.score = _Sums(), nn.Identity()


class _Sums(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("values", token_values())

    def forward(self, input_ids, **_):
        return SimpleNamespace(hidden_states=[self.values[input_ids].cumsum(-1).unsqueeze(-1)])


class NoPadLlama(LlamaForCausalLM):
    """A policy that never says the pad token."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits.index_fill(-1, torch.tensor([PAD]), -1e9)
        return output


def run_trl(name: str, seed: int, episodes: int, minibatches: int, folder: str) -> dict:
    """TRL 1.12.0: `trl` as it is, `trl-no-pad` or `trl-no-gc`."""
    from datasets import Dataset
    from transformers import LlamaForSequenceClassification
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    ppo_trainer.batch_generation = timed = Timed(ppo_trainer.batch_generation)
    if name == "trl-no-gc":
        ppo_trainer.gc = SimpleNamespace(collect=lambda: 0)
    policy = fill((NoPadLlama if name == "trl-no-pad" else LlamaForCausalLM)(config()), seed)
    args = PPOConfig(
        output_dir=folder, total_episodes=episodes, num_mini_batches=minibatches, seed=seed,
        response_length=RESPONSE_TOKENS, stop_token="eos",
        missing_eos_penalty=None, num_sample_generations=0, gradient_checkpointing=False, **SHARED,
    )  # fmt: skip
    prompts = Dataset.from_dict({"input_ids": make_prompts(1024, seed)})
    trainer = PPOTrainer(
        args=args, processing_class=make_tokenizer(), model=policy, ref_model=fill(type(policy)(config()), seed),
        reward_model=ToyReward(), train_dataset=prompts, eval_dataset=prompts.select(range(16)),
        value_model=fill(LlamaForSequenceClassification(config(num_labels=1)), seed + 1),
    )  # fmt: skip
    begin, died = time.process_time(), None
    try:
        with contextlib.redirect_stdout(None):
            trainer.train()
    except RuntimeError as error:  # a policy whose probabilities became NaN cannot be sampled from
        if "probability tensor" not in str(error):
            raise
        died = str(error)
    seconds = time.process_time() - begin
    rows = [line for line in trainer.state.log_history if "objective/kl" in line]
    curve = [[row["objective/kl"], row["objective/scores"]] for row in rows]
    done = len(rows) * ROLLOUT
    return {"episodes": done, "seconds": seconds, "generation_seconds": timed.seconds, "curve": curve, "died": died}


def run_ours(name: str, seed: int, episodes: int, minibatches: int, folder: str) -> dict:
    """Ours: `ours-separate` or `ours-shared`."""
    from transformers import PrinterCallback

    from hf_scratch_gpt import PPOConfig, PPOTrainer
    from hf_scratch_gpt.alignment.ppo import episodes as module

    module.sample_responses = timed = Timed(module.sample_responses)
    values = token_values()

    def reward(completion_ids):
        return [float(values[ids].sum()) for ids in completion_ids]

    args = PPOConfig(
        output_dir=folder, total_episodes=episodes, rollout_batch_size=ROLLOUT, max_new_tokens=RESPONSE_TOKENS,
        missing_end_score=None, reward_clip=1e6, critic=name.removeprefix("ours-"), seed=seed, log_completions=0,
        logging_steps=EPOCHS * minibatches,
        **{**SHARED, "per_device_train_batch_size": ROLLOUT // minibatches},
    )  # fmt: skip
    rows = [{"prompt": " ".join(f"t{token}" for token in prompt)} for prompt in make_prompts(1024, seed)]
    trainer = PPOTrainer(fill(LlamaForCausalLM(config()), seed), reward, args, rows, processing_class=make_tokenizer())
    trainer.remove_callback(PrinterCallback)
    begin = time.process_time()
    trainer.train()
    seconds = time.process_time() - begin
    curve = [[row["kl"], row["reward_raw"]] for row in trainer.records.rollouts]
    return {"seconds": seconds, "generation_seconds": timed.seconds, "curve": curve}


def main() -> None:
    """One run; its figures go to a file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--episodes", type=int, required=True)
    parser.add_argument("--minibatches", type=int, default=1, help="optimizer steps a pass over a rollout")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    set_seed(options.seed)
    run = run_trl if options.name.startswith("trl") else run_ours
    folder = options.out.with_suffix("")
    told = run(options.name, options.seed, options.episodes, options.minibatches, str(folder))
    options.out.write_text(json.dumps({"episodes": options.episodes, **told}), encoding="utf-8")


if __name__ == "__main__":
    main()
