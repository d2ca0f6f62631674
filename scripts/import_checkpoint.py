"""Turns a GPT-2, Llama or Qwen3 folder or Hub id, or a .pt file, into a NanoGPT or NanoLlama.

python scripts/import_checkpoint.py openai-community/gpt2 imported/gpt2
python scripts/import_checkpoint.py nanoGPT/out/ckpt.pt imported/mine --tokenizer tokenizers/shakespeare
python scripts/import_checkpoint.py RUN/best/1.473_seed42_mb12.pt imported/first --tokenizer tokenizers/shakespeare

The .pt files are nanoGPT's ckpt.pt and what wxc971231/CleanGPT writes, with config.json in the run's folder above it.
"""

import argparse
import sys
from pathlib import Path

from cleangpt.errors import exit_code
from cleangpt.models.convert import import_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("source", help="a saved folder, a Hub id, or a .pt file")
    parser.add_argument("out", type=Path, help="the folder to write, new or empty")
    parser.add_argument("--tokenizer", help="the tokenizer to save with it [the source's own, if it has one]")
    arguments = parser.parse_args()
    print(import_folder(arguments.source, arguments.out, arguments.tokenizer))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
