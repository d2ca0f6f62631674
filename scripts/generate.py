"""Continues a prompt, streaming the model's text, on the accelerator where there is one.

python scripts/generate.py outputs/shakespeare/final --prompt "ROMEO:"
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import TextStreamer

from cleangpt import UserError
from cleangpt.data.tokenization import has_unknown, load_tokenizer
from cleangpt.errors import exit_code
from cleangpt.evaluation.writing import write
from cleangpt.hardware import default_device
from cleangpt.models.build import load_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a saved folder, or a Hub id")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt", help="the text to continue")
    prompt.add_argument("--prompt_file", type=Path, help="a file with the text to continue")
    parser.add_argument("--max_new_tokens", type=int, default=200, help="most tokens to write [200]")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the likeliest token [0.8]")
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k likeliest tokens; 0: from all [0]")
    parser.add_argument(
        "--top_p", type=float, default=1.0, help="and from the likeliest that sum to p; 1: from all [1]"
    )
    parser.add_argument("--num_samples", type=int, default=1, help="number of continuations [1]")
    parser.add_argument("--seed", type=int, default=42, help="the same seed writes the same text [42]")
    arguments = parser.parse_args()
    check_numbers(arguments)
    generate(arguments)


def check_numbers(arguments: argparse.Namespace) -> None:
    """Refuses options outside their range."""
    allowed = {
        "max_new_tokens": (arguments.max_new_tokens >= 1, "a whole number from 1"),
        "temperature": (arguments.temperature >= 0, "a number from 0"),
        "top_k": (arguments.top_k >= 0, "a whole number from 0"),
        "top_p": (0 < arguments.top_p <= 1, "a number above 0, up to 1"),
        "num_samples": (arguments.num_samples >= 1, "a whole number from 1"),
        "seed": (0 <= arguments.seed < 2**63, "a whole number from 0 to 2^63 - 1"),
    }
    mistakes = [
        (f"--{name}", f"expected {what}, got {getattr(arguments, name)}")
        for name, (fits, what) in allowed.items()
        if not fits
    ]
    if mistakes:
        raise UserError(*mistakes)


def read_prompt(arguments: argparse.Namespace) -> tuple[str, str]:
    """The option that gives the prompt, and the prompt."""
    if arguments.prompt_file is None:
        return "--prompt", arguments.prompt
    try:
        return "--prompt_file", arguments.prompt_file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(("--prompt_file", f"expected a text file, got {arguments.prompt_file}")) from error


def generate(arguments: argparse.Namespace) -> None:
    """Prints the continuations."""
    key, prompt = read_prompt(arguments)
    tokenizer = load_tokenizer(arguments.model, "model")
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"]
    if not ids.numel():
        raise UserError((key, "expected some text"))
    if has_unknown(tokenizer, ids.numpy()):
        raise UserError((key, "has characters that the model's tokenizer lacks"))
    model = load_model(arguments.model).to(default_device()).eval()
    sampling = {"do_sample": False}
    if arguments.temperature > 0:
        sampling = {"do_sample": True, "temperature": arguments.temperature}
        sampling |= {"top_k": arguments.top_k, "top_p": arguments.top_p}
    torch.manual_seed(arguments.seed)
    for _ in range(arguments.num_samples):
        write(
            model,
            ids.to(model.device),
            arguments.max_new_tokens,
            TextStreamer(tokenizer, skip_special_tokens=True),
            **sampling,
        )


if __name__ == "__main__":
    sys.exit(exit_code(main))
