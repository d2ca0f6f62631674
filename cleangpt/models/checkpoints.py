"""Weights in other projects' `.pt` files: nanoGPT's `ckpt.pt`, and those in `best/` of wxc971231/CleanGPT.

Each file is read twice, by ways that share nothing but the weights: as a model of ours, and as the source's own forward
pass, with which `convert.py` compares what the model computes.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from ..errors import UserError
from .build import assemble

Forward = Callable[[Tensor], Tensor]  # ids (batch, time) -> logits (batch, time, vocab) in float64
Weights = dict[str, Tensor]


def read_checkpoint(path: Path) -> tuple[PreTrainedModel, Forward]:
    """The model in a `.pt` file, and the forward pass of the project that wrote it.

    Nothing in the file is executed (`weights_only=True`).

    Raises:
        UserError: if it is neither nanoGPT's nor the first CleanGPT's, or its weights do not fit.
    """
    expected = "expected nanoGPT's ckpt.pt, or a .pt file of wxc971231/CleanGPT with the run's config.json above it"
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        is_nanogpt = "model_args" in content
        settings = content["model_args"] if is_nanogpt else _settings_of(path)
        state = content["model"] if is_nanogpt else content
        weights = {name.removeprefix("_orig_mod."): weight.float() for name, weight in state.items()}
        weights = {name: weight for name, weight in weights.items() if not name.endswith((".attn.bias", "inv_freq"))}
        if "model.embed_tokens.weight" in weights:
            model_type, shape, read = "nanollama", _llama_shape, llama_forward
        else:
            model_type, shape, read = "nanogpt", _gpt_shape, gpt_forward
        options, forward = shape(weights, settings), read(weights, settings)
    except Exception as error:  # a file can hold anything
        raise UserError((str(path), f"{expected}, got {type(error).__name__}: {error}")) from error
    return assemble(str(path), model_type, weights, **options), forward


def _settings_of(path: Path) -> dict[str, Any]:
    """The run's `config.json`: two folders above `best/x.pt` is the run, three above `interval/SEED/x.pt`."""
    places = [folder / "config.json" for folder in list(path.absolute().parents)[:3]]
    found = next((file for file in places if file.is_file()), places[1])
    return json.loads(found.read_text(encoding="utf-8"))


def _layers(weights: Weights, prefix: str) -> int:
    return len({name.removeprefix(prefix).split(".")[0] for name in weights if name.startswith(prefix)})


def _gpt_shape(weights: Weights, settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a NanoGPT: its shape from the weights, the rest from the settings of either project."""
    embedding, dropout = weights["transformer.wte.weight"], settings.get("dropout", 0.0)
    return {
        "vocab_size": len(embedding),
        "hidden_size": embedding.shape[1],
        "max_position_embeddings": len(weights["transformer.wpe.weight"]),
        "num_hidden_layers": _layers(weights, "transformer.h."),
        "num_attention_heads": settings["n_head"],
        "bias": "transformer.ln_f.bias" in weights,
        "dropout": dropout,
        "attention_dropout": settings.get("dropout_attn", dropout),
        "tie_word_embeddings": torch.equal(embedding, weights["lm_head.weight"]),
    }


def _llama_shape(weights: Weights, settings: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a NanoLlama: its shape from the weights, the rest from the settings."""
    embedding, heads = weights["model.embed_tokens.weight"], settings["n_q_head"]
    layer = "model.layers.0."
    return {
        "vocab_size": len(embedding),
        "hidden_size": embedding.shape[1],
        "intermediate_size": len(weights[f"{layer}mlp.gate_proj.weight"]),
        "max_position_embeddings": settings["n_position"],
        "num_hidden_layers": _layers(weights, "model.layers."),
        "num_attention_heads": heads,
        "num_key_value_heads": len(weights[f"{layer}self_attn.k_proj.weight"]) * heads // embedding.shape[1],
        "rms_norm_eps": settings["rms_norm_eps"],
        "attention_dropout": settings["dropout_attn"],
        "tie_word_embeddings": torch.equal(embedding, weights["lm_head.weight"]),
    }


def gpt_forward(weights: Weights, settings: dict[str, Any]) -> Forward:
    """nanoGPT's forward pass (`GPT.forward` in its `model.py`), straight from the names in its files."""
    weights = {name: weight.double() for name, weight in weights.items()}

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights.get(f"{name}.bias"), 1e-5)

    def forward(ids: Tensor) -> Tensor:
        x = weights["transformer.wte.weight"][ids] + weights["transformer.wpe.weight"][: ids.shape[1]]
        for layer in range(_layers(weights, "transformer.h.")):
            block = f"transformer.h.{layer}"
            mixed = linear(norm(x, f"{block}.ln_1"), f"{block}.attn.c_attn")  # (batch, time, 3 x width)
            q, k, v = (part.unflatten(-1, (settings["n_head"], -1)).transpose(1, 2) for part in mixed.chunk(3, -1))
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (batch, heads, time, head_dim)
            x = x + linear(attended.transpose(1, 2).flatten(2), f"{block}.attn.c_proj")
            x = x + linear(F.gelu(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc")), f"{block}.mlp.c_proj")
        return linear(norm(x, "transformer.ln_f"), "lm_head")

    return forward


def llama_forward(weights: Weights, settings: dict[str, Any]) -> Forward:
    """The first CleanGPT's Llama: transformers' own, made of the run's `config.json`."""
    width = settings["n_embed"]
    config = LlamaConfig(
        vocab_size=settings["vocab_size"],
        hidden_size=width,
        intermediate_size=(int(width * 8 / 3 / 64) + 1) * 64,
        num_hidden_layers=settings["n_layer"],
        num_attention_heads=settings["n_q_head"],
        num_key_value_heads=settings["n_kv_head"],
        max_position_embeddings=settings["n_position"],
        rms_norm_eps=settings["rms_norm_eps"],
        tie_word_embeddings=settings["weight_tying"],
    )
    model = LlamaForCausalLM(config).eval()
    model.load_state_dict(weights)
    for weight in model.parameters():  # buffers keep float32, in which Llama computes its rotary angles
        weight.data = weight.double()
    return lambda ids: model(ids).logits
