"""Trains the model of a recipe: `accelerate launch train.py recipes/adder.yaml --training.max_steps=500`.

`python train.py recipes/adder.yaml` does the same in one process; `python train.py --help` lists every key.
"""

import gc
import os
import sys


def main() -> None:
    from cleangpt.recipe.reading import parse_command

    if "WORLD_SIZE" not in os.environ:
        recipe = parse_command(sys.argv[1:])
    from cleangpt.training.launch import join_processes, together  # after --help, which need not wait for it
    from cleangpt.training.loop import train

    gc.enable()
    gc.freeze()  # what was imported lives to the end, and need not be looked at again
    if "WORLD_SIZE" in os.environ:
        join_processes()
        recipe = together(parse_command, sys.argv[1:])
    train(recipe)


if __name__ == "__main__":
    gc.disable()  # imports leave no garbage, and a quarter of their time went into looking for it
    from cleangpt.errors import exit_code

    sys.exit(exit_code(main))
