"""Checks of the tokenizer: any text comes back, ids fit the model, control tokens are what they should be."""

import json
import random

from hf_scratch_gpt.hub.doctor.outcome import Checks, Finding, Skipped, all_of
from hf_scratch_gpt.hub.doctor.subject import Subject

CHECKS = Checks()
_TEXTS, _SEED = 200, 0
# First and last code point of what texts are drawn from: letters, accents, CJK, emoji, private use, and all the rest.
_RANGES = ((0x20, 0x7E), (0, 0x1F), (0xA0, 0x24F), (0x300, 0x36F), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF), (0, 0x10FFFF))


def random_texts(count: int = _TEXTS, seed: int = _SEED) -> list[str]:
    """Seeded texts of 1 to 40 characters from all of Unicode but surrogates, which no text file can hold."""
    generator = random.Random(seed)

    def character() -> str:
        while True:
            code = generator.randint(*generator.choice(_RANGES))
            if not 0xD800 <= code <= 0xDFFF:
                return chr(code)

    return ["".join(character() for _ in range(generator.randint(1, 40))) for _ in range(count)]


@CHECKS.add(
    "tokenizer-loads",
    expected="AutoTokenizer loads it without trusting any code",
    remedy="let tokenizer_config.json name PreTrainedTokenizerFast and leave out auto_map",
)
def tokenizer_loads(subject: Subject) -> Finding:
    """Whether the tokenizer loads without trusting its folder's code."""
    if subject.tokenizer_error:
        return Finding(False, subject.tokenizer_error)
    tokenizer = subject.needs_tokenizer()
    return Finding(True, f"{type(tokenizer).__name__}, {len(tokenizer)} tokens")


def _is_byte_level(tokenizer: object) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = json.loads(backend.to_str()).get("decoder") if backend is not None else None
    return '"ByteLevel"' in json.dumps(decoder)


@CHECKS.add(
    "tokenizer-round-trip",
    expected="byte-level: random Unicode comes back exactly (after its own normalizer)",
    remedy="use the whole byte alphabet, add_prefix_space=False and clean_up_tokenization_spaces=False",
)
def tokenizer_round_trip(subject: Subject) -> Finding:
    """Whether random Unicode text survives encoding and decoding."""
    tokenizer = subject.needs_tokenizer()
    texts = random_texts()
    decoded = [
        tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]
    ]
    byte_level = _is_byte_level(tokenizer)
    normalizer = tokenizer.backend_tokenizer.normalizer if byte_level else None
    expected = [normalizer.normalize_str(text) for text in texts] if normalizer else texts
    wrong = [(text, got) for text, got in zip(expected, decoded, strict=True) if text != got]
    if not byte_level:
        raise Skipped(f"not byte-level: {len(texts) - len(wrong)} of {len(texts)} random texts come back exactly")
    if wrong:
        return Finding(False, f"{len(wrong)} of {len(texts)} texts differ, such as {wrong[0][0]!a} as {wrong[0][1]!a}")
    return Finding(True, f"{len(texts)} texts equal{' after its normalizer' if normalizer else ''}")


@CHECKS.add(
    "token-ids",
    expected="every token id is below the number of embedding rows",
    remedy="call model.resize_token_embeddings(len(tokenizer)) and save both",
)
def token_ids(subject: Subject) -> Finding:
    """Whether every token's id is a row of the embedding."""
    largest = max(subject.needs_tokenizer().get_vocab().values())
    return Finding(largest < subject.vocab_size, f"largest id {largest}, {subject.vocab_size} embedding rows")


@CHECKS.add(
    "special-tokens",
    expected="an end and a pad token, which differ; each special token is one id",
    remedy="add a pad token of its own: where pad is the end token, losses and reward models never see the end",
)
def special_tokens(subject: Subject) -> Finding:
    """Whether special tokens are single ids, and padding is no end token."""
    tokenizer = subject.needs_tokenizer()
    end, pad = tokenizer.eos_token, tokenizer.pad_token
    findings = [
        Finding(end is not None, "no end token (eos_token)"),
        Finding(pad is not None, "no pad token"),
        Finding(pad is None or pad != end, f"the pad token is the end token {end!r}"),
    ]
    for token in tokenizer.all_special_tokens:
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        one = ids == [tokenizer.convert_tokens_to_ids(token)]
        findings.append(Finding(one, f"{token!r} is encoded as {ids}"))
    return all_of(*findings, Finding(True, f"{len(tokenizer.all_special_tokens)} special tokens, pad {pad!r}"))
