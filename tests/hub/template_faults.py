"""Faults planted in a good chat template or its tokenizer, each with the one check that must find it."""

END = "{{ '<|im_end|>' }}\n{%- endgeneration -%}"
CALLS = "{%- for tool_call in message.tool_calls or [] -%}"
OTHERS = "{{ '<|im_start|>' + message.role + '\\n' + text_of(message) + '<|im_end|>\\n' }}"


def change(tokenizer, old, new):
    """Replace a part of the template, which must be there once."""
    assert tokenizer.chat_template.count(old) == 1, f"the template no longer has {old!r} once: plant this fault anew"
    tokenizer.chat_template = tokenizer.chat_template.replace(old, new)


def pad_is_end(tokenizer):
    tokenizer.pad_token = tokenizer.eos_token


def end_outside_mask(tokenizer):
    change(tokenizer, END, "{%- endgeneration -%}\n{{ '<|im_end|>' }}")


def no_end_token(tokenizer):
    change(tokenizer, END, "{%- endgeneration -%}")


def another_prompt(tokenizer):
    old = "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant"
    change(tokenizer, old, old + ":")


def two_beginnings(tokenizer):
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.chat_template = "{{ bos_token + bos_token }}" + tokenizer.chat_template


def user_unheard(tokenizer):
    change(
        tokenizer, OTHERS, OTHERS.replace("text_of(message)", "(text_of(message) if message.role != 'user' else '')")
    )


def system_unheard(tokenizer):
    change(
        tokenizer, OTHERS, OTHERS.replace("text_of(message)", "(text_of(message) if message.role != 'system' else '')")
    )


def earlier_answers_without_end(tokenizer):
    change(tokenizer, END, "{{ '<|im_end|>' if loop.last else '' }}\n{%- endgeneration -%}")


def earlier_answers_shortened(tokenizer):
    old = "{%- generation -%}\n{{ text_of(message) }}"
    change(tokenizer, old, "{%- generation -%}\n{{ text_of(message) if loop.last else text_of(message)[:12] }}")


def only_the_last_answer_trained(tokenizer):
    start = "{{ '<|im_start|>assistant\\n' }}\n{%- generation -%}"
    untrained = (
        "{{ '<|im_start|>assistant\\n' }}\n{%- if not loop.last -%}{{ text_of(message) + '<|im_end|>' }}{%- else -%}"
    )
    change(tokenizer, start, untrained + "\n{%- generation -%}")
    change(tokenizer, "{%- endgeneration -%}", "{%- endgeneration -%}{%- endif -%}")


def calls_untrained(tokenizer):
    change(tokenizer, CALLS, "{%- endgeneration -%}" + CALLS)
    change(tokenizer, "{{ '<|im_end|>' }}\n{%- endgeneration", "{%- generation -%}{{ '<|im_end|>' }}{%- endgeneration")


def user_trained(tokenizer):
    change(
        tokenizer,
        OTHERS,
        "{{ '<|im_start|>' + message.role + '\\n' }}{%- generation -%}{{ text_of(message) }}{%- endgeneration -%}"
        "{{ '<|im_end|>\\n' }}",
    )


def results_unheard(tokenizer):
    change(tokenizer, OTHERS, "{%- if message.role != 'tool' -%}" + OTHERS + "{%- endif -%}")


def arguments_unheard(tokenizer):
    change(tokenizer, "(call.arguments if call.arguments is string else call.arguments | tojson)", "'{}'")


def functions_unheard(tokenizer):
    change(tokenizer, "{{ (tool.function if tool.function else tool) | tojson + '\\n' }}", "")


def no_marks(tokenizer):
    change(tokenizer, "{%- generation -%}", "")
    change(tokenizer, "{%- endgeneration -%}", "")


FAULTS = {
    pad_is_end: "special-tokens",
    end_outside_mask: "chat-trained-mask",
    no_end_token: "chat-end-token",
    another_prompt: "chat-generation-prompt",
    two_beginnings: "chat-bos",
    user_unheard: "chat-roles",
    system_unheard: "chat-roles",
    earlier_answers_without_end: "chat-prefix-stable",
    only_the_last_answer_trained: "chat-every-turn",
    calls_untrained: "chat-every-turn",
    user_trained: "chat-user-untrained",
    results_unheard: "chat-tools",
    arguments_unheard: "chat-tools",
    functions_unheard: "chat-tools",
    no_marks: "chat-mask-not-empty",
}
