"""Measures a saved model on a recipe's data.

    python scripts/evaluate_model.py outputs/adder/final --recipe recipes/adder.yaml

Also on several processes: `torchrun --nproc_per_node=2 scripts/evaluate_model.py ...`.
"""

import argparse
import json
import sys
from pathlib import Path

import cleangpt
from cleangpt.data.packing import TextSplit
from cleangpt.data.prepare import PreparedData, prepare_data
from cleangpt.errors import exit_code
from cleangpt.evaluation import MOST_PROBLEMS, evaluate
from cleangpt.grading import Grades, grade, table, write_report
from cleangpt.launch import start_accelerator
from cleangpt.models.build import load_model
from cleangpt.recipe import ARITHMETIC, Recipe
from cleangpt.recipe_reading import load_recipe
from cleangpt.tokenization import load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="a saved folder, or a Hub id")
    parser.add_argument("--recipe", required=True, help="whose data to measure on, --section.key=value changes it")
    parser.add_argument("--split", help="train, validation or test [test where there is one, else validation]")
    parser.add_argument("--limit", type=int, help="rows to measure, from the start [all, 200,000 problems at most]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--report", type=Path, help="arithmetic: folder for heat maps and for the wrong answers")
    arguments, overrides = parser.parse_known_args()
    measure(arguments, overrides)


def measure(arguments: argparse.Namespace, overrides: list[str]) -> None:
    recipe = load_recipe(arguments.recipe, overrides)
    arithmetic = recipe.data.path in ARITHMETIC
    if arguments.report and not arithmetic:
        raise cleangpt.UserError(("--report", f"expected an arithmetic recipe, got data.path {recipe.data.path}"))
    if arguments.report and arguments.report.is_file():
        raise cleangpt.UserError(("--report", f"expected a folder, got the file {arguments.report}"))
    data = prepare_data(recipe)
    name, split, limit = choose_split(arguments, recipe, data)
    model = load_model(arguments.model, recipe.model.get("attn_implementation"))
    check_tokenizer(arguments, model, data)
    check_positions(model, split, "data.num_digits" if arithmetic else "data.block_size")
    accelerator = start_accelerator([], recipe.folder, "no", model.config.hidden_size)
    model = model.to(accelerator.device).eval()

    batch_size, grades = recipe.evaluation.batch_size, None
    if arithmetic:
        figures, grades = grade(accelerator, model, data.tokenizer, split, batch_size, limit)
    else:
        figures = evaluate(accelerator, model, split, batch_size, num_rows=limit)
    if accelerator.is_main_process:
        if arguments.report:
            write_report(grades, arguments.report)
        what = f"{limit:,} of {len(split):,} {'problems' if arithmetic else 'sequences'}"
        show(arguments, figures, f"{name} split of {arguments.recipe}, {what}", grades)


def show(arguments: argparse.Namespace, figures: dict[str, float], data: str, grades: Grades | None) -> None:
    """Prints the figures under their names in files, `eval/loss` say."""
    figures = {f"eval/{name}": value for name, value in figures.items()}
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{arguments.model} on the {data}\n")
    print("\n".join(f"{name:20} {value:.4f}" for name, value in figures.items()))
    if grades is not None:
        print(f"\n{table(grades)}")
    if arguments.report:
        print(f"\naccuracy.png and wrong_answers.csv are in {arguments.report}")


def choose_split(arguments: argparse.Namespace, recipe: Recipe, data: PreparedData) -> tuple[str, object, int]:
    """A split's name, the split, cut end to end however training cuts it, and how many rows to measure."""
    name = arguments.split or ("test" if "test" in data.splits else "validation")
    if name not in data.splits:
        raise cleangpt.UserError(("--split", f"expected one of {', '.join(data.splits)}, got {name!r}"))
    split = data.splits[name]
    if data.folder is not None:
        split = TextSplit(data.folder, name, recipe.data.block_size, "blocks")
    most = len(split) if data.folder is not None else min(len(split), MOST_PROBLEMS)
    limit = most if arguments.limit is None else arguments.limit
    if not 1 <= limit <= len(split):
        raise cleangpt.UserError(("--limit", f"expected 1 to {len(split):,}, got {limit}"))
    return name, split, limit


def check_tokenizer(arguments: argparse.Namespace, model, data: PreparedData) -> None:
    """Refuses a model that reads other ids; one without a tokenizer, as from nanoGPT, must know all ids of the data."""
    if (Path(arguments.model) / "config.json").exists() and not (Path(arguments.model) / "tokenizer.json").exists():
        known = data.folder is None  # arithmetic, which uses every id of its tokenizer
        largest = len(data.tokenizer) - 1 if known else max(int(split.tokens.max()) for split in data.splits.values())
        if largest >= model.config.vocab_size:
            message = f"expected ids to {model.config.vocab_size - 1}, the recipe's data has {largest}"
            raise cleangpt.UserError(("model", message))
    elif load_tokenizer(arguments.model, "model").get_vocab() != data.tokenizer.get_vocab():
        raise cleangpt.UserError(("model", f"the tokenizer of {arguments.model} is not the one of {arguments.recipe}"))


def check_positions(model, split, key: str) -> None:
    """Refuses sequences beyond a model's learned positions; rotary ones go on, whatever comes of it."""
    positions = model.config.max_position_embeddings
    if split.sequence_length > positions and getattr(model.config, "rope_parameters", None) is None:
        message = f"expected sequences of at most the model's {positions} positions, these have {split.sequence_length}"
        raise cleangpt.UserError((key, message))


if __name__ == "__main__":
    sys.exit(exit_code(main))
