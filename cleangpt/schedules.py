"""Schedules as pure functions of the step: one mechanism for rate, weight decay and accumulation.

A factor over a run, here for `warmup_ratio` 0.25 and `decay_ratio` 0.5:

    peak         ______
               /        \\            constant, linear, cosine, power: down (or up) right after the warm-up, then flat
              /           \\______    wsd (warm-up, stable, decay): flat after the warm-up, down at the very end
    begin    /
             0   .25    .75     1     progress = step / max_steps, with the first step counted as 1

For the rate the peak is 1 (`optimizer.lr`); weight decay and accumulation have no peak of their own and go from `begin`
to `end` directly, after staying at `begin` for the warm-up.
"""

import math
from typing import NamedTuple

WSD_DECAY = 0.2  # the share of a run in which `wsd` decays, where nothing is said


def interpolate(style: str, begin: float, end: float, progress: float) -> float:
    """The value `progress` (0 to 1) of the way from `begin` to `end`.

    `linear`; `cosine`, half a period (arXiv 1608.03983); `power`, geometric, begin * (end / begin) ** progress, which
    needs both above 0; `constant` stays at `begin`.
    """
    if style == "constant":
        return begin
    if style == "linear" or style == "wsd":
        return begin + (end - begin) * progress
    if style == "cosine":
        return end + (begin - end) * 0.5 * (1 + math.cos(math.pi * progress))
    if style == "power":
        return begin * (end / begin) ** progress
    raise ValueError(f"unknown schedule style {style!r}")


def factor(
    style: str, progress: float, *, warmup: float, decay: float | None, begin: float, end: float, peak: float
) -> float:
    """A schedule's factor at `progress` = step / max_steps, in (0, 1].

    Args:
        style: `constant`, `linear`, `cosine`, `power` or `wsd`.
        warmup: fraction of the run that goes linearly from `begin` to `peak`.
        decay: fraction of the run that goes from `peak` to `end`; None is all the rest (the last fifth for `wsd`).
    """
    if progress < warmup:
        return begin + (peak - begin) * progress / warmup
    if style == "wsd":
        decay = WSD_DECAY if decay is None else decay
        start = 1 - decay
    else:
        decay = 1 - warmup if decay is None else decay
        start = warmup
    done = 1.0 if decay == 0 and progress > start else (progress - start) / decay if decay else 0.0
    return interpolate(style, peak, end, min(max(done, 0.0), 1.0))


class Values(NamedTuple):
    """What the schedules say for one step."""

    lr: float
    """The learning rate."""
    weight_decay: float
    """The weight decay."""
    accumulation: int
    """The whole number, at least 1, that multiplies `training.batch_size`."""


def at(schedule, optimizer, step: int, max_steps: int) -> Values:
    """The values for optimizer step number `step` (from 1); `schedule` and `optimizer` are the recipe's sections."""
    lr, weight_decay, accumulation = schedule.lr, schedule.weight_decay, schedule.accumulation
    progress = step / max_steps
    return Values(
        lr=optimizer.lr * _factor_of(lr, progress, peak=1.0),
        weight_decay=optimizer.weight_decay * _factor_of(weight_decay, progress, peak=weight_decay.begin),
        accumulation=math.floor(_factor_of(accumulation, progress, peak=accumulation.begin) + 0.5),
    )


def _factor_of(section, progress: float, peak: float) -> float:
    return factor(
        section.style,
        progress,
        warmup=section.warmup_ratio,
        decay=section.decay_ratio,
        begin=section.begin,
        end=section.end,
        peak=peak,
    )


def steps_for(sequences: float, batch_size: int, schedule, optimizer) -> int:
    """Steps that draw at least `sequences` sequences, `batch_size` times the accumulation factor in each."""
    mean = sum(at(schedule, optimizer, step, 1000).accumulation for step in range(1, 1001)) / 1000
    return max(1, math.ceil(sequences / (batch_size * mean)))


def is_flat(schedule) -> bool:
    """Whether the factor is the same at every step, so that `max_steps` may change under it."""
    return schedule.style == "constant" and schedule.warmup_ratio == 0
