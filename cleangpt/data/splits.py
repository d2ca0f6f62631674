"""What splits of any data have in common: rows of inputs and targets, cut exactly."""

from fractions import Fraction
from typing import Protocol

import numpy as np

IGNORED = -100  # the target that cross-entropy skips


class Split(Protocol):
    """A split of `len(split)` rows in each epoch; `split[indices]` is a batch.

    Rows are numbered without end: number n is row n % len(split) of epoch n // len(split), which may cut anew.
    """

    sequence_length: int  # tokens per row
    num_sequences: int  # rows in one pass over the split

    def __len__(self) -> int: ...

    def count_targets(self, indices: np.ndarray) -> int:
        """The number of targets in the rows numbered `indices` (n,)."""
        ...

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The rows numbered `indices` (n,), int64 (n, sequence_length): `input_ids`, `targets` (next tokens or
        IGNORED) and, for packed documents, `position_ids`, which restart at each document."""


def cut_points(total: int, fractions: dict[str, float]) -> dict[str, tuple[int, int]]:
    """Start and stop of each split among `total` places: in order, at the exact floor(total * sum of shares so far)."""
    points, share = [0], Fraction(0)
    for fraction in fractions.values():
        share += Fraction(str(fraction))
        points.append(int(total * share))
    return {name: (points[i], points[i + 1]) for i, name in enumerate(fractions)}
