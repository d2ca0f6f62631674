"""Trains a recipe at several sizes and budgets of compute, and fits the scaling law L = E + A / N^a + B / D^b.

    python scripts/scaling.py recipes/shakespeare_cpu.yaml --budgets 1e13 3e13 1e14 [--sizes 64 128 256]

The runs are ordinary ones, in `outputs/NAME-scaling/`: the same command finds finished ones, and goes on with those
that were stopped. Beside them are `runs.csv`, `scaling.png` and `fit.json`, from which `scripts/plan.py RECIPE --budget
1e15` proposes a recipe. `--section.key=value` changes the recipe of every run.
"""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas
from matplotlib.figure import Figure

from cleangpt import UserError
from cleangpt.errors import exit_code
from cleangpt.files import write_file
from cleangpt.law import Fit, fit_law, missing, parabola, predict
from cleangpt.scaling import Family, collect, make_runs, propose, short
from cleangpt.sweep import follow, is_finished, train_here

REPEATS = 4  # epochs up to which a token read again teaches nearly as much as a new one (arXiv 2305.16264)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the recipe's file; --section.key=value changes it")
    parser.add_argument("--budgets", nargs="+", required=True, metavar="FLOPS", help="each is spent at every size")
    parser.add_argument(
        "--sizes", nargs="+", default=[], metavar="WIDTH", help="hidden sizes [six around the recipe's]"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, which divide the cores [1]")
    parser.add_argument("--report", action="store_true", help="train nothing, fit what is finished")
    arguments, overrides = parser.parse_known_args()
    if arguments.jobs < 1:
        raise UserError(("--jobs", f"expected a whole number from 1, got {arguments.jobs}"))
    if "WORLD_SIZE" in os.environ:
        raise UserError(("--jobs", "expected one process, which starts others: use python scripts/scaling.py"))
    family, runs = make_runs(arguments.recipe, arguments.budgets, arguments.sizes, overrides)
    family.claim(read_only=arguments.report)
    if not arguments.report:
        waiting = [run for run in runs.values() if not is_finished(run)]
        print(f"{family.folder}: {len(runs)} runs, {len(waiting)} of them to be trained", flush=True)
        follow(train_here(waiting, arguments.jobs), len(waiting))
    report(family, collect(family, runs))


def report(family: Family, runs: pandas.DataFrame) -> None:
    """Prints the finished runs, the law and what each budget wants; writes `runs.csv`, `fit.json` and `scaling.png`."""
    shown = {"budget": short, "flops": "{:.3g}".format, "epochs": "{:.2f}".format, "loss": "{:.4f}".format}
    shown |= dict.fromkeys(("parameters", "steps", "tokens", "seconds"), "{:,.0f}".format)
    print(runs.drop(columns="run").to_string(index=False, formatters=shown))
    if lack := missing(runs):
        print(f"no fit: {lack}")
        return
    if (most := runs.epochs.max()) > REPEATS:
        print(
            f"warning: {most:.1f} epochs; beyond {REPEATS} a repeated token teaches less, which the law does not know"
        )
    runs.to_csv(family.folder / "runs.csv", index=False)
    fit = fit_law(runs)
    write_file(family.folder / "fit.json", json.dumps(asdict(fit)))
    laws = np.array([fit.law, *fit.samples])
    figures = dict(zip(("E", "A", "a", "B", "b"), laws.T, strict=True))
    figures["b / (a + b)"] = laws[:, 4] / laws[:, [2, 4]].sum(axis=1)
    for name, (value, *samples) in figures.items():
        low, high = np.quantile(samples, [0.025, 0.975])
        print(f"{name:12} {value:>9.4g}   {low:.4g} to {high:.4g}")
    print("L = E + A / N^a + B / D^b with 95 % intervals by bootstrap; the best N grows as C^(b / (a + b))")
    print(f"runs lie {np.std(fit.residuals):.2%} around the law")
    wants = {short(budget): describe(family, fit, budget, part) for budget, part in runs.groupby("budget")}
    print(pandas.DataFrame(wants).T.to_string())
    draw(family, fit, runs, family.folder / "scaling.png")
    print(", ".join(str(family.folder / name) for name in ("runs.csv", "fit.json", "scaling.png")))


def describe(family: Family, fit: Fit, budget: float, runs: pandas.DataFrame) -> dict[str, str]:
    """What a budget wants, by the law and by the parabola through its runs."""
    wanted, (_, lowest) = propose(family, fit, budget), parabola(runs)
    low, high = wanted.range
    return {
        "parameters": f"{wanted.parameters:,}",
        "95 %": f"{low:,} to {high:,}",
        "by its parabola": f"{lowest:,.0f}" if runs.parameters.min() < lowest < runs.parameters.max() else "-",
        "tokens": f"{wanted.tokens:,}",
        "loss": f"{wanted.loss:.4f}",
        "of a run, 95 %": "{:.3f} to {:.3f}".format(*wanted.interval),
    }


def draw(family: Family, fit: Fit, runs: pandas.DataFrame, path: Path) -> None:
    """Draws each budget's runs, the law through them (line), their parabola (dots) and the least loss (star)."""
    figure = Figure(figsize=(6, 4.5), layout="constrained")
    axes = figure.subplots()
    costs = [family.cost(width) for width in sorted({*runs.width.tolist()})]
    sizes = np.geomspace(costs[0].parameters, costs[-1].parameters, 100)
    known = np.log([cost.parameters for cost in costs])
    flops = np.exp(np.interp(np.log(sizes), known, np.log([cost.flops / cost.targets for cost in costs])))  # per target
    for number, (budget, part) in enumerate(runs.groupby("budget")):
        color, curve = f"C{number}", predict(fit.law, sizes, budget / flops)
        axes.scatter(part.parameters, part.loss, s=16, color=color)
        axes.plot(sizes, curve, color=color, label=f"{short(budget)} FLOPs")
        axes.plot(sizes, np.polyval(parabola(part)[0], np.log(sizes)), ":", color=color, alpha=0.6)
        axes.scatter(sizes[curve.argmin()], curve.min(), s=120, marker="*", color=color, edgecolor="black", zorder=3)
    axes.set_xscale("log")
    axes.set(xlabel="parameters", ylabel="eval/loss")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(exit_code(main))
