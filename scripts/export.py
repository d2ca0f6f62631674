"""Writes a trained model as a plain gpt2, llama or qwen3, which every client of these loads without our code.

python scripts/export.py outputs/shakespeare/final exported/shakespeare
"""

import argparse
import sys
from pathlib import Path

import cleangpt
from cleangpt.models.convert import export_folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", help="a saved folder, or a Hub id")
    parser.add_argument("out", type=Path, help="the folder to write, new or empty")
    arguments = parser.parse_args()
    try:
        print(export_folder(arguments.model, arguments.out))
    except cleangpt.UserError as error:
        print("".join(f"error: {line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        return 2
    print(f"written: {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
