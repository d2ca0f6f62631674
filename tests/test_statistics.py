"""Figures of a model other than its loss."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

import cleangpt  # noqa: F401 (registers NanoGPT and NanoLlama)
from cleangpt.models.statistics import flops_per_token

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
}
SHAPE |= {"intermediate_size": 48, "max_position_embeddings": 16, "head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MODELS = {
    "nanollama": SHAPE,
    "qwen3": SHAPE,
    "qwen3_moe": SHAPE | EXPERTS | {"num_experts": 8},
    "mixtral": SHAPE | {"num_experts_per_tok": 2, "num_local_experts": 8},
}


@pytest.mark.parametrize("model_type", MODELS)
def test_only_active_experts_count(model_type):
    """What torch counts in a step on one row of full length, whose attention it counts in eager matrix products."""
    config = AutoConfig.for_model(model_type, **MODELS[model_type], tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    ids = torch.arange(16)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False).logits.sum().backward()
    assert flops_per_token(model) * 16 == pytest.approx(counter.get_total_flops(), rel=0.02)
