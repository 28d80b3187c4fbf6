"""transformers' own shared mixins on five variants of our classes; not part of the plain suite.

Run it with `python tests/conformance/run.py`, which fetches the mixins first. Each class below is one variant; what a
built-in model's test file declares, this file declares for ours, and nothing more.
"""

import unittest

import torch
from transformers.models.auto import modeling_auto
from transformers_tests import test_fsdp_mixin, test_tensor_parallel_mixin
from transformers_tests.generation.test_utils import GenerationTesterMixin
from transformers_tests.test_configuration_common import ConfigTester
from transformers_tests.test_modeling_common import ModelTesterMixin
from transformers_tests.test_training_mixin import TrainingTesterMixin

from hf_scratch_gpt.model import (
    ScratchGPTConfig,
    ScratchGPTForCausalLM,
    ScratchGPTForSequenceClassification,
    ScratchGPTForTokenClassification,
    ScratchGPTModel,
)

# The mixins decide by these tables of names which labels a class takes and which classes have no loss.
modeling_auto.MODEL_MAPPING_NAMES["scratch_gpt"] = "ScratchGPTModel"
modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["scratch_gpt"] = "ScratchGPTForCausalLM"
modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES["scratch_gpt"] = "ScratchGPTForSequenceClassification"
modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES["scratch_gpt"] = "ScratchGPTForTokenClassification"
# Both run on a few model types unless they are told to run on all that have a plan.
test_tensor_parallel_mixin.TP_DISTRIBUTED_TEST_MODEL_TYPES = None
test_fsdp_mixin.FSDP_DISTRIBUTED_TEST_MODEL_TYPES = None

SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


class Tester:
    """Tiny configurations and inputs of one variant, under the names that the mixins look for."""

    base_model_class = ScratchGPTModel
    causal_lm_class = ScratchGPTForCausalLM
    batch_size, seq_length, is_training = 3, 7, True
    hidden_size, num_hidden_layers, num_attention_heads = 32, 2, 4

    def __init__(self, parent: unittest.TestCase, preset: str, fields: dict):
        self.parent, self.preset, self.fields = parent, preset, fields

    def get_config(self) -> ScratchGPTConfig:
        return ScratchGPTConfig.from_preset(self.preset, **{**SIZES, **self.fields})

    def prepare_config_and_inputs_for_common(self):
        shape = (self.batch_size, self.seq_length)
        input_ids = torch.randint(3, SIZES["vocab_size"], shape)
        return self.get_config(), {"input_ids": input_ids, "attention_mask": torch.ones(shape).tril()}


class Variant(
    ModelTesterMixin,
    GenerationTesterMixin,
    TrainingTesterMixin,
    test_tensor_parallel_mixin.TensorParallelTesterMixin,
    test_fsdp_mixin.FSDPTesterMixin,
):
    """What the five variants share."""

    all_model_classes = (
        ScratchGPTModel,
        ScratchGPTForCausalLM,
        ScratchGPTForSequenceClassification,
        ScratchGPTForTokenClassification,
    )
    # The mixin leaves this check out for models that it takes to be older than 2023, from a date that our files lack.
    test_can_init_all_missing_weights_before_2023 = True
    preset, fields = "modern-5m", {"num_key_value_heads": 2, "head_dim": 8}
    model_tester = None

    def setUp(self):
        self.model_tester = Tester(self, self.preset, self.fields)

    def test_config(self):
        fields = {"hidden_size": 36, "num_attention_heads": 6}
        ConfigTester(self, config_class=ScratchGPTConfig, **fields).run_common_tests()


class WithoutRotaryPositions:
    """The mixin scales the rotation of each configuration that has `rope_parameters`, which ours always has."""

    @unittest.skip(reason="positions are learned: there is no rotation to scale")
    def test_model_rope_scaling_from_config_0_linear(self):
        pass

    @unittest.skip(reason="positions are learned: there is no rotation to scale")
    def test_model_rope_scaling_from_config_1_dynamic(self):
        pass

    @unittest.skip(reason="positions are learned: there is no rotation to scale")
    def test_model_rope_scaling_from_config_2_yarn(self):
        pass

    @unittest.skip(reason="positions are learned: there is no rotation")
    def test_model_rope_with_partial_rotation(self):
        pass


class TiedTest(Variant, unittest.TestCase):
    """The modern preset: RMSNorm, QK-norm, rotary positions, grouped keys, tied head."""


class UntiedTest(Variant, unittest.TestCase):
    """The modern preset with a head of its own."""

    fields = {**Variant.fields, "tie_word_embeddings": False}


class LearnedPositionsTest(WithoutRotaryPositions, Variant, unittest.TestCase):
    """GPT-2: learned positions, LayerNorm, dense MLP, biases."""

    preset, fields = "gpt2-124m", {}


class PostNormTest(WithoutRotaryPositions, Variant, unittest.TestCase):
    """GPT-1: as GPT-2, with norms after the residual sums."""

    preset, fields = "gpt1", {}


class SlidingWindowTest(Variant, unittest.TestCase):
    """The modern preset with a window of 4 tokens in its second layer."""

    fields = {**Variant.fields, "sliding_window": 4, "layer_types": ["full_attention", "sliding_attention"]}
