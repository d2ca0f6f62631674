"""Trains a recipe with each combination of a grid's values and several seeds, and says what differs by more than luck.

    python scripts/sweep.py recipes/adder.yaml --grid optimizer.lr=2e-3,5e-3 model.hidden_size=64,128 --seeds 5

The runs are ordinary ones, in `outputs/NAME-sweep/`: the same command finds finished ones, and goes on with those that
were stopped. Beside them are `results.csv` and `sweep.png`. `--section.key=value` changes the recipe of every run.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas
import yaml
from matplotlib.figure import Figure

from cleangpt import UserError
from cleangpt.errors import exit_code
from cleangpt.recipe.keys import Recipe
from cleangpt.sweep import (
    Cell,
    collect,
    compare,
    follow,
    is_finished,
    make_cells,
    open_sweep,
    train_here,
    train_quietly,
    verdict,
    with_interval,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the recipe's file; --section.key=value changes it")
    parser.add_argument(
        "--grid", nargs="+", required=True, metavar="KEY=VALUE,VALUE", help="the first cell is compared to"
    )
    parser.add_argument(
        "--seeds", type=int, help="runs of each cell, with seeds 1, 2, ... [run.seeds, or run.seed alone]"
    )
    parser.add_argument("--metric", help="what to compare [checkpoint.metric]")
    parser.add_argument("--from", dest="checkpoint", help="a checkpoint from which every run branches")
    parser.add_argument("--jobs", type=int, help="runs at a time, which divide the cores [1; all with --slurm]")
    parser.add_argument("--slurm", nargs="*", metavar="OPTION=VALUE", help="a job each, with options of submitit")
    parser.add_argument("--report", action="store_true", help="train nothing, report what is finished")
    arguments, overrides = parser.parse_known_args()
    if arguments.jobs is not None and arguments.jobs < 1:
        raise UserError(("--jobs", f"expected a whole number from 1, got {arguments.jobs}"))
    if "WORLD_SIZE" in os.environ:
        raise UserError(("--jobs", "expected one process, which starts others: use python scripts/sweep.py"))
    if arguments.seeds is not None:
        overrides.append(f"--run.seeds={[*range(1, arguments.seeds + 1)]}")
    if arguments.metric is not None:
        overrides.append(f"--checkpoint.metric={arguments.metric}")
    if arguments.checkpoint is not None:
        overrides.append(f"--training.resume={arguments.checkpoint}")
    cells = make_cells(arguments.recipe, arguments.grid, overrides)
    folder = open_sweep(cells, read_only=arguments.report)
    if not arguments.report:
        runs = [run for seed in zip(*(cell.runs for cell in cells.values()), strict=True) for run in seed]
        waiting = [run for run in runs if not is_finished(run)]
        print(f"{folder}: {len(cells)} cells, {len(runs)} runs, {len(waiting)} of them to be trained", flush=True)
        if arguments.slurm is None:
            ends = train_here(waiting, arguments.jobs or 1)
        else:
            ends = train_on_slurm(waiting, folder / "slurm", arguments.slurm, arguments.jobs)
        follow(ends, len(waiting))
    report(cells, folder)


def train_on_slurm(
    runs: list[Recipe], folder: Path, options: list[str], jobs: int | None
) -> Iterator[tuple[Recipe, int]]:
    """`train_here` with a job of SLURM's for each run; `options` are those of submitit's `update_parameters`."""
    try:
        import submitit
    except ImportError as error:
        raise UserError(("--slurm", 'expected submitit: pip install -e ".[slurm]"')) from error
    try:
        executor = submitit.AutoExecutor(folder, cluster="slurm")
        given = {key: yaml.safe_load(value) for key, _, value in (option.partition("=") for option in options)}
        executor.update_parameters(**{"slurm_array_parallelism": jobs or len(runs)} | given)
        submitted = executor.map_array(train_quietly, runs) if runs else []
    except (RuntimeError, NameError, TypeError, AssertionError, submitit.core.utils.FailedJobError) as error:
        raise UserError(("--slurm", str(error))) from error
    for job in submitit.helpers.as_completed(submitted, poll_frequency=1):
        yield runs[submitted.index(job)], job.result()


def report(cells: Mapping[str, Cell], folder: Path) -> None:
    """Prints the table of finished runs, and writes `results.csv` and `sweep.png`."""
    results, metric = collect(cells), next(iter(cells.values())).runs[0].checkpoint.metric
    if results.empty:
        print("no run is finished yet")
        return
    results.to_csv(folder / "results.csv", index=False)
    first, *_ = cells
    values = results.pivot(index="seed", columns="cell", values=[metric, "elapsed_s"]).astype(float)
    table = compare(values[metric].reindex(columns=list(cells)))
    seconds = values["elapsed_s"].mean().reindex(cells)
    rows = {
        name: {
            metric: with_interval(row["mean"], row.interval),
            "seeds": f"{row.seeds:.0f}",
            "seconds": f"{seconds[name]:,.0f}",
            f"against {first}": verdict(row) if name != first else "",
        }
        for name, row in table.iterrows()
    }
    print(pandas.DataFrame(rows).T.to_string())
    compared = table.p.count()
    print(f"mean ± half of its 95 % interval{f'; p corrected for {compared} comparisons' if compared > 1 else ''}")
    draw(cells, results, table, metric, folder / "sweep.png")
    print(f"{folder / 'results.csv'}, {folder / 'sweep.png'}")


def draw(
    cells: Mapping[str, Cell], results: pandas.DataFrame, table: pandas.DataFrame, metric: str, path: Path
) -> None:
    """Draws each cell's mean with its interval, and its runs, over the grid's first key; the others make lines."""
    key = next(iter(next(iter(cells.values())).values))
    places: dict[str, Any] = {name: cells[name].values[key] for name in table.index}
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    with contextlib.suppress(ValueError):  # words are places too
        places = dict(sorted(((name, float(place)) for name, place in places.items()), key=lambda pair: pair[1]))
        ticks = [*dict.fromkeys(places.values())]
        if ticks[0] > 0 and ticks[-1] >= 4 * ticks[0]:
            axes.set_xscale("log")
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    lines: dict[str, list[str]] = {}
    for name in places:
        rest = [f"{other.rsplit('.')[-1]} {value}" for other, value in cells[name].values.items() if other != key]
        lines.setdefault(", ".join(rest), []).append(name)
    for label, names in lines.items():
        x, part, runs = [places[name] for name in names], table.loc[names], results[results.cell.isin(names)]
        drawn = axes.errorbar(x, part["mean"], part.interval.fillna(0), label=label, marker="o", capsize=4)
        axes.scatter([places[name] for name in runs.cell], runs[metric], s=8, alpha=0.5, color=drawn[0].get_color())
    axes.set(xlabel=key, ylabel=metric)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    sys.exit(exit_code(main))
