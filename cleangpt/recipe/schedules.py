"""Schedules as pure functions of the step: one mechanism for learning rate, weight decay and accumulation.

A factor over a run, here with `warmup_ratio` 0.25 and `decay_ratio` 0.5:

    peak         ______
               /        \\            constant, linear, cosine, power: down (or up) right after the warm-up, then flat
              /           \\______    wsd (warm-up, stable, decay): flat after the warm-up, down at the very end
    begin    /
             0   .25    .75     1     progress = step / max_steps, where the first step is 1

The rate's peak is 1 (`optimizer.lr`). Weight decay and accumulation have no peak: they stay at `begin` for the warm-up
and then go to `end`.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .keys import LrSchedule, Optimizer, Recipe, Schedule, Schedules
from .sources import Source


class Values(NamedTuple):
    """What the schedules say for one step."""

    lr: float
    weight_decay: float
    accumulation: int  # the factor on `training.batch_size`, at least 1


def at(schedules: Schedules, optimizer: Optimizer, step: int, max_steps: int) -> Values:
    """The values for optimizer step number `step`, from 1."""
    weight_decay, accumulation, progress = schedules.weight_decay, schedules.accumulation, step / max_steps
    return Values(
        lr=optimizer.lr * factor(schedules.lr, progress, peak=1.0),
        weight_decay=optimizer.weight_decay * factor(weight_decay, progress, peak=weight_decay.begin),
        accumulation=math.floor(factor(accumulation, progress, peak=accumulation.begin) + 0.5),
    )


def factor(schedule: Schedule | LrSchedule, progress: float, peak: float) -> float:
    """A schedule's factor at `progress` = step / max_steps, in (0, 1]."""
    warmup, decay = schedule.warmup_ratio, decay_ratio(schedule)
    if progress < warmup:
        return schedule.begin + (peak - schedule.begin) * progress / warmup
    start = 1 - decay if schedule.style == "wsd" else warmup
    done = 1.0 if decay == 0 and progress > start else (progress - start) / decay if decay else 0.0
    done, style, end = min(max(done, 0.0), 1.0), schedule.style, schedule.end
    if style == "constant":
        return peak
    if style in ("linear", "wsd"):
        return peak + (end - peak) * done
    if style == "cosine":  # half a period (arXiv 1608.03983)
        return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * done))
    return peak * (end / peak) ** done  # `power` is geometric, and needs both above 0


def decay_ratio(schedule: Schedule | LrSchedule) -> float:
    """Share of the run that goes from the peak to `end`: by default all after the warm-up, the last fifth for `wsd`."""
    if schedule.decay_ratio is not None:
        return schedule.decay_ratio
    return 0.2 if schedule.style == "wsd" else 1 - schedule.warmup_ratio


def sequences_per_step(recipe: Recipe) -> np.ndarray:
    """Sequences that each step of a resolved recipe draws over all processes, int64 (max_steps,).

    In a branch, the first step stands for all that the other run had drawn.
    """
    max_steps, branch = recipe.training.max_steps or 0, recipe.branched_from
    values = [at(recipe.schedule, recipe.optimizer, step, max_steps) for step in range(1, max_steps + 1)]
    sequences = recipe.training.batch_size * np.array([value.accumulation for value in values], np.int64)
    if branch is not None and branch.step:
        sequences[: branch.step] = 0
        sequences[0] = branch.sequences
    return sequences


def source_weights(sources: Sequence[Source], progress: np.ndarray) -> np.ndarray:
    """The weight of each source of a mixture at `progress` (n,) = step / `max_steps`, (n, sources)."""
    given = [source.weight for source in sources]
    begin, end = np.array([(w, w) if isinstance(w, float) else (w.begin, w.end) for w in given]).T
    return begin + (end - begin) * progress[:, None]


def source_shares(recipe: Recipe) -> np.ndarray | None:
    """Each source's share of the rows of each step of a resolved recipe, (max_steps, sources); None without sources.

    In a branch, the first step has the mean share of all that it stands for.
    """
    max_steps, branch = recipe.training.max_steps or 0, recipe.branched_from
    if not recipe.data.sources:
        return None
    weights = source_weights(recipe.data.sources, np.arange(1, max_steps + 1) / max_steps)
    shares = weights / weights.sum(axis=1, keepdims=True)
    if branch is not None and branch.step:
        shares[0] = shares[: branch.step].mean(axis=0)
    return shares


def steps_for(sequences: float, batch_size: int, schedules: Schedules, optimizer: Optimizer) -> int:
    """Steps that draw at least `sequences` sequences, `batch_size` times the accumulation factor in each."""
    mean = sum(at(schedules, optimizer, step, 1000).accumulation for step in range(1, 1001)) / 1000
    return max(1, math.ceil(sequences / (batch_size * mean)))


def is_flat(schedule: Schedule | LrSchedule) -> bool:
    """Whether the factor is the same at every step, so that `max_steps` may change under it."""
    return schedule.style == "constant" and schedule.warmup_ratio == 0
