"""How far a run is: what its checkpoints hold besides weights and optimizer state."""

import math
from dataclasses import dataclass, field

from ..recipe.keys import EarlyStopping


@dataclass
class Progress:
    """What a run knows besides weights and optimizer state."""

    step: int = 0  # completed optimizer steps
    tokens: int = 0  # targets trained on
    elapsed_s: float = 0.0  # added up over restarts
    metrics: dict = field(default_factory=dict)  # the latest evaluation
    metric: str | None = None  # the `checkpoint.metric` that the next five fields are about
    best: float | None = None  # its best value so far
    best_step: int | None = None  # step of that evaluation
    average_is_better: bool = False  # whether, in the latest evaluation, averaged weights were
    evaluations_without_gain: int = 0  # evaluations since then, which early stopping counts
    stopped_early: bool = False  # whether early stopping ended the run
    # Step of the latest boundary whose work is done. If a signal arrives just before a boundary, the resumed run does
    # that boundary's work.
    boundary: int = -1
    skipped: int = 0  # steps in a row, up to this one, that were not finite
    losses: list[float] = field(default_factory=list)  # of the steps since the last line of metrics
    noise: list[float] = field(default_factory=lambda: [0.0, 0.0])  # running means, see `noise.py`
    logged: dict = field(default_factory=dict)  # the latest training metrics that were logged
    scaler: dict | None = None  # the state of fp16's gradient scaler

    def update_best(self, metric: str, early_stopping: EarlyStopping) -> bool:
        """Takes in the latest evaluation, decides whether the run stops early, and returns whether it is the best."""
        if self.metric != metric:
            self.metric, self.best, self.best_step, self.evaluations_without_gain = metric, None, None, 0
        values, sign = self.logged | self.metrics, 1 if metric == "eval/accuracy" else -1
        value = values[metric]
        average = values.get(metric.replace("eval/", "eval/ema/"), math.nan)
        self.average_is_better = math.isfinite(average) and not sign * (value - average) >= 0
        value = average if self.average_is_better else value
        gain = math.inf if self.best is None else (value - self.best) * sign
        if not math.isfinite(value):
            gain = -math.inf  # never the best, not even as the first
        self.evaluations_without_gain = 0 if gain > early_stopping.min_delta else self.evaluations_without_gain + 1
        self.stopped_early = self.evaluations_without_gain >= (early_stopping.patience or math.inf)
        if gain > 0:
            self.best, self.best_step = value, self.step
        return gain > 0
