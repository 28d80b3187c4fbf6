"""A model that answers: finding it, loading it, sampling settings, and text that streams token by token."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import hf_scratch_gpt.model  # noqa: F401  registers our classes with the Auto classes
from hf_scratch_gpt.evaluation.adapters import find_base, is_adapter, load_adapter, tokenizer_source
from hf_scratch_gpt.evaluation.generation import end_token_ids, suppressed_token_ids
from hf_scratch_gpt.evaluation.mode import context_length_of, measuring
from hf_scratch_gpt.runs import read_metrics
from hf_scratch_gpt.runs.identity import METRICS
from hf_scratch_gpt.runs.loading import check_language_model, check_tokens_fit, check_whole, loading

# The stages that make a model to talk to, the most aligned first.
TALKING_STAGES = ("ppo", "dpo", "sft", "pretrain")
# An incomplete character decodes to this one.
REPLACEMENT = "\ufffd"


@dataclasses.dataclass
class Sampling:
    """How an answer is drawn.

    Args:
        temperature (`float`, *optional*, defaults to `0.7`): Divides the logits; 0 takes the likeliest token.
        top_p (`float`, *optional*, defaults to `0.95`): Keep the likeliest tokens of this total probability.
        top_k (`int`, *optional*, defaults to `0`): Keep so many of the likeliest tokens; 0 keeps all.
        max_new_tokens (`int`, *optional*, defaults to `256`): Longest answer.
    """

    temperature: float = 0.7
    top_p: float = 0.95
    top_k: int = 0
    max_new_tokens: int = 256

    def set(self, name: str, value: str | float | int) -> None:
        """Change one setting.

        Raises:
            ValueError: for an unknown name or a value out of range.
        """
        kinds = {field.name: field.type for field in dataclasses.fields(self)}
        if name not in kinds:
            raise ValueError(f"no sampling setting '{name}'; there are {', '.join(kinds)}")
        ranges = {
            "temperature": ("a number from 0", lambda number: 0 <= number < math.inf),
            "top_p": ("a number above 0 and up to 1", lambda number: 0 < number <= 1),
            "top_k": ("a whole number from 0", lambda number: number >= 0),
            "max_new_tokens": ("a whole number from 1", lambda number: number >= 1),
        }
        expected, is_in_range = ranges[name]
        try:
            number = float(value) if kinds[name] is float else int(value)
        except ValueError:
            number = math.nan
        if not is_in_range(number):
            raise ValueError(f"{name} is '{value}', expected {expected}")
        setattr(self, name, number)

    @classmethod
    def of(cls, generation_config: Any) -> "Sampling":
        """The defaults, changed by what a model's `generation_config.json` says."""
        sampling = cls()
        for field in dataclasses.fields(cls):
            value = getattr(generation_config, field.name, None)
            if value is not None:
                sampling.set(field.name, value)
        if getattr(generation_config, "do_sample", None) is False:
            sampling.temperature = 0.0
        return sampling


class TextStream(BaseStreamer):
    """Turns the tokens of `generate` into text as they come, holding back a character until it is complete.

    Args:
        tokenizer: Decodes the tokens.
        show (`Callable[[str], None]`): Called with each new piece of text; the pieces together are `text`.
        end_ids (`list[int]`): Tokens that end an answer and are no text, special or not.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None], end_ids: list[int]):
        self.tokenizer, self.show, self.end_ids = tokenizer, show, set(end_ids)
        self.token_ids: list[int] = []
        self.shown = ""
        self._prompt_is_over = False

    @property
    def text(self) -> str:
        """The text of all tokens so far."""
        kept = [token_id for token_id in self.token_ids if token_id not in self.end_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def put(self, value: torch.Tensor) -> None:
        """Take the next tokens; the first that `generate` hands over are the prompt."""
        if not self._prompt_is_over:
            self._prompt_is_over = True
            return
        self.token_ids += value.flatten().tolist()
        self._show_until(self.text.rstrip(REPLACEMENT))

    def end(self) -> None:
        """Show what was held back: nothing will complete it any more."""
        self._show_until(self.text)

    def _show_until(self, text: str) -> None:
        if text.startswith(self.shown) and len(text) > len(self.shown):
            piece, self.shown = text[len(self.shown) :], text
            self.show(piece)


class _StopWhen(StoppingCriteria):
    def __init__(self, should_stop: Callable[[], bool]):
        self.should_stop = should_stop

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.should_stop(), dtype=torch.bool, device=input_ids.device)


@dataclasses.dataclass(frozen=True)
class ChatModel:
    """A causal model with its tokenizer, ready to answer."""

    model: Any
    tokenizer: Any
    name: str

    @property
    def context_length(self) -> int | None:
        """The fewer of the model's positions and the tokenizer's limit; `None` if neither has one."""
        limits = (context_length_of(self.model), getattr(self.tokenizer, "model_max_length", None))
        known = [limit for limit in limits if isinstance(limit, int) and limit < 10**9]
        return min(known, default=None)

    def answer(
        self,
        token_ids: list[int],
        sampling: Sampling,
        room: int,
        show: Callable[[str], None] = lambda piece: None,
        should_stop: Callable[[], bool] = lambda: False,
    ) -> str:
        """Continue `token_ids` by up to `room` tokens.

        Args:
            token_ids (`list[int]`): The prompt.
            sampling (`Sampling`): How to draw; its `max_new_tokens` is for the caller, who knows the room.
            room (`int`): Most tokens to draw.
            show (`Callable`, *optional*): Called with each piece of text as it comes.
            should_stop (`Callable`, *optional*): Asked after each token; `True` ends the answer there.

        Returns:
            The answer's text without special tokens, equal to the pieces shown.
        """
        ends = end_token_ids(self.model, self.tokenizer)
        stream = TextStream(self.tokenizer, show, ends)
        choice: dict[str, Any] = {"do_sample": False}
        if sampling.temperature > 0:
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
            choice["top_k"] = sampling.top_k
        config = GenerationConfig(
            max_new_tokens=room,
            eos_token_id=ends or None,
            pad_token_id=self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else (ends or [0])[0],
            suppress_tokens=suppressed_token_ids(self.model, self.tokenizer) or None,
            **choice,
        )
        prompt = torch.tensor([token_ids], device=self.model.device)
        with measuring(self.model):
            self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                generation_config=config,
                stopping_criteria=[_StopWhen(should_stop)],
                streamer=stream,
            )
        return stream.shown


def find_model(source: str) -> tuple[str, str]:
    """The model that `source` names: a model folder, a folder of runs, or a Hub id.

    Returns:
        What to load, and a line that says what was chosen.

    Raises:
        FileNotFoundError: if there is no such folder, or no model in it.
    """
    path = Path(source)
    if not path.exists():
        if path.is_absolute() or source.startswith((".", "~")) or len(path.parts) > 2:
            raise FileNotFoundError(f"{source}: no such folder")
        return source, f"{source} from the Hub"
    if not path.is_dir():
        raise FileNotFoundError(f"{source}: expected a model folder, found a file")
    if (path / "config.json").is_file() or (path / "adapter_config.json").is_file():
        return source, source
    found = _talking_runs(path)
    if not found:
        raise FileNotFoundError(
            f"{source}: holds no model (no config.json), nor a finished run of {', '.join(reversed(TALKING_STAGES))}"
        )
    stage, folder = found[0]
    return str(folder), f"{folder} (stage {stage}, the last aligned one there)"


def _talking_runs(root: Path) -> list[tuple[str, Path]]:
    """(stage, folder) of the finished runs below `root` that one can talk to, the most aligned and newest first."""
    found = []
    for folder in root.iterdir():
        if folder.suffix == ".old" or not (folder / METRICS).is_file():
            continue
        if not (folder / "config.json").is_file() and not is_adapter(folder):
            continue
        metrics = read_metrics(folder)
        if metrics.get("stage") in TALKING_STAGES:
            found.append((str(metrics.get("finished_at", "")), metrics["stage"], folder))
    found.sort(key=lambda entry: (entry[0], entry[2].name), reverse=True)
    found.sort(key=lambda entry: TALKING_STAGES.index(entry[1]))
    return [(stage, folder) for _, stage, folder in found]


def load_chat_model(source: str, trust_remote_code: bool = False) -> ChatModel:
    """Load a causal model and its tokenizer in fp32 (in its own type on a GPU), from safetensors only.

    Raises:
        OSError: if it cannot be found or read.
        ValueError: if it is not a language model, lacks weights, needs remote code that is not allowed, or its
            tokenizer is not a fast one.
    """
    _check_is_language_model(source, trust_remote_code)
    has_gpu = torch.cuda.is_available()
    settings: dict[str, Any] = {
        "dtype": "auto" if has_gpu else torch.float32,
        "trust_remote_code": trust_remote_code,
    }
    if is_adapter(source):
        model = load_adapter(AutoModelForCausalLM, source, **settings)
    else:
        with loading(source, "model"):
            model, info = AutoModelForCausalLM.from_pretrained(
                source, use_safetensors=True, output_loading_info=True, **settings
            )
        check_whole(source, info)
    with loading(source, "tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_source(source), trust_remote_code=trust_remote_code)
    if not tokenizer.is_fast:
        raise ValueError(f"{source}: has no fast tokenizer (tokenizer.json), which safe encoding of messages needs")
    check_tokens_fit(source, model, tokenizer)
    return ChatModel(model.to("cuda" if has_gpu else "cpu").eval(), tokenizer, source)


def _check_is_language_model(source: str, trust_remote_code: bool) -> None:
    from transformers import AutoConfig

    model = find_base(source) if is_adapter(source) else source
    try:
        with loading(model, "config"):
            config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{source}: brings its own code; if you have read and trust it, add --trust_remote_code"
        ) from error
    check_language_model(source, config)
