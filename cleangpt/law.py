"""The law L = E + A / N^a + B / D^b of Hoffmann et al. (arXiv 2203.15556, approach 3), fitted to runs.

N is a model's parameters, D the targets trained on, L the loss in nats. A law is the five figures E, A, a, B, b.
"""

import functools
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pandas
from numpy.typing import ArrayLike
from scipy.optimize import least_squares

LEAST = {"runs": 6, "sizes": 3, "budgets": 2}  # in which five figures can be found


@dataclass(frozen=True)
class Fit:
    """A law, how certain it is, and where it was found."""

    law: list[float]
    samples: list[list[float]]  # laws of the runs resampled (bootstrap)
    residuals: list[float]  # log of a run's loss over the law's, widened for the five figures that were fitted
    budgets: list[float]  # FLOPs, the smallest and the largest

    def interval(self, parameters: float, targets: float) -> tuple[float, float]:
        """Where a run's loss is expected with 95 %: the samples' laws, and the scatter of runs around a law."""
        losses = predict(self.samples, parameters, targets)
        low, high = np.quantile(losses[:, None] * np.exp(self.residuals), [0.025, 0.975])
        return float(low), float(high)


def predict(laws: ArrayLike, parameters: ArrayLike, targets: ArrayLike) -> np.ndarray:
    """The losses of laws (n, 5) at one N and D, or of one law (5,) at several."""
    e, a, alpha, b, beta = np.asarray(laws, float).T
    return e + a * np.power(np.asarray(parameters, float), -alpha) + b * np.power(np.asarray(targets, float), -beta)


def missing(runs: pandas.DataFrame) -> str:
    """What `fit_law` lacks; empty if nothing."""
    found = {"runs": len(runs), "sizes": runs.width.nunique(), "budgets": runs.budget.nunique()}
    lacks = [f"{least} {name} (finished: {found[name]})" for name, least in LEAST.items() if found[name] < least]
    return f"a fit needs {', '.join(lacks)}" if lacks else ""


def fit_law(runs: pandas.DataFrame, num_samples: int = 200) -> Fit:
    """Fits a law to the `parameters`, `tokens` and `loss` of runs, and one to each of `num_samples` resamplings."""
    logs = np.log(runs[["parameters", "tokens", "loss"]].to_numpy(float))
    center = np.array([*logs[:, :2].mean(axis=0), 0])  # around it factors and exponents depend least on each other
    level, random, shares = np.exp(logs[:, 2].mean()), np.random.default_rng(0), (0.2, 0.5, 0.8)
    starts = [
        np.array([e * level, math.log((1 - e) * a * level), slope, math.log((1 - e) * (1 - a) * level), slope])
        for e, a, slope in itertools.product(shares, shares, (0.1, 0.5))
    ]
    best = _solve(logs - center, starts)
    draws = random.integers(len(logs), size=(num_samples, len(logs)))
    laws = np.array([best, *(_solve(logs[rows] - center, [best]) for rows in draws)])
    laws[:, [1, 3]] = np.exp(laws[:, [1, 3]] + laws[:, [2, 4]] * center[:2])
    residuals = logs[:, 2] - np.log(predict(laws[0], runs.parameters, runs.tokens))
    residuals *= math.sqrt(len(logs) / max(1, len(logs) - 5))
    return Fit(laws[0].tolist(), laws[1:].tolist(), residuals.tolist(), [runs.budget.min(), runs.budget.max()])


def _solve(logs: np.ndarray, starts: list[np.ndarray]) -> np.ndarray:
    """E, log A, a, log B, b with the least Huber loss (delta 1e-3) of log L, from the best of `starts`.

    Args:
        logs: log N and log D of each run, around their means, and log L, (runs, 3).
    """
    sizes, tokens, losses = logs.T
    highest = losses.max() + 1
    bounds = np.array([[0, highest - 20, 0, highest - 20, 0], [np.exp(highest), highest, 5, highest, 5]])

    def terms(law: np.ndarray) -> np.ndarray:
        return np.stack([law[0] + 0 * sizes, np.exp(law[1] - law[2] * sizes), np.exp(law[3] - law[4] * tokens)])

    def errors(law: np.ndarray) -> np.ndarray:
        return np.log(terms(law).sum(axis=0)) - losses

    def slopes(law: np.ndarray) -> np.ndarray:
        _, a, b = terms(law)
        return np.stack([np.ones_like(a), a, -a * sizes, b, -b * tokens], axis=1) / terms(law).sum(axis=0)[:, None]

    inside = [np.clip(start, bounds[0] + 1e-6, bounds[1] - 1e-6) for start in starts]
    solve = functools.partial(least_squares, errors, jac=slopes, bounds=bounds, x_scale="jac", max_nfev=100)
    return min((solve(start, loss="huber", f_scale=1e-3) for start in inside), key=lambda result: result.cost).x


def parabola(runs: pandas.DataFrame) -> tuple[np.ndarray, float]:
    """The parabola of loss over log N through the runs of one budget (approach 2), and the N of its minimum, or NaN."""
    curve = np.polyfit(np.log(runs.parameters), runs.loss, min(2, len(runs) - 1))
    return curve, math.exp(-curve[1] / (2 * curve[0])) if len(curve) == 3 and curve[0] > 0 else math.nan
