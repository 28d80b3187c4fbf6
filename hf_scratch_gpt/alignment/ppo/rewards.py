"""Where scores come from: Python callables and reward models, weighted."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_scratch_gpt.alignment.ppo.generation import position_ids_of
from hf_scratch_gpt.alignment.ppo.prompts import Prompt, context_length, left_pad, template_tail
from hf_scratch_gpt.evaluation.rewards import reward_scale_of
from hf_scratch_gpt.runs.loading import check_whole, loading

RewardFunction = Callable[..., Sequence[float]]


class CallableReward:
    """A Python function as a reward, called as TRL calls one.

    It gets `prompts` and `completions` (text, or lists of messages for conversations), `completion_ids`, and each
    other column of the data set as a list, and returns one finite number for each completion.
    """

    def __init__(self, function: RewardFunction):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)

    def score(
        self, prompts: list[Prompt], completion_ids: list[list[int]], ended: list[bool], texts: list[str]
    ) -> Tensor:
        """Raw scores (B).

        Raises:
            ValueError: if the function raises, or does not return one finite number a completion.
        """
        completions = [
            [{"role": "assistant", "content": text}] if prompt.is_conversation else text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {name: [prompt.columns[name] for prompt in prompts] for name in prompts[0].columns}
        try:
            scores = self.function(
                prompts=[prompt.content for prompt in prompts],
                completions=completions,
                **{**columns, "completion_ids": completion_ids},
            )
        except Exception as error:
            raise ValueError(f"reward function '{self.name}' raised {type(error).__name__}: {error}") from error
        return self._checked(scores, len(prompts))

    def _checked(self, scores: Any, count: int) -> Tensor:
        try:
            values = [float(score) for score in scores]
        except (TypeError, ValueError) as error:
            raise ValueError(f"reward function '{self.name}' returned no list of numbers: {error}") from error
        if len(values) != count:
            raise ValueError(f"reward function '{self.name}' returned {len(values)} scores for {count} completions")
        bad = next((index for index, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            raise ValueError(f"reward function '{self.name}' returned {values[bad]} for completion {bad}")
        return torch.tensor(values, dtype=torch.float32)

    def normalise(self, scores: Tensor) -> Tensor:
        """A function's scores are taken as they are."""
        return scores


class ModelReward:
    """A sequence classifier with one label as a reward, normalised by the statistics that its config carries.

    `reward_mean` and `reward_std` in its config.json are those of its scores on reference answers (0 and 1 if absent).
    """

    def __init__(self, model: torch.nn.Module, tokenizer: Any, batch_size: int, source: str):
        self.model, self.tokenizer, self.batch_size = model.eval().requires_grad_(False), tokenizer, batch_size
        self.source, self.name = source, Path(source).name
        config: Any = model.config
        check_one_label(config, source)
        self.scale = reward_scale_of(config, source)
        if config.get_text_config().pad_token_id is None:
            config.get_text_config().pad_token_id = tokenizer.pad_token_id
        self._tail = template_tail(tokenizer) if tokenizer.chat_template else []

    def score(
        self, prompts: list[Prompt], completion_ids: list[list[int]], ended: list[bool], texts: list[str]
    ) -> Tensor:
        """Raw scores (B), read at the last token of each conversation, encoded as in the reward model's training."""
        sequences = [
            prompt.input_ids + (self._close(prompt, ids) if has_ended else ids)
            for prompt, ids, has_ended in zip(prompts, completion_ids, ended, strict=True)
        ]
        limit = context_length(self.model)
        longest = max(map(len, sequences))
        if limit is not None and longest > limit:
            raise ValueError(
                f"reward model {self.source}: a prompt and its completion have {longest} tokens, its context is "
                f"{limit}; lower 'max_new_tokens' or shorten the prompts"
            )
        batches = [sequences[start : start + self.batch_size] for start in range(0, len(sequences), self.batch_size)]
        return torch.cat([self._score_batch(batch) for batch in batches])

    def _close(self, prompt: Prompt, ids: list[int]) -> list[int]:
        """Any end token counts as the tokenizer's own, followed by what the chat template writes after it."""
        return [*ids[:-1], self.tokenizer.eos_token_id, *(self._tail if prompt.is_conversation else [])]

    @torch.no_grad()
    def _score_batch(self, sequences: list[list[int]]) -> Tensor:
        # Padding on the left puts each row's last real token in the last place, whatever the pad id is.
        ids, mask = left_pad(sequences, self.tokenizer.pad_token_id)
        device = next(self.model.parameters()).device
        ids, mask = ids.to(device), mask.to(device)
        with torch.autocast(device.type, enabled=False):  # its mean and deviation were measured in fp32
            logits = self.model(input_ids=ids, attention_mask=mask, position_ids=position_ids_of(mask)).logits
        return logits[:, 0].float().cpu()

    def normalise(self, scores: Tensor) -> Tensor:
        """(score − mean) / deviation of the reference answers."""
        return self.scale.normalise(scores)


Reward = CallableReward | ModelReward


def check_same_tokenizer(tokenizer: Any, other: Any, name: str) -> None:
    """Refuse a reward model whose tokenizer gives other ids to the same text.

    Raises:
        ValueError: naming the reward model and the first difference.
    """
    vocabulary, others = tokenizer.get_vocab(), other.get_vocab()
    if vocabulary == others:
        return
    different = sorted(token for token in set(vocabulary) | set(others) if vocabulary.get(token) != others.get(token))
    token = different[0]
    raise ValueError(
        f"reward model {name}: its tokenizer is not the policy's ({len(different)} tokens differ, for "
        f"example {token!r} is {others.get(token)} there and {vocabulary.get(token)} here); train the reward model "
        "with the policy's tokenizer"
    )


def load_rewards(sources: Any, weights: list[float] | None, tokenizer: Any, batch_size: int) -> list[Reward]:
    """`load_reward` of one source or of each of a list.

    Raises:
        ValueError: if there is none, or not one of `weights` for each.
    """
    sources = list(sources) if isinstance(sources, list | tuple) else [sources]
    if not sources:
        raise ValueError("no reward: give a function, a reward model or its folder")
    if weights is not None and len(weights) != len(sources):
        raise ValueError(f"'reward_weights' has {len(weights)} numbers for {len(sources)} rewards")
    return [load_reward(source, tokenizer, batch_size) for source in sources]


def load_reward(reward: Any, tokenizer: Any, batch_size: int) -> Reward:
    """A reward from a callable, a folder (or Hub id) of a sequence classifier, or the classifier itself.

    Raises:
        ValueError: if it is neither, or if the classifier's tokenizer or vocabulary is another one.
    """
    if isinstance(reward, torch.nn.Module):
        name = getattr(reward.config, "name_or_path", "") or type(reward).__name__
        _check_vocabulary(reward, tokenizer, name)
        return ModelReward(reward, tokenizer, batch_size, name)
    if isinstance(reward, str | Path):
        model, name = _load_classifier(str(reward), tokenizer), str(reward)
        return ModelReward(model, tokenizer, batch_size, name)
    if callable(reward):
        return CallableReward(reward)
    raise ValueError(f"a reward is {type(reward).__name__}, expected a function, a reward model, or its folder")


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    size = model.config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values())
    if size <= largest:
        raise ValueError(
            f"reward model {name}: its vocabulary has {size} tokens, the policy's tokenizer {largest + 1}"
        )


def check_one_label(config: Any, source: str) -> None:
    """Refuse a classifier that does not give one score.

    Raises:
        ValueError: naming it and its number of labels.
    """
    if config.num_labels != 1:
        raise ValueError(f"reward model {source}: has {config.num_labels} labels, expected 1 (num_labels=1)")


def _load_classifier(folder: str, tokenizer: Any) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    import hf_scratch_gpt.model  # noqa: F401  # registers our classes with the Auto classes

    with loading(folder, "tokenizer"):
        its_tokenizer = AutoTokenizer.from_pretrained(folder)
    check_same_tokenizer(tokenizer, its_tokenizer, folder)
    with loading(folder, "config"):
        check_one_label(AutoConfig.from_pretrained(folder), folder)
    with loading(folder, "model"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    check_whole(folder, info)
    _check_vocabulary(model, tokenizer, folder)
    return model
