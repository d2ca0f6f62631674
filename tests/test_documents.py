"""Models in which one packed document sees another are found out when a run is built, and refused."""

import dataclasses

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

import cleangpt  # noqa: F401 (registers NanoGPT and NanoLlama)
from cleangpt import UserError, load_recipe, train
from cleangpt.models.loss import check_documents

SHAPE = {
    **dict.fromkeys(("hidden_size", "d_model", "word_embed_proj_dim", "attention_hidden_size"), 32),
    **dict.fromkeys(("vocab_size", "max_position_embeddings", "intermediate_size", "decoder_ffn_dim", "ffn_dim"), 64),
    **dict.fromkeys(("num_hidden_layers", "encoder_layers", "decoder_layers", "num_key_value_heads"), 2),
    **dict.fromkeys(("num_attention_heads", "decoder_attention_heads", "num_experts", "num_local_experts"), 4),
    **dict.fromkeys(("head_dim", "state_size"), 8),
    "moe_intermediate_size": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "num_experts_per_tok": 2,
}
LINEAR = ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
OWN = {
    "mamba2": {"num_heads": 8, "n_groups": 1, "chunk_size": 8},
    "qwen3_next": {"num_hidden_layers": 4, **dict.fromkeys(LINEAR, 8)},  # every fourth layer has attention
}
LEAK = [
    "bart",
    "biogpt",
    "bloom",
    "falcon",
    "mamba",
    "mamba2",
    "mpt",
    "openai-gpt",
    "opt",
    "qwen3_next",
    "rwkv",
    "xglm",
]
APART = ["nanogpt", "nanollama", "gpt2", "gpt_neox", "llama", "mistral", "qwen3", "qwen3_moe", "gemma2", "phi"]


def make_model(model_type: str):
    config_class = CONFIG_MAPPING[model_type]
    names = {field.name for field in dataclasses.fields(config_class)} | config_class.attribute_map.keys()
    shape = {config_class.attribute_map.get(key, key): value for key, value in SHAPE.items() if key in names}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**shape | OWN.get(model_type, {})))


@pytest.mark.parametrize("model_type", LEAK)
def test_a_leak_is_refused(model_type):
    with pytest.raises(UserError, match=r"data.packing.*see each other"):
        check_documents(make_model(model_type), 16, 2)


@pytest.mark.parametrize("model_type", APART)
def test_documents_apart_are_accepted(model_type):
    model = make_model(model_type).train()
    for length in (1, 2, 7, 64):
        check_documents(model, length, 2)
    assert model.training


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_are_tried(attention):
    model = make_model("nanollama")
    model.set_attn_implementation(attention)
    check_documents(model, 16, 2)


def test_a_run_that_would_leak_writes_nothing(tiny_text, stories_file):
    options = ["--data.path=json", f"--data.data_files={stories_file}", "--data.packing=documents"]
    options += ["--model.model_type=opt", "--model.ffn_dim=32", "--model.word_embed_proj_dim=16"]
    recipe = load_recipe(tiny_text, options)
    with pytest.raises(UserError, match=r"data.packing.*opt"):
        train(recipe)
    assert not recipe.folder.exists()
    assert train(load_recipe(tiny_text, [*options, "--data.packing=blocks"])).exists()
