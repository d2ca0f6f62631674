"""Continues a prompt and streams what a model writes.

python scripts/generate.py outputs/shakespeare/final --prompt "ROMEO:"
"""

import argparse
import sys

import torch
from transformers import TextStreamer

import cleangpt
from cleangpt.errors import exit_code
from cleangpt.models.build import load_model
from cleangpt.tokenization import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a saved folder, or a Hub id")
    parser.add_argument("--prompt", required=True, help="the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="tokens to write at most [200]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token [0.8]")
    parser.add_argument("--top_k", type=int, default=0, help="sample among the k likeliest tokens only; 0: all [0]")
    parser.add_argument("--num_samples", type=int, default=1, help="how many continuations [1]")
    parser.add_argument("--seed", type=int, default=42, help="the same seed writes the same text [42]")
    arguments = parser.parse_args()
    generate(arguments)


def generate(arguments: argparse.Namespace) -> None:
    tokenizer = load_tokenizer(arguments.model, "model")
    inputs = tokenizer(arguments.prompt, return_tensors="pt", add_special_tokens=False)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise cleangpt.UserError(("--prompt", "expected some text"))
    if tokenizer.unk_token_id is not None and (inputs["input_ids"] == tokenizer.unk_token_id).any():
        raise cleangpt.UserError(("--prompt", "has characters that the model's tokenizer lacks"))
    model = load_model(arguments.model, key="model").eval()
    room = model.config.max_position_embeddings - length
    if room < 1:
        raise cleangpt.UserError(("--prompt", f"expected less than the model's {room + length} tokens, got {length}"))
    if arguments.max_new_tokens < 1 or arguments.num_samples < 1 or arguments.temperature < 0 or arguments.top_k < 0:
        raise cleangpt.UserError(
            ("--max_new_tokens, --num_samples, --temperature, --top_k", "expected numbers above 0")
        )
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature, "top_k": arguments.top_k}
    torch.manual_seed(arguments.seed)
    for _ in range(arguments.num_samples):
        model.generate(
            **inputs,
            **sampling,
            max_new_tokens=min(arguments.max_new_tokens, room),
            max_length=None,
            streamer=TextStreamer(tokenizer, skip_special_tokens=True),
        )


if __name__ == "__main__":
    sys.exit(exit_code(main))
