"""One recipe with several seeds: its runs, and the mean and spread of what they reach."""

import json
from pathlib import Path

from ..recipe.keys import Recipe


def one_per_seed(recipe: Recipe) -> list[Recipe]:
    """The recipe of each run, `NAME-seed1` say; one group in a tracker."""
    name, group = recipe.run.name, recipe.tracking.group or recipe.run.name
    return [
        recipe.changed(run={"name": f"{name}-seed{seed}", "seed": seed, "seeds": None}, tracking={"group": group})
        for seed in recipe.run.seeds or ()
    ]


def last_metrics(folder: Path) -> dict[str, float]:
    """The latest value of each metric in a run's `metrics.jsonl`."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return {key: value for line in lines for key, value in line.items()}


def describe_spread(folders: list[Path]) -> str:
    """A table of the runs' last evaluations, and their mean and standard deviation (of a sample, n - 1)."""
    import pandas  # a quarter of a second that only a table needs

    table = pandas.DataFrame([last_metrics(folder) for folder in folders], [folder.name for folder in folders])
    table = table.filter(regex="^eval/")
    return pandas.concat([table, table.agg(["mean", "std"])]).to_string(float_format="{:.4f}".format)
