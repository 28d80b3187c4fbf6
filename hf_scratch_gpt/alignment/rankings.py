"""Rankings of K answers to one prompt: their rows, their batches, and the loss over all pairs of a prompt.

A labeller who ranks K answers says something of K (K - 1) / 2 pairs. Ouyang et al. 2022
(https://huggingface.co/papers/2203.02155, section 3.5) train on all of them in one batch element: K forward passes
instead of K (K - 1), and no overfitting by meeting an answer K - 1 times in an epoch. The loss of a prompt is the mean
over its pairs, so that each prompt weighs the same whatever its K. Two answers are K = 2: TRL's own loss.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from trl import RewardTrainer

from hf_scratch_gpt.finetuning.scoring import pad_rows
from hf_scratch_gpt.finetuning.trainers import LengthGrouping
from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation


def ranking_loss(
    rewards: Tensor, better: Tensor, worse: Tensor, weights: Tensor, margins: Tensor | None, centering: float | None
) -> Tensor:
    """The weighted sum over pairs of -log sigmoid(r_better - r_worse - margin) + centering (r_better + r_worse)².

    Args:
        rewards (`Tensor`): (answers)
        better (`Tensor`), worse (`Tensor`): (pairs) indices into `rewards`.
        weights (`Tensor`): (pairs) 1 / (pairs of its prompt x prompts): they sum to 1.
        margins (`Tensor`, *optional*): (pairs) How much better the better one should score.
        centering (`float`, *optional*): Weight of the squared sum, which the ranking leaves free
            (https://huggingface.co/papers/2312.09244).
    """
    gaps = rewards[better] - rewards[worse]
    loss = -(weights * logsigmoid(gaps if margins is None else gaps - margins)).sum()
    if centering is not None:
        loss = loss + centering * (weights * (rewards[better] + rewards[worse]) ** 2).sum()
    return loss


def ranked_pairs(ranks: Sequence[float], completions: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Indices of the better and of the worse answer of each pair; a lower rank is better.

    Ties prefer nothing, and two equal answers cannot differ in reward: neither makes a pair.
    """
    better, worse = [], []
    for first, second in combinations(range(len(ranks)), 2):
        if ranks[first] == ranks[second] or completions[first] == completions[second]:
            continue
        winner, loser = (first, second) if ranks[first] < ranks[second] else (second, first)
        better.append(winner)
        worse.append(loser)
    return better, worse


def _numbers(row: dict, column: str, count: int) -> list[float]:
    values = row.get(column)
    if not isinstance(values, list) or len(values) != count:
        found = f"{len(values)} entries" if isinstance(values, list) else type(values).__name__
        raise ValueError(f"'{column}' holds {found}, expected a number for each of the {count} completions")
    for number, value in enumerate(values, start=1):
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"entry {number} of '{column}' is {value!r}, expected a finite number")
    return [float(value) for value in values]


def ranking_encoder(tokenizer: Any, margin_scale: float = 0.0) -> Callable[[dict], dict]:
    """Row with `prompt`, `completions` and `ranks` -> `completion_ids` (whole conversations), `better`, `worse`.

    Also `length`, that of the longest, and with a `margin_scale` other than 0 `margins`: so many times the difference
    of the ranks.
    """

    def encode(row: dict) -> dict:
        completions = row.get("completions")
        if not isinstance(completions, list) or len(completions) < 2:
            raise ValueError("'completions' holds no list of at least two answers")
        ranks = _numbers(row, "ranks", len(completions))
        tools = row.get("tools")
        ids = [
            list(encode_conversation(tokenizer, row["prompt"] + each, tools=tools)["input_ids"])
            for each in completions
        ]
        better, worse = ranked_pairs(ranks, ids)
        if not better:
            raise ValueError("no completion is ranked above a different one")
        encoded = {
            "completion_ids": ids,
            "ranks": ranks,
            "better": better,
            "worse": worse,
            "length": max(map(len, ids)),
        }
        if margin_scale:
            pairs = zip(better, worse, strict=True)
            encoded["margins"] = [margin_scale * (ranks[loser] - ranks[winner]) for winner, loser in pairs]
        return encoded

    return encode


@dataclasses.dataclass
class RankingCollator:
    """Prompts with their answers as one batch: `input_ids` and `attention_mask` (answers x tokens) and the pairs.

    `better` and `worse` (pairs) index the batch's answers; `weights` (pairs) are those of `ranking_loss`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [row for example in examples for row in example["completion_ids"]]
        better, worse, weights, start = [], [], [], 0
        for example in examples:
            better += [start + index for index in example["better"]]
            worse += [start + index for index in example["worse"]]
            weights += [1 / (len(example["better"]) * len(examples))] * len(example["better"])
            start += len(example["completion_ids"])
        batch = {
            "input_ids": pad_rows(rows, self.pad_token_id),
            "attention_mask": pad_rows([[1] * len(row) for row in rows], 0),
            "better": torch.tensor(better),
            "worse": torch.tensor(worse),
            "weights": torch.tensor(weights),
        }
        if "margins" in examples[0]:
            batch["margins"] = torch.tensor([margin for example in examples for margin in example["margins"]])
        unit = self.pad_to_multiple_of or 1
        missing = -batch["input_ids"].shape[1] % unit
        for name, value in (("input_ids", self.pad_token_id), ("attention_mask", 0)):
            batch[name] = torch.nn.functional.pad(batch[name], (0, missing), value=value)
        return batch


class RankingRewardTrainer(LengthGrouping, RewardTrainer):
    """TRL's `RewardTrainer` on rankings that `ranking_encoder` made, by `ranking_loss`; it logs the same measures."""

    def __init__(self, *args: Any, pad_token_id: int, train_dataset: Any, **kwargs: Any):
        self.example_lengths = list(train_dataset["length"])
        multiple = getattr(kwargs["args"], "pad_to_multiple_of", None)
        collator = RankingCollator(pad_token_id, multiple)
        super().__init__(*args, train_dataset=train_dataset, data_collator=collator, **kwargs)

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        return dataset

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = ["completion_ids", "better", "worse", "margins"]

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean over the batch's prompts of the mean loss of their pairs."""
        mode = "train" if self.model.training else "eval"
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        rewards = outputs.logits.squeeze(-1).float()
        pairs = inputs["better"], inputs["worse"], inputs["weights"]
        loss = ranking_loss(rewards, *pairs, inputs.get("margins"), self.args.center_rewards_coefficient)
        self._note(mode, rewards.detach(), *pairs, inputs["attention_mask"])
        return (loss, outputs) if return_outputs else loss

    def _note(
        self, mode: str, rewards: Tensor, better: Tensor, worse: Tensor, weights: Tensor, attention_mask: Tensor
    ) -> None:
        if mode == "train":
            self._total_train_tokens += self.accelerator.gather_for_metrics(attention_mask.sum()).sum().item()
        gaps = rewards[better] - rewards[worse]
        measures = {
            "min_reward": rewards.min(),
            "mean_reward": rewards.mean(),
            "max_reward": rewards.max(),
            "accuracy": (weights * (gaps > 0)).sum(),
            "margin": (weights * gaps).sum(),
        }
        gathered = self.accelerator.gather(torch.stack(list(measures.values()))[None])
        for column, name in enumerate(measures):
            reduce = {"min_reward": torch.min, "max_reward": torch.max}.get(name, torch.mean)
            self._metrics[mode][name].append(reduce(gathered[:, column]).item())
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
