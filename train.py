"""Trains the model of a recipe: `accelerate launch train.py recipes/adder.yaml --training.max_steps=500`.

`python train.py recipes/adder.yaml` is the same in one process; `python train.py --help` lists every key.
"""

import os
import sys

from cleangpt import UserError


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 for a finished run, 2 for a mistake that the user can mend."""
    from cleangpt.recipe_reading import parse_command

    try:
        recipe = parse_command(arguments)
        from cleangpt import train

        train(recipe)
    except UserError as error:
        if os.environ.get("RANK", "0") == "0":
            print("".join(f"error: {line}\n" for line in str(error).splitlines()), end="", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
