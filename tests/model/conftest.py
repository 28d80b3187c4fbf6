"""Fixtures of the model package's tests."""

import pytest
from model_tiny import KINDS, make_model

from hf_scratch_gpt.model import ScratchGPTTokenizer


@pytest.fixture
def model_factory():
    return make_model


@pytest.fixture(params=list(KINDS))
def model(request):
    return make_model(request.param)


@pytest.fixture(scope="session")
def tokenizer() -> ScratchGPTTokenizer:
    texts = [
        "def add(first, second):\n    return first + second\n\n",
        "The user asks and the assistant answers; the system starts, the tool ends. naïve café 你好 🙂\n",
        "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<tool_call>{}</tool_call>\n",
    ]
    return ScratchGPTTokenizer.train(texts * 20, 400)
