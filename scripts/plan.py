"""Says what a recipe would cost before it runs, and what looks wrong in it.

    python scripts/plan.py recipes/shakespeare.yaml [--num_processes 8] [--section.key=value ...]

Builds the data if it is not in the cache, then trains ten micro-steps in a temporary folder to estimate the time
(`--no_measurement` skips that). The picture shows learning rate, weight decay and batch size over the run. With
`--budget 1e15` it is the size and the length that the fit of `scripts/scaling.py` finds best for so many FLOPs.
"""

import argparse
import shlex
import sys
from pathlib import Path

from matplotlib.figure import Figure

from cleangpt import UserError
from cleangpt.errors import exit_code
from cleangpt.hardware import default_device
from cleangpt.plan import Plan, make_plan, measure_time
from cleangpt.recipe.keys import Recipe
from cleangpt.recipe.reading import load_recipe
from cleangpt.recipe.schedules import at
from cleangpt.scaling import check_budget, load_fit, open_family, propose, short
from cleangpt.training.memory import CPU_GROWTH, Memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the recipe's file; --section.key=value changes it")
    parser.add_argument("--num_processes", type=int, default=1, help="processes that will train together [1]")
    parser.add_argument("--picture", type=Path, help="image of the schedules [PNG beside the run's folder]")
    parser.add_argument("--budget", metavar="FLOPS", help="plan what scripts/scaling.py found best for it")
    parser.add_argument("--no_measurement", action="store_true", help="report everything but the time")
    arguments, overrides = parser.parse_known_args()
    if arguments.budget is not None:
        overrides += settings_for(arguments.budget, arguments.recipe, overrides)
    recipe = load_recipe(arguments.recipe, overrides)
    if arguments.num_processes < 1 or recipe.training.batch_size % arguments.num_processes:
        message = f"expected a divisor of training.batch_size {recipe.training.batch_size}"
        raise UserError(("--num_processes", f"{message}, got {arguments.num_processes}"))
    picture = arguments.picture or recipe.folder.with_name(f"{recipe.run.name}-plan.png")
    plan = make_plan(recipe, arguments.num_processes)
    try:
        draw_schedules(plan.recipe, picture)
    except (OSError, ValueError) as error:  # a folder or an image format that cannot be written
        raise UserError(("--picture", f"{picture} cannot be written: {error}")) from error
    report(plan, arguments.num_processes)
    print(f"{'schedules':24} {picture}")
    if not arguments.no_measurement:
        seconds = measure_time(plan)
        print(f"{'time, one process here':24} {duration(seconds)}")
        if arguments.num_processes > 1:
            print(f"{'time, at best':24} {duration(seconds / arguments.num_processes)} with as many devices like this")
    for warning in plan.warnings:
        print(f"warning: {warning}")


def settings_for(text: str, path: str, overrides: list[str]) -> list[str]:
    """What makes the recipe the best run of a budget by its saved fit, as the command line has it; prints it."""
    if problems := check_budget("--budget", text):
        raise UserError(*problems)
    family, budget = open_family(path, overrides), float(text)
    fit = load_fit(family)
    wanted, (smallest, largest) = propose(family, fit, budget), fit.budgets
    low, high = wanted.range
    print(f"{'size for the budget':24} {wanted.parameters:,} parameters (95 %: {low:,} to {high:,})")
    print(
        f"{'loss foretold':24} {wanted.loss:.4f} (of a run, 95 %: {wanted.interval[0]:.3f} to {wanted.interval[1]:.3f})"
    )
    print(f"{'to train it':24} python train.py {shlex.join([path, *overrides, *wanted.settings])}")
    if not smallest / 10 <= budget <= 10 * largest:
        found = f"the fit knows {short(smallest)} to {short(largest)} FLOPs"
        print(f"warning: --budget: {found}, and {short(budget)} lies more than ten times beyond: take this as a guess")
    return wanted.settings


def draw_schedules(recipe: Recipe, path: Path) -> None:
    """Draws learning rate, weight decay and batch size of each step of a resolved recipe."""
    steps = range(1, (recipe.training.max_steps or 0) + 1)
    values = [at(recipe.schedule, recipe.optimizer, step, len(steps)) for step in steps]
    curves: dict[str, list[float]] = {
        "learning rate": [value.lr for value in values],
        "weight decay": [value.weight_decay for value in values],
        "sequences per step": [value.accumulation * recipe.training.batch_size for value in values],
    }
    figure = Figure(figsize=(6, 6), layout="constrained")
    for axes, (name, curve) in zip(figure.subplots(3, sharex=True), curves.items(), strict=True):
        axes.plot(steps, curve)
        axes.set_ylim(0, 1.1 * max(*curve, 1e-12))
        axes.set_title(name, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    axes.set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def report(plan: Plan, num_processes: int) -> None:
    """Prints the plan as a table."""
    first, last = plan.batches
    lines = {
        "parameters": f"{plan.parameters:,}",
        "steps": f"{plan.recipe.training.max_steps:,}",
        "tokens to learn from": f"{plan.tokens:,}",
        "epochs": f"{plan.epochs:,.2f}",
        **{f"  of {label}": f"{epochs:,.2f}" for label, epochs in plan.source_epochs.items()},
        "sequences per step": f"{first:,}" if first == last else f"{first:,} at the start, {last:,} at the end",
        "per forward pass": f"{plan.micro_batch:,} in each of {num_processes} processes",
        "FLOPs": f"{plan.flops:.3g}",
        "disk": size(plan.disk),
    }
    for name, value in lines.items():
        print(f"{name:24} {value}")
    print(f"{'memory of a process':24} {'DDP':>9} {'FSDP':>9}")
    for name in Memory.__annotations__:
        label = {"peak": "peak of a step", "evaluation_peak": "peak of an evaluation"}.get(name, name)
        print(f"  {label:22} {size(getattr(plan.ddp, name)):>9} {size(getattr(plan.fsdp, name)):>9}")
    if default_device().type == "cpu":
        peak = max(plan.ddp.peak, plan.ddp.evaluation_peak)
        print(f"  {'process on a CPU':22} {size(peak):>9} to {size(round(CPU_GROWTH * peak))}, with holes in its heap")


def size(count: int) -> str:
    """Bytes in the unit that suits them."""
    power = min(4, (len(str(count)) - 1) // 3)
    return f"{count / 1000**power:.3g} {('B', 'KB', 'MB', 'GB', 'TB')[power]}"


def duration(seconds: float) -> str:
    """Seconds in the unit that suits them."""
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


if __name__ == "__main__":
    sys.exit(exit_code(main))
