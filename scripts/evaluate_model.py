"""Measures a saved model on a recipe's data.

    python scripts/evaluate_model.py outputs/adder/final --recipe recipes/adder.yaml

Also on several processes: `torchrun --nproc_per_node=2 scripts/evaluate_model.py ...`.
"""

import argparse
import json
import sys
from pathlib import Path

from transformers import PreTrainedModel

from cleangpt import UserError
from cleangpt.data.arithmetic import ArithmeticSplit
from cleangpt.data.mixture import Mixture, texts_of
from cleangpt.data.packing import TextSplit
from cleangpt.data.prepare import PreparedData
from cleangpt.data.splits import Split
from cleangpt.data.tokenization import load_tokenizer
from cleangpt.errors import exit_code
from cleangpt.evaluation.evaluate import MAX_GRADED, evaluate
from cleangpt.evaluation.grading import Grades, draw_lengths, format_table, grade, write_report
from cleangpt.models.build import load_model
from cleangpt.models.loss import check_documents
from cleangpt.recipe.keys import ARITHMETIC, Recipe
from cleangpt.recipe.reading import load_recipe
from cleangpt.training.launch import join_processes, start_accelerator
from cleangpt.training.setup import load_data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("model", help="a saved folder, or a Hub id")
    parser.add_argument("--recipe", required=True, help="whose data to measure on; --section.key=value changes it")
    parser.add_argument("--split", help="train, validation or test [test if there is one, else validation]")
    parser.add_argument("--limit", type=int, help="rows to measure, from the start [all, 200,000 problems at most]")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--report", type=Path, help="arithmetic: folder for heat maps and for the wrong answers")
    parser.add_argument(
        "--lengths", type=int, nargs="+", help="arithmetic: ask for operands of these numbers of digits instead"
    )
    arguments, overrides = parser.parse_known_args()
    if arguments.lengths is None:
        measure(arguments, overrides)
    else:
        measure_lengths(arguments, overrides)


def measure(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Measures, and prints the figures on the main process."""
    recipe = load_recipe(arguments.recipe, overrides)
    check_options(arguments, recipe)
    recipe, data = load_data(recipe)
    name, split, limit = choose_split(arguments, data)
    model = load_model(arguments.model, recipe.model.get("attn_implementation"))
    check_tokenizer(arguments, model, data)
    check_positions(model, split)
    if any(text.packing == "documents" for text in texts_of(split).values()):
        check_documents(model, split.sequence_length, min(recipe.evaluation.batch_size, 2))
    join_processes()
    accelerator = start_accelerator((), recipe.folder, "no")
    model = model.to(accelerator.device).eval()

    batch_size, grades = recipe.evaluation.batch_size, None
    if isinstance(split, ArithmeticSplit):
        figures, grades = grade(accelerator, model, data.tokenizer, split, batch_size, limit)
    else:
        figures = evaluate(accelerator, model, split, batch_size, num_rows=limit)
    if accelerator.is_main_process:
        if grades is not None and arguments.report:
            write_report(grades, arguments.report)
        rows = f"{limit:,} of {len(split):,} {'sequences' if grades is None else 'problems'}"
        show(arguments, figures, f"{name} split of {arguments.recipe}, {rows}", grades)


def measure_lengths(arguments: argparse.Namespace, overrides: list[str]) -> None:
    """Measures problems of each length, and draws accuracy over length into the report."""
    recipe = load_recipe(arguments.recipe, overrides)
    check_options(arguments, recipe)
    model = load_model(arguments.model, recipe.model.get("attn_implementation"))
    join_processes()
    accelerator = start_accelerator((), recipe.folder, "no")
    model, accuracies = model.to(accelerator.device).eval(), {}
    for length in arguments.lengths:
        digits = [f"--data.min_digits={length}", f"--data.num_digits={length}"]
        data = load_data(load_recipe(arguments.recipe, [*overrides, *digits]))[1]
        _, split, limit = choose_split(arguments, data)
        check_tokenizer(arguments, model, data)
        check_positions(model, split)
        figures = evaluate(accelerator, model, split, recipe.evaluation.batch_size, num_rows=limit)
        accuracies[length] = figures["accuracy"]
        if accelerator.is_main_process and not arguments.json:
            print(f"{length:4} digits, {limit:,} problems: accuracy {figures['accuracy']:.4f}", flush=True)
    if accelerator.is_main_process:
        if arguments.json:
            print(json.dumps(accuracies))
        if arguments.report:
            arguments.report.mkdir(parents=True, exist_ok=True)
            learned = recipe.data.min_digits or recipe.data.num_digits, recipe.data.num_digits
            draw_lengths(accuracies, learned, arguments.report / "lengths.png")


def show(arguments: argparse.Namespace, figures: dict[str, float], data: str, grades: Grades | None) -> None:
    """Prints the figures under their names in `metrics.jsonl`, `eval/loss` and so on."""
    figures = {f"eval/{name}": value for name, value in figures.items()}
    if arguments.json:
        print(json.dumps(figures))
        return
    print(f"{arguments.model} on the {data}\n")
    print("\n".join(f"{name:20} {value:.4f}" for name, value in figures.items()))
    if grades is not None:
        print(f"\n{format_table(grades)}")
    if arguments.report:
        print(f"\naccuracy.png and wrong_answers.csv are in {arguments.report}")


def check_options(arguments: argparse.Namespace, recipe: Recipe) -> None:
    """Refuses options of arithmetic for other data, a report where a file is, and lengths that no number has."""
    for option in ("report", "lengths"):
        if getattr(arguments, option) and recipe.data.path not in ARITHMETIC:
            raise UserError((f"--{option}", f"expected an arithmetic recipe, got data.path {recipe.data.path}"))
    if arguments.report and arguments.report.is_file():
        raise UserError(("--report", f"expected a folder, got the file {arguments.report}"))
    if arguments.lengths and min(arguments.lengths) < 1:
        raise UserError(("--lengths", f"expected whole numbers from 1, got {min(arguments.lengths)}"))


def choose_split(arguments: argparse.Namespace, data: PreparedData) -> tuple[str, Split, int]:
    """A split's name, the split (text cut as in validation, even for training) and the number of rows to measure."""
    name = arguments.split or ("test" if "test" in data.splits else "validation")
    if name not in data.splits:
        raise UserError(("--split", f"expected one of {', '.join(data.splits)}, got {name!r}"))
    split, most = data.splits[name], MAX_GRADED
    if isinstance(split, TextSplit | Mixture):
        split = split.end_to_end()
        most = len(split)
    limit = min(len(split), most) if arguments.limit is None else arguments.limit
    if not 1 <= limit <= len(split):
        raise UserError(("--limit", f"expected 1 to {len(split):,}, got {limit}"))
    return name, split, limit


def check_tokenizer(arguments: argparse.Namespace, model: PreTrainedModel, data: PreparedData) -> None:
    """Refuses a model with another tokenizer, or with none (as from nanoGPT) and fewer ids than the data has."""
    folder = Path(arguments.model)
    if (folder / "config.json").exists() and not (folder / "tokenizer.json").exists():
        texts = [text for split in data.splits.values() for text in texts_of(split).values()]
        largest = max((int(ids.max()) for text in texts for ids in text.stream), default=len(data.tokenizer) - 1)
        if largest >= model.config.vocab_size:
            message = f"expected ids to {model.config.vocab_size - 1}, the recipe's data has {largest}"
            raise UserError(("model", message))
    elif load_tokenizer(arguments.model, "model").get_vocab() != data.tokenizer.get_vocab():
        raise UserError(("model", f"the tokenizer of {arguments.model} is not the one of {arguments.recipe}"))


def check_positions(model: PreTrainedModel, split: Split) -> None:
    """Refuses sequences beyond a model's learned positions; rotary ones extend to any length, for better or worse."""
    positions = model.config.max_position_embeddings
    if split.sequence_length > positions and getattr(model.config, "rope_parameters", None) is None:
        key = "data.num_digits" if isinstance(split, ArithmeticSplit) else "data.block_size"
        message = f"expected sequences of at most the model's {positions} positions, these have {split.sequence_length}"
        raise UserError((key, message))


if __name__ == "__main__":
    sys.exit(exit_code(main))
