"""Trains the model of a recipe: `accelerate launch train.py recipes/adder.yaml --training.max_steps=500`.

`python train.py recipes/adder.yaml` is the same in one process; `python train.py --help` lists every key.
"""

import sys

from cleangpt.errors import exit_code


def main() -> None:
    from cleangpt.recipe_reading import parse_command

    recipe = parse_command(sys.argv[1:])
    from cleangpt.training import train  # after --help, which need not wait for it

    train(recipe)


if __name__ == "__main__":
    sys.exit(exit_code(main))
