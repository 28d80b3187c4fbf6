"""What a model is pretrained for: to predict the next token, or to fill in masked ones.

Each objective says which model it needs, what a batch of windows becomes, and how the model is measured on held-out
text; the loop knows no more of it than whether a batch brings `labels`.
"""

import dataclasses
import math
from typing import Any, Literal

import numpy as np
import torch

from hf_scratch_gpt.evaluation.text import bits_per_byte
from hf_scratch_gpt.pretraining.setup import Dataset

Measured = dict[str, Any]


class CausalObjective:
    """Predict each token from those before it (GPT): measured in bits per byte, which any tokenizer's model shares.

    Args:
        dataset (`Dataset`): What is trained on.
    """

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def make_batch(self, windows: dict[str, torch.Tensor], seed: int, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """The windows as they are: the model shifts them to get its targets."""
        return windows

    def measure(self, model: Any, documents: list[str], context_length: int, batch_size: int) -> Measured:
        """Bits per byte of `documents` with its interval, as plain JSON values."""
        return dataclasses.asdict(bits_per_byte(model, self.dataset.tokenizer, documents, context_length, batch_size))

    @staticmethod
    def metrics(trained: Measured, untrained: Measured) -> dict[str, Any]:
        """The figures for `metrics.json`; `None` where there was no held-out text."""
        return {
            "heldout_bits_per_byte": trained.get("mean"),
            "heldout_bits_per_byte_interval": [trained.get("low"), trained.get("high")],
            "random_init_bits_per_byte": untrained.get("mean"),
        }


class MaskedObjective:
    """Fill in masked tokens from both sides (BERT): there are no bits per byte, which need a probability of the text.

    Args:
        dataset (`Dataset`): What is trained on.

    Raises:
        ValueError: if its tokenizer has no mask token.
    """

    def __init__(self, dataset: Dataset):
        from hf_scratch_gpt.data.masking import TokenMasker
        from hf_scratch_gpt.data.shards import TokenShards
        from hf_scratch_gpt.evaluation.masked import most_frequent_token

        self.dataset = dataset
        try:
            self.masker = TokenMasker(dataset.tokenizer)
        except ValueError as error:
            raise ValueError(f"{dataset.folder}: {error}") from error
        self.baseline_token = most_frequent_token(TokenShards(dataset.folder, "train", verify=False), self.masker)

    def make_batch(self, windows: dict[str, torch.Tensor], seed: int, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """The windows with tokens hidden, and `labels` that are -100 where nothing is to be predicted."""
        return {**windows, **self.masker.hide_batch(windows["input_ids"], seed, samples)}

    def measure(self, model: Any, documents: list[str], context_length: int, batch_size: int) -> Measured:
        """Loss and accuracy on the masked tokens of `documents` with their intervals, as plain JSON values."""
        from hf_scratch_gpt.evaluation.masked import masked_tokens

        tokenizer = self.dataset.tokenizer
        return dataclasses.asdict(
            masked_tokens(model, tokenizer, documents, context_length, batch_size, self.baseline_token)
        )

    @staticmethod
    def metrics(trained: Measured, untrained: Measured) -> dict[str, Any]:
        """The figures for `metrics.json`; none where there was no held-out text."""
        if not trained:
            return {}
        loss, accuracy, baseline = (trained[name] for name in ("loss", "accuracy", "baseline_accuracy"))
        return {
            "heldout_masked_loss": loss["mean"],
            "heldout_masked_loss_interval": [loss["low"], loss["high"]],
            "heldout_masked_perplexity": math.exp(loss["mean"]),
            "heldout_masked_accuracy": accuracy["mean"],
            "heldout_masked_accuracy_interval": [accuracy["low"], accuracy["high"]],
            "unigram_masked_accuracy": baseline["mean"],
            "unigram_masked_accuracy_interval": [baseline["low"], baseline["high"]],
            "random_init_masked_loss": untrained["loss"]["mean"],
            "random_init_masked_accuracy": untrained["accuracy"]["mean"],
            "heldout_masked_tokens": trained["tokens"],
        }


def make_objective(name: Literal["causal", "masked"], dataset: Dataset) -> CausalObjective | MaskedObjective:
    """The objective of that name over a prepared folder.

    Raises:
        ValueError: if its tokenizer does not serve the objective.
    """
    return MaskedObjective(dataset) if name == "masked" else CausalObjective(dataset)
