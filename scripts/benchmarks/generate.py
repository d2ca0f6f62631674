"""Writing 256 tokens with 10.7M parameters: ours beside transformers' GPT-2 and nanoGPT's `generate` (`--nanogpt DIR`).

With `--model_type nanollama` beside its Llama. Weights are random and equal: transformers' are exports of
ours, and nanoGPT's are ours by name.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from cleangpt import NanoGPTConfig, NanoGPTForCausalLM, NanoLlamaConfig, NanoLlamaForCausalLM
from cleangpt.models.convert import to_native

SHAPE = {"vocab_size": 65, "hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6}
TOKENS = 256


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT, to measure beside")
    parser.add_argument("--model_type", choices=["nanogpt", "nanollama"], default="nanogpt")
    parser.add_argument("--batch_sizes", type=int, nargs="*", default=[1, 64], help="texts written at once [1 64]")


@torch.no_grad()
def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Tokens a second of each side, one figure a round."""
    torch.manual_seed(0)
    if arguments.model_type == "nanogpt":
        model = NanoGPTForCausalLM(NanoGPTConfig(max_position_embeddings=TOKENS, bias=False, **SHAPE)).eval()
    else:
        model = NanoLlamaForCausalLM(NanoLlamaConfig(max_position_embeddings=TOKENS, **SHAPE)).eval()
    native = to_native(model)
    for batch_size in arguments.batch_sizes:
        start = torch.ones(batch_size, 1, dtype=torch.long)
        sides = {f"transformers, {native.config.model_type}": writer(native, start), "ours": writer(model, start)}
        if arguments.nanogpt and arguments.model_type == "nanogpt":
            sides = {"nanoGPT": nanogpt_writer(arguments.nanogpt, model, start), **sides}
        figures = {name: [] for name in sides}
        for side in sides.values():  # what happens once, and the same for all
            side()
        for _ in range(arguments.rounds):
            for name, side in sides.items():
                started = time.perf_counter()
                if side().shape != (batch_size, TOKENS + 1):
                    raise RuntimeError(f"{name} wrote another number of tokens")
                figures[name].append(batch_size * TOKENS / (time.perf_counter() - started))
        yield f"{TOKENS} tokens, {batch_size} at once, tokens a second", figures


def writer(model, start: torch.Tensor) -> Callable[[], torch.Tensor]:
    options = {"max_new_tokens": TOKENS, "max_length": None, "eos_token_id": None, "pad_token_id": 0}
    mask = torch.ones_like(start)
    return lambda: model.generate(start, attention_mask=mask, do_sample=True, top_k=0, **options)


def nanogpt_writer(source: Path, model, start: torch.Tensor) -> Callable[[], torch.Tensor]:
    sys.path.insert(0, str(source))
    from model import GPT, GPTConfig

    names = {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_embd": "hidden_size"}
    shape = {theirs: SHAPE[ours] for theirs, ours in names.items()}
    theirs = GPT(GPTConfig(block_size=TOKENS, vocab_size=SHAPE["vocab_size"], bias=False, dropout=0.0, **shape)).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)  # it stores its causal mask too, on old torch
    return lambda: theirs.generate(start, TOKENS)
