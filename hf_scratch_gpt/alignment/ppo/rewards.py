"""Where scores come from: Python callables, sync or async, and reward models, weighted."""

import asyncio
import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_scratch_gpt.alignment.ppo.prompts import Prompt
from hf_scratch_gpt.alignment.ppo.reward_models import ModelReward, load_model_reward

RewardFunction = Callable[..., Any]  # a sequence of numbers, or an awaitable of one
_GIVEN = ("prompts", "completions", "completion_ids", "trainer_state")


class CallableReward:
    """A Python function as a reward, called as TRL calls one.

    It gets `prompts` and `completions` (text, or lists of messages for conversations), `completion_ids`,
    `trainer_state` and each other column of the data set as a list, as far as it takes them, and returns one finite
    number for each completion. An `async` function is awaited, together with all others of the rollout.
    """

    def __init__(self, function: RewardFunction):
        self.function = function
        self.name = getattr(function, "__name__", type(function).__name__)
        call = getattr(function, "__call__", None)  # noqa: B004  # an object's, to see whether it is async
        self.is_async = inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(call)

    def check_columns(self, columns: Sequence[str], what: str = "train_dataset") -> None:
        """Refuse a function that needs a column which the data set does not have.

        Raises:
            ValueError: naming the function, the column and those that there are.
        """
        missing = [
            parameter.name
            for parameter in self._parameters()
            if parameter.default is parameter.empty
            and parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.name not in (*_GIVEN, *columns)
        ]
        if missing:
            raise ValueError(
                f"reward function '{self.name}' needs the column '{missing[0]}', which {what} has not "
                f"(columns: {', '.join(['prompt', *columns])})"
            )

    def _parameters(self) -> list[inspect.Parameter]:
        try:
            return list(inspect.signature(self.function).parameters.values())
        except (TypeError, ValueError):  # some built-in functions have none
            return [inspect.Parameter("columns", inspect.Parameter.VAR_KEYWORD)]

    def _arguments(
        self, prompts: list[Prompt], completion_ids: list[list[int]], texts: list[str], state: Any
    ) -> dict[str, Any]:
        completions = [
            [{"role": "assistant", "content": text}] if prompt.is_conversation else text
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        shared = set.intersection(*(set(prompt.columns) for prompt in prompts))
        given = {name: [prompt.columns[name] for prompt in prompts] for name in sorted(shared)}
        given |= {
            "prompts": [prompt.content for prompt in prompts],
            "completions": completions,
            "completion_ids": completion_ids,
            "trainer_state": state,
        }
        parameters = self._parameters()
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return given
        return {parameter.name: given[parameter.name] for parameter in parameters if parameter.name in given}

    def score(
        self,
        prompts: list[Prompt],
        completion_ids: list[list[int]],
        ended: list[bool],
        texts: list[str],
        state: Any = None,
    ) -> Tensor:
        """Raw scores (B).

        Raises:
            ValueError: if the function raises, or does not return one finite number a completion.
        """
        try:
            scores = self.function(**self._arguments(prompts, completion_ids, texts, state))
            if inspect.isawaitable(scores):
                with ThreadPoolExecutor(1) as thread:  # a notebook's thread has a running event loop already
                    scores = thread.submit(asyncio.run, _wait_for(scores)).result()
        except Exception as error:
            raise self._named(error) from error
        return self._checked(scores, len(prompts))

    async def score_async(
        self, prompts: list[Prompt], completion_ids: list[list[int]], texts: list[str], state: Any = None
    ) -> Tensor:
        """`score` of an async function, for the event loop that runs several."""
        try:
            scores = await self.function(**self._arguments(prompts, completion_ids, texts, state))
        except Exception as error:
            raise self._named(error) from error
        return self._checked(scores, len(prompts))

    def _named(self, error: Exception) -> ValueError:
        return ValueError(f"reward function '{self.name}' raised {type(error).__name__}: {error}")

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


Reward = CallableReward | ModelReward


async def _wait_for(awaitable: Any) -> Any:
    return await awaitable


def score_all(
    rewards: list[Reward],
    prompts: list[Prompt],
    completion_ids: list[list[int]],
    ended: list[bool],
    texts: list[str],
    state: Any = None,
) -> list[Tensor]:
    """Each reward's raw scores (B). Async functions wait together, while the others compute.

    Raises:
        ValueError: if a reward fails, naming it.
    """
    waiting = [reward for reward in rewards if isinstance(reward, CallableReward) and reward.is_async]

    async def gather() -> list[Tensor]:
        return await asyncio.gather(*(reward.score_async(prompts, completion_ids, texts, state) for reward in waiting))

    scores: dict[int, Tensor] = {}
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(asyncio.run, gather()) if waiting else None
        for number, reward in enumerate(rewards):
            if reward not in waiting:
                scores[number] = reward.score(prompts, completion_ids, ended, texts, state)
        awaited = iter(future.result() if future is not None else ())
    return [scores[number] if number in scores else next(awaited) for number in range(len(rewards))]


def load_rewards(
    sources: Any, weights: list[float] | None, tokenizer: Any, batch_size: int, tokenizers: Any = None
) -> list[Reward]:
    """`load_reward` of one source or of each of a list; `tokenizers` is one for each, or `None` for its own.

    Raises:
        ValueError: if there is none, or not one of `weights` or `tokenizers` for each.
    """
    sources = list(sources) if isinstance(sources, list | tuple) else [sources]
    if not sources:
        raise ValueError("no reward: give a function, a reward model or its folder")
    if weights is not None and len(weights) != len(sources):
        raise ValueError(f"'reward_weights' has {len(weights)} numbers for {len(sources)} rewards")
    if not isinstance(tokenizers, list | tuple):
        tokenizers = [tokenizers] * len(sources)
    if len(tokenizers) != len(sources):
        raise ValueError(f"'reward_processing_classes' has {len(tokenizers)} tokenizers for {len(sources)} rewards")
    return [load_reward(source, tokenizer, batch_size, own) for source, own in zip(sources, tokenizers, strict=True)]


def load_reward(reward: Any, tokenizer: Any, batch_size: int, own_tokenizer: Any = None) -> Reward:
    """A reward from a callable, a folder (or Hub id) of a sequence classifier, or the classifier itself.

    Raises:
        ValueError: if it is neither, or if the classifier and its tokenizer do not fit each other.
    """
    if isinstance(reward, torch.nn.Module | str | Path):
        return load_model_reward(reward, tokenizer, batch_size, own_tokenizer)
    if callable(reward):
        return CallableReward(reward)
    raise ValueError(f"a reward is {type(reward).__name__}, expected a function, a reward model, or its folder")
