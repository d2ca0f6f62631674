"""The gradient's noise scale: about the batch above which more sequences in a step teach little (arXiv 1812.06162).

For sequences whose gradients have the mean G and the covariance Σ it is tr Σ / |G|², in sequences. Appendix A of the
paper finds both from squared norms of a small and a large batch's gradient. Here the small ones are the micro-steps of
all processes, which may be unequal: their parts of a step of R sequences, r of them each, add up to its gradient, and

    E |whole|²       = |G|² + tr Σ / R
    E sum of |part|² = |G|² sum of (r / R)² + tr Σ / R
"""

import math

import torch
from torch import Tensor, nn

DECAY = 0.99  # of the running means, a step


class SquaredNorms:
    """Adds up squared norms of micro-steps' gradients as the backward pass brings them, before processes average."""

    def __init__(self, model: nn.Module) -> None:
        self.total: Tensor | float = 0.0
        for weight in model.parameters():
            if weight.requires_grad:
                weight.register_hook(self._add)

    def _add(self, gradient: Tensor) -> None:
        self.total = self.total + torch.linalg.vector_norm(gradient, dtype=torch.float32).square()

    def take(self) -> Tensor | float:
        """The sum since the last call."""
        total, self.total = self.total, 0.0
        return total


def add_step(means: list[float], whole: float, parts: float, rows: int, shares: float) -> list[float]:
    """The running means of tr Σ and |G|², and a step more.

    Args:
        whole: the squared norm of the step's gradient.
        parts: the sum of the squared norms of its parts.
        rows: its sequences, R.
        shares: the sum of (r / R)².
    """
    square = (whole - parts) / (1 - shares)
    latest = rows * (whole - square), square
    return [DECAY * old + (1 - DECAY) * new for old, new in zip(means, latest, strict=True)]


def noise_scale(means: list[float]) -> float:
    """The noise scale, in sequences; NaN while the noise hides the mean."""
    covariance, square = means
    return covariance / square if square > 0 else math.nan
