"""Writes a trained model as a plain gpt2, llama or qwen3, which any client of these loads without our code.

python scripts/export.py outputs/shakespeare/final exported/shakespeare
"""

import argparse
import sys
from pathlib import Path

from cleangpt.errors import exit_code
from cleangpt.models.convert import export_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a saved folder, or a Hub id")
    parser.add_argument("out", type=Path, help="the folder to write, new or empty")
    arguments = parser.parse_args()
    print(export_folder(arguments.model, arguments.out))
    print(f"written: {arguments.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
