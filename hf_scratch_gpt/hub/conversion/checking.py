"""Proof that two models are one: bits of their tensors, logits, greedy continuations."""

import dataclasses
from typing import Any

from hf_scratch_gpt.hub.conversion.weights import same_bits

# Different kernels add in a different order: of fp32's 24 bits this leaves about 17, of the largest logit if above 1.
TOLERANCE = 1e-5
GREEDY_TOKENS = 64
_ROWS, _COLUMNS, _TEXT_TOKENS, _PROMPT_TOKENS, _LONGEST = 2, 64, 128, 16, 1024

# Many scripts; composed and decomposed letters; joined, coloured and flag emoji; runs of white space; digits; what
# looks like control tokens; rare planes and marks without width.
PROBE_TEXT = """\
The quick brown fox doesn't jump; it's 1234567 steps, 3.14 metres & 50% of $9,999.99 -- isn't it? WE'LL SEE!
def f(x: int) -> str:\n\treturn f"{x!r}"  # tabs\tand    spaces   \n\n\n  \r\n if (a != b) { c[0] += 0x1F; }
naïve café Ångström coöperate Straße ŒUVRE İstanbul ﬁn — cafe\u0301 A\u030angstro\u0308m nai\u0308ve “quoted” …
Привет, мир! Съешь же ещё этих булок. Ελληνικά: Καλημέρα κόσμε. Հայերեն ქართული
你好，世界！繁體中文。日本語のテキスト、カタカナと漢字。안녕하세요 세계. ภาษาไทยไม่มีช่องว่าง Tiếng Việt
مرحبا بالعالم ١٢٣ שלום עולם हिन्दी क्षत्रिय ১২৩ தமிழ் አማርኛ ᐃᓄᒃᑎᑐᑦ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈𐌰 ½ ² Ⅷ
🙂 👩‍👩‍👧‍👦 👍🏽 🏳️‍🌈 🇺🇦🇯🇵 ☃️ 🤷🏾‍♀️ zero\u200bwidth\u200djoin \ufeff\u00a0\u3000\u2028 \ue000 \ufffd \x00\x07
<|endoftext|> <|im_start|>user\nhi<|im_end|> <s> </s> [INST] <unk> <|begin_of_text|> <tool_call>{"a": 1}</tool_call>
"""


@dataclasses.dataclass(frozen=True)
class Probe:
    """Inputs on which two models are compared.

    Args:
        random_ids: Token ids, (rows, columns).
        text_ids: Token ids of real text, (1, tokens), or `None` without a tokenizer.
        prompt: What is continued, (1, tokens).
        greedy_tokens (`int`): By how many tokens.
    """

    random_ids: Any
    text_ids: Any
    prompt: Any
    greedy_tokens: int

    def described(self) -> str:
        """The inputs in words."""
        rows, columns = self.random_ids.shape
        text = "" if self.text_ids is None else f" and {self.text_ids.shape[1]} tokens of text"
        return f"{rows} x {columns} random token ids{text}, in float32"


def probe_of(config: Any, tokenizer: Any) -> Probe:
    """Inputs for a model with this ScratchGPTConfig: longer than its attention window where it has one."""
    import torch

    context = config.max_position_embeddings
    slides = "sliding_attention" in config.layer_types
    columns = min(context, max(_COLUMNS, min(2 * config.sliding_window, _LONGEST)) if slides else _COLUMNS)
    generator = torch.Generator().manual_seed(0)
    random_ids = torch.randint(config.vocab_size, (_ROWS, columns), generator=generator)
    text_ids = None
    if tokenizer is not None:
        text_ids = torch.tensor([tokenizer(PROBE_TEXT)["input_ids"][: min(context, _TEXT_TOKENS)]])
    # The last of the continuation's tokens needs no position of its own.
    length = max(1, min(_PROMPT_TOKENS, context + 1 - GREEDY_TOKENS))
    prompt = (random_ids[:1] if text_ids is None else text_ids)[:, :length]
    return Probe(random_ids, text_ids, prompt, min(GREEDY_TOKENS, context + 1 - prompt.shape[1]))


@dataclasses.dataclass(frozen=True)
class Observed:
    """What a model computes from a probe.

    Args:
        logits (`list`): In float32, (rows, tokens, vocab_size), for the random ids and for the text if there is any.
        greedy (`list[int]`): The likeliest tokens, one after the other.
        leads (`list[float]`): By how much each was likelier than the next, in logits.
    """

    logits: list[Any]
    greedy: list[int]
    leads: list[float]


def observe(model: Any, probe: Probe) -> Observed:
    """Run the probe through a model in float32; its weights are widened for that and narrowed again, both exact."""
    import torch

    parameters = list(model.parameters())
    dtypes = [parameter.dtype for parameter in parameters]
    try:
        for parameter in parameters:
            parameter.data = parameter.data.float()
        with torch.no_grad():
            inputs = [probe.random_ids] if probe.text_ids is None else [probe.random_ids, probe.text_ids]
            logits = [model(ids, use_cache=False).logits.float() for ids in inputs]
            greedy, leads = _continue(model, probe.prompt, probe.greedy_tokens)
    finally:
        for parameter, dtype in zip(parameters, dtypes, strict=True):
            parameter.data = parameter.data.to(dtype)
    return Observed(logits, greedy, leads)


def _continue(model: Any, prompt: Any, count: int) -> tuple[list[int], list[float]]:
    """Greedy decoding with the cache, and without any of `generate`'s settings, which a checkpoint may bring."""
    from hf_scratch_gpt.model.cache_name import cache_argument, cache_of

    ids, cache, argument = prompt, None, cache_argument(model)
    greedy: list[int] = []
    leads: list[float] = []
    for _ in range(count):
        output = model(ids, use_cache=True, **{argument: cache})
        best = output.logits[0, -1].float().topk(2)
        greedy.append(int(best.indices[0]))
        leads.append(float(best.values[0] - best.values[1]))
        ids, cache = best.indices[:1][None], cache_of(output)
    return greedy, leads


def compare_models(expected: Observed, actual: Observed, probe: Probe, title: str) -> dict[str, Any]:
    """Figures that tell how equal two models are.

    Args:
        expected: What the source computes.
        actual: What its copy computes from the same probe.
        probe: Both models' input.
        title (`str`): What a message calls the copy.

    Raises:
        ValueError: if logits differ by more than rounding, or greedy continuations by more than a tie.
    """
    pairs = list(zip(expected.logits, actual.logits, strict=True))
    if any(first.shape != second.shape for first, second in pairs):
        raise ValueError(f"the {title} model's logits have another shape than the source's")
    difference = max((first - second).abs().max().item() for first, second in pairs)
    limit = TOLERANCE * max(1.0, *(first.abs().max().item() for first, _ in pairs))
    if not difference <= limit:
        raise ValueError(
            f"the {title} model's logits differ from the source's by up to {difference:.2g}, where rounding explains "
            f"{limit:.2g}; nothing was written"
        )
    for index, (first, second) in enumerate(zip(expected.greedy, actual.greedy, strict=True)):
        if first != second and expected.leads[index] > 2 * limit:
            raise ValueError(
                f"the {title} model's greedy continuation differs from the source's in token {index + 1} of "
                f"{probe.greedy_tokens}; nothing was written"
            )
        if first != second:  # a tie, after which the texts differ
            break
    return {
        "largest_logit_difference": difference,
        "checked_with": probe.described(),
        "greedy_continuation": f"{probe.greedy_tokens} tokens, equal",
    }


def compare_tensors(expected: dict[str, Any], actual: dict[str, Any]) -> int:
    """How many tensors there are, all of them equal to the bit.

    Raises:
        ValueError: naming one that is missing, new or different.
    """
    for name in expected.keys() | actual.keys():
        if name not in actual or name not in expected:
            raise ValueError(f"the tensor '{name}' is in only one of source and copy; nothing was written")
        if not same_bits(expected[name], actual[name]):
            raise ValueError(f"the tensor '{name}' is not the same in source and copy; nothing was written")
    return len(expected)


def describe(figures: dict[str, Any]) -> list[str]:
    """What was measured, a line each."""
    return [
        f"  {name.replace('_', ' ')}: {f'{value:.2g}' if isinstance(value, float) else value}"
        for name, value in figures.items()
    ]
