"""Makes a recipe's tokenizer, trained on its train split where it is trained, and saves it.

    python scripts/train_tokenizer.py recipes/adder.yaml tokenizers/arithmetic
    python scripts/train_tokenizer.py recipes/shakespeare.yaml tokenizers/shakespeare

The same recipe makes the same files, byte for byte.
"""

import argparse
import sys
from pathlib import Path

import cleangpt
from cleangpt.data.prepare import prepare_data
from cleangpt.models.build import block_size_of
from cleangpt.recipe import ARITHMETIC
from cleangpt.recipe_reading import load_recipe


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the recipe's file; --section.key=value changes it")
    parser.add_argument("out", type=Path, help="the folder to write")
    arguments, overrides = parser.parse_known_args()
    try:
        recipe = load_recipe(arguments.recipe, overrides)
        if recipe.data.path not in ARITHMETIC:
            recipe.data.block_size = block_size_of(recipe.model, recipe.data.block_size)
        tokenizer = prepare_data(recipe).tokenizer
        tokenizer.save_pretrained(arguments.out)
    except cleangpt.UserError as error:
        print("".join(f"error: {line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {arguments.out}: cannot be written: {error.strerror}", file=sys.stderr)
        return 2
    print(f"{len(tokenizer):,} ids in {arguments.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
