"""Measures a saved model on a recipe's data.

    python scripts/evaluate_model.py outputs/adder/final --recipe recipes/adder.yaml

Also on several processes: `torchrun --nproc_per_node=2 scripts/evaluate_model.py ...`.
"""

import argparse
import json
import os
import sys
from pathlib import Path

import cleangpt
from cleangpt.data.prepare import PreparedData, prepare_data
from cleangpt.errors import exit_code
from cleangpt.evaluation import evaluate
from cleangpt.launch import start_accelerator
from cleangpt.models.build import load_model
from cleangpt.recipe_reading import load_recipe
from cleangpt.tokenization import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="a saved folder, or a Hub id")
    parser.add_argument("--recipe", required=True, help="whose data to measure on, --section.key=value changes it")
    parser.add_argument("--split", help="validation or test [test where there is one, else validation]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments, overrides = parser.parse_known_args()
    figures = measure(arguments, overrides)
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(figures) if arguments.json else "\n".join(f"{k:20} {v:.4f}" for k, v in figures.items()))


def measure(arguments: argparse.Namespace, overrides: list[str]) -> dict[str, float]:
    """The figures under their names in files, `eval/loss` say."""
    recipe = load_recipe(arguments.recipe, overrides)
    data = prepare_data(recipe)
    model = load_model(arguments.model, recipe.model.get("attn_implementation"))
    check_tokenizer(arguments, model, data)
    accelerator = start_accelerator([], recipe.folder, "no", model.config.hidden_size)
    name = arguments.split or ("test" if "test" in data.splits else "validation")
    if name not in data.splits:
        raise cleangpt.UserError(("--split", f"expected one of {', '.join(data.splits)}, got {name!r}"))
    figures = evaluate(
        accelerator,
        accelerator.prepare_model(model, evaluation_mode=True),
        data.splits[name],
        recipe.evaluation.batch_size,
    )
    return {f"eval/{name}": value for name, value in figures.items()}


def check_tokenizer(arguments: argparse.Namespace, model, data: PreparedData) -> None:
    """Refuses a model that reads other ids; one without a tokenizer, as from nanoGPT, must know all ids of the data."""
    if (Path(arguments.model) / "config.json").exists() and not (Path(arguments.model) / "tokenizer.json").exists():
        largest = max(int(split.tokens.max()) for split in data.splits.values())
        if largest >= model.config.vocab_size:
            message = f"expected ids to {model.config.vocab_size - 1}, the recipe's data has {largest}"
            raise cleangpt.UserError(("model", message))
    elif load_tokenizer(arguments.model, "model").get_vocab() != data.tokenizer.get_vocab():
        raise cleangpt.UserError(("model", f"the tokenizer of {arguments.model} is not the one of {arguments.recipe}"))


if __name__ == "__main__":
    sys.exit(exit_code(main))
