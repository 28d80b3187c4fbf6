"""transformers' own tokenizer mixins on our tokenizer; see model_mixins.py for how to run them."""

import shutil
import tempfile
import unittest

from transformers_tests.test_tokenization_common import TokenizerTesterMixin
from transformers_tests.test_tokenizers_backend_mixin import TokenizersBackendTesterMixin

from hf_scratch_gpt.model import ScratchGPTTokenizer

TEXTS = [
    "def add(first, second):\n    return first + second\n\n",
    "The user asks and the assistant answers; the system starts, the tool ends. naïve café 你好 🙂\n",
    "This is a sentence with many plain words, and another one: wonderful, no inspiration, an example with subtokens.",
]


class TokenizerTest(TokenizersBackendTesterMixin, TokenizerTesterMixin, unittest.TestCase):
    """A tokenizer trained here stands where a built-in class's published one would."""

    tokenizer_class = rust_tokenizer_class = ScratchGPTTokenizer
    test_seq2seq = False

    @classmethod
    def setUpClass(cls):
        cls.trained = tempfile.mkdtemp()
        ScratchGPTTokenizer.train(TEXTS * 20, 600).save_pretrained(cls.trained)
        cls.from_pretrained_id = cls.trained
        TokenizerTesterMixin.setUpClass.__func__(cls)
        super().setUpClass()

    @classmethod
    def tearDownClass(cls):
        super().tearDownClass()
        shutil.rmtree(cls.trained)
