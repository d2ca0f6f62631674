"""Scaling laws: one recipe at several sizes and budgets of compute, and the size that another budget wants.

    sizes x budgets ──> ordinary runs, equal FLOPs at a budget ──> L = E + A / N^a + B / D^b ──> a size for any budget

N counts all weights, D the targets trained on, L is the last `eval/loss`, in nats (Hoffmann et al., arXiv 2203.15556).
"""

import bisect
import functools
import itertools
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas
import torch
from numpy.typing import ArrayLike
from transformers import AutoModelForCausalLM

from .errors import UserError
from .law import LEAST, Fit, predict
from .models.build import config_for, load_config
from .models.statistics import flops_per_token
from .recipe.keys import Recipe, flatten
from .recipe.reading import load_recipe
from .recipe.schedules import sequences_per_step, steps_for
from .sweep import FREE, claim_folder, is_finished
from .training.seeds import last_metrics
from .training.setup import load_data

# Unless the command line says otherwise, a run evaluates at its end only, and saves a checkpoint after each quarter.
GIVEN = ["--evaluation.at_start=false", "--evaluation.every=4", "--evaluation.prompts=[]"]
GIVEN += ["--checkpoint.metric=eval/loss", "--training.early_stopping.patience=null"]
DECIDED = ("training.max_steps", "training.max_epochs")  # by the budget
COLUMNS = ["run", "width", "budget", "parameters", "steps", "tokens", "epochs", "flops", "loss", "seconds"]


class Cost(NamedTuple):
    """What a width costs."""

    parameters: int  # all weights, tied ones counted once
    flops: int  # of training on a sequence, see `flops_per_token`
    targets: float  # in a sequence, in the mean


@dataclass(frozen=True)
class Family:
    """A recipe at any width: heads stay as wide as they are, layers as many, other keys as the recipe has them."""

    recipe: Recipe
    folder: Path  # of its runs and its fit
    unit: int  # widths are multiples of it, so that heads come out whole
    epoch: int  # sequences in the train split
    cost: Callable[[int], Cost]  # of a width

    def settings(self, width: int, steps: int) -> list[str]:
        """What makes the recipe a run of a width, as the command line has it."""
        epochs = [] if self.recipe.training.max_epochs is None else ["--training.max_epochs=null"]
        shape = [f"--model.{key}={value}" for key, value in shape_at(self.recipe, width).items()]
        return [*shape, *epochs, f"--training.max_steps={steps}"]

    def steps(self, width: int, budget: float) -> int:
        """Optimizer steps that spend a budget of FLOPs, the last one begun within it; 0 if it is too small for one."""
        recipe, sequences = self.recipe, budget / self.cost(width).flops
        batch = recipe.training.batch_size
        return steps_for(sequences, batch, recipe.schedule, recipe.optimizer) if sequences >= batch else 0

    def sequences(self, steps: int) -> int:
        """Sequences that a run of so many steps draws."""
        return int(sequences_per_step(self.recipe.changed(training={"max_steps": steps})).sum())

    def claim(self, read_only: bool = False) -> None:
        """Takes the folder; that of another recipe is a `UserError` by key."""
        keys = {key: value for key, value in flatten(self.recipe.to_dict()).items() if not key.startswith(FREE)}
        keys = {key: value for key, value in keys.items() if key not in (*DECIDED, "training.macro_batch")}
        run = self.recipe.run
        claim_folder(self.folder / "scaling.yaml", {"run.seed": run.seed, **keys}, run.overwrite, read_only)


def open_family(path: str | Path, overrides: Sequence[str] = ()) -> Family:
    """The family of a recipe, whose data is built if it is not in the cache.

    Raises:
        UserError: as training would, and for keys that have no meaning in a family.
    """
    recipe = load_recipe(path, [*GIVEN, *overrides])
    given = {text.partition("=")[0] for text in overrides}
    problems = [(key, "remove it, the budget decides how long a run is") for key in DECIDED if f"--{key}" in given]
    if recipe.run.seeds is not None:
        problems.append(("run.seeds", f"expected null, each size and budget is one run, got {list(recipe.run.seeds)}"))
    if "init_from" in recipe.model:
        problems.append(("model.init_from", f"expected null, weights have one size, got {recipe.model['init_from']!r}"))
    if problems:
        raise UserError(*problems)
    width = load_config(recipe.model).hidden_size
    heads = [value for key, value in shape_at(recipe, width).items() if key.endswith("_heads")]
    resolved, data = load_data(recipe)
    split = data.splits["train"]
    sample = np.arange(min(len(split), 1000))
    targets = split.count_targets(sample) / len(sample)

    @functools.cache
    def cost(width: int) -> Cost:
        config = config_for({**resolved.model, **shape_at(recipe, width)}, data.tokenizer, split.sequence_length)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        return Cost(model.num_parameters(), flops_per_token(model) * split.sequence_length, targets)

    folder = recipe.folder.with_name(f"{recipe.folder.name}-scaling")
    return Family(recipe, folder, width // math.gcd(width, *heads), split.num_sequences, cost)


def shape_at(recipe: Recipe, width: int) -> dict[str, int]:
    """The keys of a recipe's model that change with its width: heads, and an MLP whose width is given."""
    config = load_config(recipe.model)
    keys = [key for key in ("num_attention_heads",) if hasattr(config, key)]
    keys += [key for key in ("num_key_value_heads", "intermediate_size") if key in recipe.model]
    scale = Fraction(width, config.hidden_size)
    return {"hidden_size": width, **{key: round(getattr(config, key) * scale) for key in keys}}


def check_budget(key: str, text: str) -> list[tuple[str, str]]:
    """What is wrong with a number of FLOPs as the command line has it."""
    try:
        is_budget = 0 < float(text) < math.inf
    except ValueError:
        is_budget = False
    return [] if is_budget else [(key, f"expected a number of FLOPs above 0, 1e13 say, got {text!r}")]


def make_runs(
    path: str | Path, budgets: Sequence[str], sizes: Sequence[str] = (), overrides: Sequence[str] = ()
) -> tuple[Family, dict[str, Recipe]]:
    """A family and its runs by name, `128-1e13` say: each size at each budget, small budgets first.

    Args:
        budgets: FLOPs, as the command line has them.
        sizes: hidden sizes; by default six around the recipe's own, each with twice the weights in its blocks.

    Raises:
        UserError: with all mistakes.
    """
    problems = [problem for text in budgets for problem in check_budget("--budgets", text)]
    try:
        family = open_family(path, overrides)
    except UserError as error:
        raise UserError(*problems, *error.problems) from error
    unit, own = family.unit, load_config(family.recipe.model).hidden_size
    expected = f"expected multiples of {unit}, where heads are as wide as the recipe's, got"
    wrong = [text for text in sizes if not text.isdecimal() or int(text) < 1 or int(text) % unit]
    problems += [("--sizes", f"{expected} {text!r}") for text in wrong]
    if problems:
        raise UserError(*problems)
    around = {max(1, round(own / unit * 2 ** (half / 2))) * unit for half in range(-3, 3)}
    widths, flops = [*map(int, sizes)] or sorted(around), sorted(map(float, budgets))
    for name, values in (("sizes", widths), ("budgets", flops)):
        if len({*values}) < max(LEAST[name], len(values)):
            shown = " ".join(f"{value:g}" for value in values)
            problems.append((f"--{name}", f"expected at least {LEAST[name]}, all different, got {shown}"))
    for budget in flops:
        if not family.steps(widest := max(widths), budget):
            problems.append(("--budgets", f"expected at least a step at width {widest}, got {budget:g} FLOPs"))
    if problems:
        raise UserError(*problems)
    runs = {}
    for budget, width in itertools.product(flops, widths):
        steps, name = family.steps(width, budget), f"{width}-{short(budget)}"
        quarter = f"--training.macro_batch={math.ceil(steps / 4)}"
        recipe = load_recipe(path, [*GIVEN, quarter, *overrides, *family.settings(width, steps)])
        group = recipe.tracking.group or family.folder.name
        place = {"name": name, "output_dir": str(family.folder)}
        runs[name] = recipe.changed(run=place, tracking={"group": group})
    return family, runs


def short(budget: float) -> str:
    """A budget as it is usually written, `3e13`."""
    return re.sub(r"e\+0*", "e", f"{budget:g}")


def collect(family: Family, runs: Mapping[str, Recipe]) -> pandas.DataFrame:
    """A row for each finished run that has a loss, with the columns of `runs.csv`."""
    rows = []
    for name, run in runs.items():
        reached: dict = last_metrics(run.folder) if is_finished(run) else {}
        if reached.get("eval/loss") is None:  # not finished, or diverged
            continue
        width, budget = run.model["hidden_size"], float(name.partition("-")[2])
        cost, sequences = family.cost(width), family.sequences(reached["step"])
        size = name, width, budget, cost.parameters, reached["step"], reached["tokens"], sequences / family.epoch
        rows.append((*size, cost.flops * sequences, reached["eval/loss"], reached["elapsed_s"]))
    return pandas.DataFrame(rows, columns=COLUMNS)


def best_width(family: Family, law: ArrayLike, budget: float) -> int:
    """The width of the least loss that a law foretells for a budget, of at most 4,096 units."""

    def loss(width: int) -> float:
        cost = family.cost(width)
        return float(predict(law, cost.parameters, budget / cost.flops * cost.targets))

    unit = family.unit  # on either side of the best width the loss only rises
    return unit * (1 + bisect.bisect_left(range(1, 4096), True, key=lambda k: loss(unit * (k + 1)) >= loss(unit * k)))


class Proposal(NamedTuple):
    """What a budget wants, by a law."""

    parameters: int
    range: tuple[int, int]  # of the parameters that the resampled laws would take, 95 %
    tokens: int
    steps: int
    loss: float
    interval: tuple[float, float]  # of a run's loss, 95 %
    settings: list[str]  # that make the recipe this run


def propose(family: Family, fit: Fit, budget: float) -> Proposal:
    """The width and the steps of the least loss for a budget; a `UserError` if that is less than a step."""
    width = best_width(family, fit.law, budget)
    steps, (parameters, _, targets) = family.steps(width, budget), family.cost(width)
    if not steps:
        raise UserError(("--budget", f"expected at least a step at width {width}, got {budget:g} FLOPs"))
    tokens = round(family.sequences(steps) * targets)
    widths = [best_width(family, law, budget) for law in fit.samples]
    low, high = (family.cost(int(width)).parameters for width in np.quantile(widths, [0.025, 0.975], method="nearest"))
    loss, interval = float(predict(fit.law, parameters, tokens)), fit.interval(parameters, tokens)
    return Proposal(parameters, (low, high), tokens, steps, loss, interval, family.settings(width, steps))


def load_fit(family: Family) -> Fit:
    """The saved fit of a family; a `UserError` where there is none, or one of another recipe."""
    file = family.folder / "fit.json"
    if not file.is_file():
        raise UserError(("--budget", f"expected a fit in {file}, which scripts/scaling.py RECIPE --budgets ... makes"))
    family.claim(read_only=True)
    return Fit(**json.loads(file.read_text()))
