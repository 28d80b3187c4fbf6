"""Sequence classifiers as rewards, each read as it was trained: with its own tokenizer and chat template."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hf_scratch_gpt.alignment.ppo.prompts import Prompt, context_length, encode_prompt, template_tail
from hf_scratch_gpt.evaluation.rewards import reward_scale_of
from hf_scratch_gpt.runs.loading import check_tokens_fit, check_whole, loading


class ModelReward:
    """A sequence classifier with one label as a reward, normalised by the statistics that its config carries.

    `reward_mean` and `reward_std` in its config.json are those of its scores on reference answers (0 and 1 if absent).

    Args:
        tokenizer: The policy's.
        own_tokenizer (*optional*): The reward model's. Where the two give other ids, another end token or another
            chat template, prompt and response are rendered and encoded anew, from their messages or text.

    Raises:
        ValueError: if it has not one label, its statistics are unusable, or its tokenizer does not fit it.
    """

    def __init__(
        self, model: torch.nn.Module, tokenizer: Any, batch_size: int, source: str, own_tokenizer: Any = None
    ):
        self.model, self.batch_size = model.eval().requires_grad_(False), batch_size
        self._policy_tokenizer = tokenizer
        self.tokenizer = tokenizer if own_tokenizer is None else own_tokenizer
        self.source, self.name = source, Path(source).name
        self.reads_ids = tokenizers_agree(tokenizer, self.tokenizer)
        config: Any = model.config
        check_one_label(config, source)
        self.scale = reward_scale_of(config, source)
        if self.tokenizer.eos_token_id is None:
            raise ValueError(f"reward model {source}: its tokenizer has no end token (eos_token) to end a response by")
        self._pad_id = _set_pad(config.get_text_config(), self.tokenizer)
        self._tail = template_tail(self.tokenizer) if self.tokenizer.chat_template else []

    def check_prompts(self, prompts: list[Prompt]) -> None:
        """Refuse conversations where its own tokenizer has no chat template to render them.

        Raises:
            ValueError: naming the reward model.
        """
        if any(prompt.is_conversation for prompt in prompts) and not self.tokenizer.chat_template:
            raise ValueError(
                f"reward model {self.source}: the prompts are conversations, but its tokenizer has no chat template; "
                "give it the one that it was trained with"
            )

    def score(
        self,
        prompts: list[Prompt],
        completion_ids: list[list[int]],
        ended: list[bool],
        texts: list[str],
        state: Any = None,
    ) -> Tensor:
        """Raw scores (B), read at the last token of each conversation, encoded as in the reward model's training."""
        sequences = [
            self._from_ids(prompt, ids, has_ended) if self.reads_ids else self._from_text(prompt, ids, text, has_ended)
            for prompt, ids, has_ended, text in zip(prompts, completion_ids, ended, texts, strict=True)
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

    def _from_ids(self, prompt: Prompt, ids: list[int], has_ended: bool) -> list[int]:
        """Any end token counts as the tokenizer's own, followed by what the chat template writes after it."""
        if not has_ended:
            return prompt.input_ids + ids
        tail = self._tail if prompt.is_conversation else []
        return [*prompt.input_ids, *ids[:-1], self.tokenizer.eos_token_id, *tail]

    def _from_text(self, prompt: Prompt, completion_ids: list[int], text: str, has_ended: bool) -> list[int]:
        """The same in the reward model's own ids; a response without end stays without one."""
        from hf_scratch_gpt.model.tokenization_scratch_gpt import encode_conversation

        end = self.tokenizer.eos_token_id
        if isinstance(prompt.content, str):
            written = completion_ids[:-1] if has_ended else completion_ids
            continuation = self._continuation(prompt.input_ids, written, text)
            return encode_prompt(self.tokenizer, prompt.content + continuation) + [end] * has_ended
        messages = [*prompt.content, {"role": "assistant", "content": text}]
        ids = list(encode_conversation(self.tokenizer, messages)["input_ids"])
        last = max((place for place, number in enumerate(ids) if number == end), default=None)
        if last is None:  # a template without end tokens: one is appended, as TRL does in training
            return ids + [end] * has_ended
        return ids if has_ended else ids[:last]

    def _continuation(self, prompt_ids: list[int], ids: list[int], text: str) -> str:
        """The completion as it follows its prompt: decoded alone, it would lose a space at its beginning."""
        begin, whole = (
            self._policy_tokenizer.decode(part, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for part in (prompt_ids, prompt_ids + ids)
        )
        return whole[len(begin) :] if whole.startswith(begin) else text

    @torch.no_grad()
    def _score_batch(self, sequences: list[list[int]]) -> Tensor:
        # Padding on the right suits decoders and encoders alike, and leaves positions to the model.
        longest = max(map(len, sequences))
        ids = torch.full((len(sequences), longest), self._pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence, dtype=torch.long)
            mask[row, : len(sequence)] = 1
        device = next(self.model.parameters()).device
        with torch.autocast(device.type, enabled=False):  # its mean and deviation were measured in fp32
            logits = self.model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
        return logits[:, 0].float().cpu()

    def normalise(self, scores: Tensor) -> Tensor:
        """(score − mean) / deviation of the reference answers."""
        return self.scale.normalise(scores)


def _set_pad(config: Any, tokenizer: Any) -> int:
    """The id to pad with: the config's own, which its classifier looks past, or else the tokenizer's."""
    if config.pad_token_id is None:
        pad = tokenizer.pad_token_id
        config.pad_token_id = tokenizer.eos_token_id if pad is None else pad
    return config.pad_token_id


def tokenizers_agree(tokenizer: Any, other: Any) -> bool:
    """Whether both give the same ids to the same conversation: vocabulary, end token and chat template."""
    return other is tokenizer or (
        tokenizer.get_vocab() == other.get_vocab()
        and tokenizer.eos_token_id == other.eos_token_id
        and tokenizer.chat_template == other.chat_template
    )


def check_one_label(config: Any, source: str) -> None:
    """Refuse a classifier that does not give one score.

    Raises:
        ValueError: naming it and its number of labels.
    """
    if config.num_labels != 1:
        raise ValueError(f"reward model {source}: has {config.num_labels} labels, expected 1 (num_labels=1)")


def load_model_reward(reward: Any, tokenizer: Any, batch_size: int, own_tokenizer: Any = None) -> ModelReward:
    """A [`ModelReward`] from a folder, a Hub id, or a model.

    A model object without `own_tokenizer` is taken to share the policy's, unless its vocabulary is too small for it.

    Raises:
        ValueError: if model and tokenizer do not fit each other.
    """
    if isinstance(reward, torch.nn.Module):
        name = str(getattr(reward.config, "name_or_path", "") or type(reward).__name__)
        if own_tokenizer is None:
            _check_vocabulary(reward, tokenizer, name)
        else:
            check_tokens_fit(f"reward model {name}", reward, own_tokenizer)
        return ModelReward(reward, tokenizer, batch_size, name, own_tokenizer)
    model, its_tokenizer = _load_classifier(str(reward), own_tokenizer)
    return ModelReward(model, tokenizer, batch_size, str(reward), its_tokenizer)


def _check_vocabulary(model: Any, tokenizer: Any, name: str) -> None:
    size: int = model.config.get_text_config().vocab_size
    largest = max(tokenizer.get_vocab().values())
    if size <= largest:
        raise ValueError(
            f"reward model {name}: its vocabulary has {size} tokens, the policy's tokenizer {largest + 1}; give its "
            "own tokenizer as 'reward_processing_classes', or its folder"
        )


def _load_classifier(folder: str, own_tokenizer: Any) -> tuple[torch.nn.Module, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    import hf_scratch_gpt.model  # noqa: F401  # registers our classes with the Auto classes

    if own_tokenizer is None:
        with loading(folder, "tokenizer"):
            own_tokenizer = AutoTokenizer.from_pretrained(folder)
    with loading(folder, "config"):
        check_one_label(AutoConfig.from_pretrained(folder), folder)
    with loading(folder, "model"):
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    check_whole(folder, info)
    check_tokens_fit(folder, model, own_tokenizer)
    return model, own_tokenizer
