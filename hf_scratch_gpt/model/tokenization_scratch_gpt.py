"""ScratchGPTTokenizer: byte-level BPE with a ChatML template; its encoding of user text is that of `safe_encoding`.

What is saved names transformers' own `PreTrainedTokenizerFast`, so `AutoTokenizer` loads it without this package and
without trusted code.
"""

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_scratch_gpt.model.safe_encoding import (
    EncodedConversation,
    PlainEncoder,
    encode_conversation,
    encode_text,
    encode_texts,
)

__all__ = [
    "CHAT_TEMPLATE",
    "EncodedConversation",
    "PlainEncoder",
    "ScratchGPTTokenizer",
    "encode_conversation",
    "encode_text",
    "encode_texts",
]

END_OF_TEXT, PAD, IM_START, IM_END = "<|endoftext|>", "<|pad|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, IM_START, IM_END)
# Only in tokenizers for the masked objective. It takes the space before it, as RoBERTa's does: words carry theirs.
MASK = "<|mask|>"
# Not special, so that decoding for a person or a tool-call parser keeps them.
TOOL_TOKENS = ("<tool_call>", "</tool_call>")

# Exactly the split of Qwen2, one digit at a time: other runtimes know it by that name.
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# ChatML. Tools are announced in the system message, called by the assistant as `<tool_call>{json}</tool_call>` and
# answered in the role `tool`. A message's text is a string or a list of {"type": "text", "text": ...} parts.
CHAT_TEMPLATE = """\
{%- macro text_of(message) -%}
{%- if message.content is string -%}{{ message.content }}
{%- elif message.content -%}{%- for part in message.content -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set first_is_system = messages and messages[0].role == 'system' -%}
{%- if tools -%}
{{ '<|im_start|>system\\n' }}
{%- if first_is_system -%}{{ text_of(messages[0]) + '\\n\\n' }}{%- endif -%}
{{ '# Tools\\n\\nCall a function with a JSON object {"name": ..., "arguments": {...}} between <tool_call> and \
</tool_call>. The functions:\\n' }}
{%- for tool in tools -%}{{ (tool.function if tool.function else tool) | tojson + '\\n' }}{%- endfor -%}
{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ['system', 'user', 'assistant', 'tool'] -%}
{{ raise_exception("role '" + message.role + "' is not one of system, user, assistant, tool") }}
{%- endif -%}
{%- if message.role == 'assistant' -%}
{{ '<|im_start|>assistant\\n' }}
{%- generation -%}
{{ text_of(message) }}
{%- for tool_call in message.tool_calls or [] -%}
{%- set call = tool_call.function if tool_call.function else tool_call -%}
{{ ('\\n' if text_of(message) or not loop.first else '') + '<tool_call>\\n{"name": ' + call.name | tojson }}
{{- ', "arguments": ' + (call.arguments if call.arguments is string else call.arguments | tojson) }}
{{- '}\\n</tool_call>' }}
{%- endfor -%}
{{ '<|im_end|>' }}
{%- endgeneration -%}
{{ '\\n' }}
{%- elif not (tools and loop.first and first_is_system) -%}
{{ '<|im_start|>' + message.role + '\\n' + text_of(message) + '<|im_end|>\\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}
"""

# How transformers' `parse_response` reads what the model wrote back into a message with `tool_calls`.
RESPONSE_TEMPLATE = {
    "defaults": {"role": "assistant"},
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}


# No `__init__`: with one, transformers rebuilds the pre-tokenizer on loading and drops the trained one.
class ScratchGPTTokenizer(PreTrainedTokenizerFast):
    """Byte-level BPE (https://arxiv.org/abs/1508.07909, on bytes as in GPT-2): any text round-trips exactly."""

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, mask_token: bool = False) -> "ScratchGPTTokenizer":
        """Train a tokenizer of `vocab_size` tokens, control tokens and the 256 bytes among them.

        A corpus too small for so many merges gives fewer: see `len(tokenizer)`.

        Args:
            texts (`Iterable[str]`): What to learn the merges from; read once.
            vocab_size (`int`): Tokens to make at most.
            mask_token (`bool`, *optional*, defaults to `False`): Add `<|mask|>`, after the other control tokens.

        Raises:
            ValueError: if `vocab_size` has no room for a merge, or if there is no text.
        """
        mask = [AddedToken(MASK, lstrip=True, special=True, normalized=False)] if mask_token else []
        control_tokens = [*SPECIAL_TOKENS, *TOOL_TOKENS, *mask]
        smallest = len(control_tokens) + 256
        if vocab_size <= smallest:
            raise ValueError(
                f"`vocab_size` is {vocab_size}; it must be above {smallest}: {len(control_tokens)} control tokens, "
                "256 bytes, and at least one merge"
            )
        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            min_frequency=2,
            special_tokens=control_tokens,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        backend.train_from_iterator(_non_empty(texts), trainer)
        return cls(
            tokenizer_object=_with_plain_tool_tokens(backend),
            eos_token=IM_END,
            pad_token=PAD,
            **({"mask_token": mask[0]} if mask else {}),
            extra_special_tokens=[END_OF_TEXT, IM_START],
            chat_template=CHAT_TEMPLATE,
            response_template=RESPONSE_TEMPLATE,
            clean_up_tokenization_spaces=False,
        )

    def _save_pretrained(self, save_directory, file_names, *args, **kwargs):
        """Name the plain class in the configuration just written: every environment has it."""
        config_file = Path(file_names[0])  # the template file follows
        settings = json.loads(config_file.read_text(encoding="utf-8"))
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        config_file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return super()._save_pretrained(save_directory, file_names, *args, **kwargs)


def _non_empty(texts: Iterable[str]) -> Iterable[str]:
    found = False
    for text in texts:
        found = found or bool(text)
        yield text
    if not found:
        raise ValueError("there is no text to train a tokenizer on: every document is empty")


def _with_plain_tool_tokens(backend: Tokenizer) -> Tokenizer:
    """The trainer makes all its control tokens special; the tool tokens should survive `skip_special_tokens`."""
    settings = json.loads(backend.to_str())
    for token in settings["added_tokens"]:
        token["special"] = token["content"] not in TOOL_TOKENS
    return Tokenizer.from_str(json.dumps(settings))
