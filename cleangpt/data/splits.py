"""What splits of any data have in common: exact sizes, and rows of inputs and targets.

A split is anything with `len(split)` rows, where `split[indices]` gives a batch: a dictionary of int64 arrays (n, time)
with `input_ids`, `targets` (the next token of each input, or IGNORED) and perhaps `position_ids`.
"""

from fractions import Fraction

IGNORED = -100  # the target that cross-entropy leaves out


def cut_points(total: int, fractions: dict[str, float]) -> dict[str, tuple[int, int]]:
    """Where each split starts and stops among `total` places: in order, exactly, at floor(total * share so far)."""
    points, share = [0], Fraction(0)
    for fraction in fractions.values():
        share += Fraction(str(fraction))
        points.append(int(total * share))
    return {name: (points[i], points[i + 1]) for i, name in enumerate(fractions)}
