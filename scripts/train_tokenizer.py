"""Makes a recipe's tokenizer, trained on its train split where it is trained, and saves it.

    python scripts/train_tokenizer.py recipes/adder.yaml tokenizers/arithmetic
    python scripts/train_tokenizer.py recipes/shakespeare.yaml tokenizers/shakespeare

The same recipe makes the same files, byte for byte.
"""

import argparse
import sys
from pathlib import Path

from cleangpt import UserError
from cleangpt.errors import exit_code
from cleangpt.recipe.reading import load_recipe
from cleangpt.training.setup import load_data

TOKENIZER_FILES = {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the recipe's file; --section.key=value changes it")
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments, overrides = parser.parse_known_args()
    if arguments.out.is_file():
        raise UserError((str(arguments.out), "expected a folder, or a new one's name, got a file"))
    others = sorted({path.name for path in arguments.out.glob("*")} - TOKENIZER_FILES)
    if others:
        message = f"expected a new or empty folder, or a tokenizer's, which has no {', '.join(others[:5])}"
        raise UserError((str(arguments.out), message))
    tokenizer = load_data(load_recipe(arguments.recipe, overrides))[1].tokenizer
    try:
        tokenizer.save_pretrained(arguments.out)
    except OSError as error:
        raise UserError((str(arguments.out), f"cannot be written: {error.strerror}")) from error
    print(f"{len(tokenizer):,} ids in {arguments.out}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
