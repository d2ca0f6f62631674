"""One recipe over a grid of values, with several seeds: its runs, and what the differences between them are worth.

    grid ──> a recipe for each cell and seed ──> ordinary runs ──> the last of their metrics ──> differences, with p

A cell is one combination of the grid's values. Every cell has the same seeds, so runs are compared in pairs, on both
sides of which initial weights and samples, which a seed decides, are the same.
"""

import contextlib
import itertools
import math
import multiprocessing
import os
import re
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas
import yaml
from scipy import stats

from .errors import Stopped, UserError, exit_code
from .files import remove_at_once, write_file
from .hardware import count_threads
from .recipe.keys import Recipe, flatten
from .recipe.reading import load_recipe
from .training.loop import train
from .training.seeds import last_metrics, one_per_seed

# Beginnings of keys that may change while a sweep goes on.
FREE = ("run.", "tracking.", "hub.", "checkpoint.", "data.num_proc", "training.micro_batch_size", "training.compile")


class Cell(NamedTuple):
    """One combination of the grid's values."""

    values: dict[str, str]  # as the command line has them, by key
    runs: list[Recipe]  # one for each seed


def make_cells(path: str | Path, grid: Sequence[str], overrides: Sequence[str] = ()) -> dict[str, Cell]:
    """The cells of `optimizer.lr=1e-3,3e-3 model.hidden_size=64,128` by name, their runs in `outputs/NAME-sweep`.

    Raises:
        UserError: with the mistakes of all recipes, each once.
    """
    columns, cells, problems = [], {}, []
    for text in grid:
        key, _, values = text.partition("=")
        options = re.split(r",(?![^\[{]*[\]}])", values)  # a comma inside brackets is a value's
        columns.append([(key, option) for option in options])
        if key.startswith("run."):
            problems.append(("--grid", f"expected a key of another section than run, got {text!r}"))
        elif not all(options) or len(set(options)) < len(options):
            problems.append(("--grid", f"expected section.key=value,value with different values, got {text!r}"))
    for pairs in itertools.product(*columns):
        name = "-".join(re.sub(r"[^\w.+-]", "_", key.rsplit(".")[-1] + value) for key, value in pairs)
        try:
            recipe = load_recipe(path, [*overrides, *(f"--{key}={value}" for key, value in pairs)])
        except UserError as error:
            problems += [problem for problem in error.problems if problem not in problems]
            continue
        run, folder = recipe.run, recipe.folder.with_name(f"{recipe.folder.name}-sweep")
        placed = {"name": name, "output_dir": str(folder), "seeds": run.seeds or (run.seed,)}
        group = {"group": recipe.tracking.group or folder.name}
        cells[name] = Cell(dict(pairs), one_per_seed(recipe.changed(run=placed, tracking=group)))
    if problems:
        raise UserError(*problems)
    return cells


def open_sweep(cells: Mapping[str, Cell], read_only: bool = False) -> Path:
    """The folder of a sweep, whose `sweep.yaml` says which one it is; another sweep's is a `UserError` by key."""
    run, *_ = (run for cell in cells.values() for run in cell.runs)
    grid = [key for cell in cells.values() for key in cell.values]
    keys = {key: value for key, value in flatten(run.to_dict()).items() if not key.startswith((*FREE, *grid))}
    file = Path(run.run.output_dir, "sweep.yaml")
    claim_folder(file, {"--grid": " ".join(cells), **keys}, run.run.overwrite, read_only)
    return file.parent


def claim_folder(file: Path, keys: Mapping[str, Any], overwrite: bool, read_only: bool = False) -> None:
    """Makes the folder of `file`, which says by `keys` whose runs are in it; those of others are a `UserError` by key.

    Args:
        overwrite: whether to delete what is there, unless `read_only`.
        read_only: whether to look only.
    """
    folder = file.parent
    if overwrite and not read_only:
        remove_at_once(folder)
    saved = yaml.safe_load(file.read_text()) if any(folder.glob("*/recipe.yaml")) else keys  # if a run has begun
    way_out = "change it back, choose a name of its own, --run.name=NAME, or set run.overwrite"
    changed = {key: (saved.get(key), keys.get(key)) for key in sorted({*saved, *keys})}
    messages = {key: f"{folder} was begun with {old}, got {new}; {way_out}" for key, (old, new) in changed.items()}
    if problems := [(key, messages[key]) for key, (old, new) in changed.items() if old != new]:
        raise UserError(*problems)
    if not read_only:
        folder.mkdir(parents=True, exist_ok=True)
        write_file(file, yaml.safe_dump({**keys}, sort_keys=False))


def is_finished(run: Recipe) -> bool:
    """Whether there is nothing left to train."""
    return (run.folder / "final" / "config.json").is_file()


def train_here(runs: Sequence[Recipe], jobs: int) -> Iterator[tuple[Recipe, int]]:
    """Trains runs in `jobs` processes, which divide the cores; yields each with its exit code when it ends."""
    context, waiting, going = multiprocessing.get_context("spawn"), [*runs], dict[Future, Recipe]()
    with ProcessPoolExecutor(jobs, context, _start_worker, (count_threads(jobs),)) as pool:
        while waiting or going:
            while waiting and len(going) < jobs:  # those handed over cannot be taken back after Ctrl-C
                run = waiting.pop(0)
                going[pool.submit(train_quietly, run)] = run
            for future in wait(going, return_when=FIRST_COMPLETED).done:
                yield going.pop(future), future.result()


def _start_worker(threads: int) -> None:
    """Sets a worker's threads, and lets it end with the process that started it, also when that is killed."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    parent: Any = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def follow(ends: Iterable[tuple[Recipe, int]], number: int) -> None:
    """Tells how each run ends. One that diverges leaves the others alone, a mistake or a signal ends the sweep."""
    try:
        for count, (run, code) in enumerate(ends, 1):
            told = log_of(run).read_text().splitlines()[-1]
            if code == 0:
                reached, metric = last_metrics(run.folder), run.checkpoint.metric
                value = math.nan if reached[metric] is None else reached[metric]  # JSON has no NaN
                told = f"{metric} {value:.4f}, {reached['elapsed_s']:,.0f} s"
            if code == 2:
                raise UserError((str(run.run.name), told.removeprefix("error: ")))
            if code > 2:
                raise Stopped(code, f"{run.run.name} {told}")
            print(f"{count}/{number} {run.run.name}: {told}", flush=True)
    except KeyboardInterrupt:
        raise Stopped(130, "by Ctrl-C; the same command goes on from there") from None


def log_of(run: Recipe) -> Path:
    """What a run printed."""
    return run.folder.with_name(f"{run.folder.name}.log")


def train_quietly(run: Recipe) -> int:
    """Trains a run that prints to its log; the exit code that `train.py` would have."""
    with log_of(run).open("a") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        return exit_code(lambda: train(run))


def collect(cells: Mapping[str, Cell]) -> pandas.DataFrame:
    """A row for each finished run: `cell`, the grid's keys, `seed`, the last value of each metric."""
    return pandas.DataFrame(
        {"cell": name, **cell.values, "seed": run.run.seed, **last_metrics(run.folder)}
        for name, cell in cells.items()
        for run in filter(is_finished, cell.runs)
    )


def compare(values: pandas.DataFrame) -> pandas.DataFrame:
    """Means of cells, and how each differs from the first.

    Args:
        values: (seeds, cells) a metric, NaN where a run is missing.

    Returns:
        A row for each cell: `mean` over `seeds` and `interval`, half of its 95 % interval by Student's t; `difference`
        and `difference_interval`, the same of the paired differences, over `pairs`; and `p` of the paired t-test,
        corrected after Holm (1979) for the number of cells compared. What is not known is NaN.
    """
    rows, first = {}, values.iloc[:, 0]
    for name, cell in values.items():
        pairs = (cell - first).dropna()
        own = {"seeds": cell.count(), "mean": cell.mean(), "interval": half_width(cell.dropna())}
        rows[name] = {**own, "pairs": len(pairs), "difference": pairs.mean(), "difference_interval": half_width(pairs)}
        both = cell[pairs.index], first[pairs.index]
        rows[name]["p"] = stats.ttest_rel(*both).pvalue if has_spread(pairs) else math.nan
    table = pandas.DataFrame(rows).T.astype({"seeds": int, "pairs": int})
    return table.assign(p=holm(table.p))


def holm(p: pandas.Series) -> pandas.Series:
    """p-values corrected for their number, so that one below 0.05 among equal cells stays as rare as one in twenty."""
    ordered = p.dropna().sort_values()
    return (ordered * np.arange(len(ordered), 0, -1)).cummax().clip(upper=1).reindex(p.index)


def has_spread(values: Sequence[float]) -> bool:
    """Whether values differ by more than rounding."""
    return len(values) > 1 and bool(np.ptp(values) > 1e-12)


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of the mean of `values`, by Student's t."""
    return float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)) if has_spread(values) else math.nan


def with_interval(value: float, half: float) -> str:
    """A figure to the place that its interval leaves certain, `1.234 ± 0.006` say."""
    if math.isnan(half):
        return f"{value:.4f}"
    places = max(0, math.ceil(-math.log10(half / 2)))
    return f"{value:.{places}f} ± {half:.{places}f}"


def verdict(row: pandas.Series) -> str:
    """A row of `compare` in words: `0.031 ± 0.006 lower, p = 0.0004, 5 seeds`."""
    pairs, difference = int(row.pairs), row.difference
    if not pairs:
        return "no seed that both have finished"
    size = with_interval(abs(difference), row.difference_interval)
    size = f"{size} {'lower' if difference < 0 else 'higher'}" if difference else "the same"
    if math.isnan(row.p):
        why = "no spread between the seeds" if pairs > 1 else "one seed has no spread"
        return f"{size}, {pairs} seed{'s' if pairs > 1 else ''}; no p: {why}"
    return f"{size}, p {f'= {row.p:.2g}' if row.p >= 1e-4 else '< 0.0001'}, {pairs} seeds"
