"""Hiding tokens for the masked objective (BERT, https://arxiv.org/abs/1810.04805, section 3.1).

Of a window's ordinary tokens 15% are chosen, drawn without replacement; of these 80% are shown as the mask token, 10%
as a random ordinary token, and 10% as they are. Control tokens, the document separator among them, are never chosen
and never drawn. What is chosen is a pure function of (seed, sample number): nothing to save, exact to resume, the same
on one process as on several, and new for each epoch.
"""

from typing import Any

import numpy as np
import torch

IGNORED = -100  # what losses of torch and transformers leave out
CHOSEN_SHARE, MASKED_SHARE, RANDOM_SHARE = 0.15, 0.8, 0.1
_STREAM = 0x6D61736B  # "mask": apart from the numbers that the loader draws with the same seed


class TokenMasker:
    """Chooses and hides tokens in the ids of one tokenizer.

    Args:
        tokenizer: A fast tokenizer with a mask token.

    Raises:
        ValueError: if it has none.
    """

    def __init__(self, tokenizer: Any):
        if tokenizer.mask_token_id is None:
            raise ValueError(
                "the masked objective needs a tokenizer with a mask token, and this one has none; "
                "run the stage 'tokenizer' with mask_token: true, then 'prepare' again"
            )
        self.mask_id: int = tokenizer.mask_token_id
        added = {index for token, index in tokenizer.get_added_vocab().items() if not token.isspace()}
        self.is_ordinary = np.ones(len(tokenizer), bool)
        self.is_ordinary[sorted(added | set(tokenizer.all_special_ids))] = False
        self._ordinary_ids = np.flatnonzero(self.is_ordinary)

    def choose(self, input_ids: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """Positions to predict in a window, in random order: 15% of its ordinary tokens, at least one if it has any.

        Args:
            input_ids (`np.ndarray`): Token ids, shape (T,).
            generator (`np.random.Generator`): Drawn from.

        Returns:
            `np.ndarray`: int64 positions, shape (chosen,).
        """
        candidates = np.flatnonzero(self.is_ordinary[input_ids])
        count = min(len(candidates), max(1, round(CHOSEN_SHARE * len(candidates))))
        return generator.permutation(candidates)[:count]

    def hide(self, input_ids: np.ndarray, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """A window as the model sees it in training, and what it has to predict.

        Returns:
            `tuple`: ids and labels, int64 of shape (T,); a label is the token's id where chosen, else -100.
        """
        chosen = self.choose(input_ids, generator)
        labels = np.full(len(input_ids), IGNORED, np.int64)
        labels[chosen] = input_ids[chosen]
        fate = generator.random(len(chosen))
        shown = np.where(fate < MASKED_SHARE, self.mask_id, input_ids[chosen])
        is_random = (fate >= MASKED_SHARE) & (fate < MASKED_SHARE + RANDOM_SHARE)
        shown[is_random] = generator.choice(self._ordinary_ids, int(is_random.sum()))
        hidden = np.array(input_ids, np.int64)
        hidden[chosen] = shown
        return hidden, labels

    def hide_batch(self, input_ids: torch.Tensor, seed: int, samples: np.ndarray) -> dict[str, torch.Tensor]:
        """`hide` for each window of a batch, by its sample number.

        Args:
            input_ids (`torch.Tensor`): Token ids, shape (B, T).
            seed (`int`): The run's seed.
            samples (`np.ndarray`): The windows' numbers since the start of training, shape (B,).

        Returns:
            `dict`: `input_ids` and `labels`, int64 of shape (B, T).
        """
        rows = [
            self.hide(row, np.random.default_rng([seed, _STREAM, int(sample)]))
            for row, sample in zip(input_ids.numpy(), samples, strict=True)
        ]
        hidden, labels = (torch.from_numpy(np.stack(part)) for part in zip(*rows, strict=True))
        return {"input_ids": hidden, "labels": labels}
