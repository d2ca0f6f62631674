"""transformers' own common model suite, run on our models as it runs on Llama.

It comes with transformers' source distribution, not with its wheel: `make test` downloads it once into `.venv`. Where
it is not there, these tests say so and are left out.
"""

import importlib
import sys
import types
import unittest
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, LlamaModel
from transformers.models.auto import modeling_auto

from cleangpt import (
    NanoGPTConfig,
    NanoGPTForCausalLM,
    NanoGPTModel,
    NanoLlamaConfig,
    NanoLlamaForCausalLM,
    NanoLlamaModel,
)
from cleangpt.models.nanogpt.modeling_nanogpt import NanoGPTForSequenceClassification
from cleangpt.models.nanollama.modeling_nanollama import NanoLlamaForSequenceClassification

SOURCE = Path(sys.prefix) / f"transformers-{version('transformers')}" / "tests"


def load_suite():
    """transformers' `ModelTesterMixin`; the two files it imports that the distribution lacks are stood in for."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(SOURCE)]
    sys.modules["transformers_tests"] = package
    for name, mixin in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        module = types.ModuleType(f"transformers_tests.{name}")
        setattr(module, mixin, type(mixin, (), {}))
        sys.modules[f"transformers_tests.{name.split('.')[0]}"] = types.ModuleType(name.split(".")[0])
        sys.modules[module.__name__] = module
    return importlib.import_module("transformers_tests.test_modeling_common").ModelTesterMixin


if not SOURCE.exists():
    pytest.skip("transformers' test files are not there: run make test", allow_module_level=True)

ModelTesterMixin = load_suite()

# The suite looks labels up by class name.
for prefix, kind in (("NanoGPT", "nanogpt"), ("NanoLlama", "nanollama")):
    modeling_auto.MODEL_MAPPING_NAMES[kind] = f"{prefix}Model"
    modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[kind] = f"{prefix}ForCausalLM"
    modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES[kind] = f"{prefix}ForSequenceClassification"


class Tester:
    """A tiny model and inputs for it, in the form the suite asks for."""

    batch_size, seq_length, is_training = 3, 7, True
    vocab_size, hidden_size, num_hidden_layers, num_attention_heads = 99, 32, 2, 4

    def __init__(self, config_class, **options):
        self.config_class, self.options = config_class, options

    def get_config(self):
        return self.config_class(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **self.options,
        )

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        mask = torch.ones_like(ids).tril()[:, : self.seq_length]
        return self.get_config(), {"input_ids": ids, "attention_mask": mask}


class Suite(ModelTesterMixin):
    """What the suites of all three models share."""

    test_generation_tester_mixin_inheritance = None  # asks for a file that the distribution lacks

    def setUp(self):
        self.model_tester = self.make_tester()


class NanoGPTModelTest(Suite, unittest.TestCase):
    all_model_classes = (NanoGPTModel, NanoGPTForCausalLM, NanoGPTForSequenceClassification)

    def make_tester(self):
        return Tester(NanoGPTConfig)


class NanoLlamaModelTest(Suite, unittest.TestCase):
    all_model_classes = (NanoLlamaModel, NanoLlamaForCausalLM, NanoLlamaForSequenceClassification)

    def make_tester(self):
        return Tester(NanoLlamaConfig, num_key_value_heads=2, intermediate_size=37)


@pytest.mark.soak
class LlamaModelTest(Suite, unittest.TestCase):
    """The yardstick."""

    all_model_classes = (LlamaModel, LlamaForCausalLM, LlamaForSequenceClassification)

    def make_tester(self):
        return Tester(LlamaConfig, num_key_value_heads=2, intermediate_size=37)
