"""Several sources as one split, and which of them each place in the order of samples takes.

    weights 2 : 1     place   0  1  2  3  4  5 ...
                      source  a  b  a  a  b  a ...

The first source takes a place where its share, summed over the places so far, passes the next k + 1/2; the other
sources share the places that are left in the same way: a pure function of place and weights.
"""

from collections.abc import Mapping

import numpy as np

from .packing import TextSplit
from .splits import Split


class Mixture:
    """Splits of text as one (see `Split`): an epoch's rows are those of one source after the other."""

    def __init__(self, sources: Mapping[str, TextSplit]) -> None:
        """`sources` by label, all packed alike."""
        self.sources, splits = sources, [*sources.values()]
        self.sequence_length = splits[0].sequence_length
        self.num_sequences = sum(split.num_sequences for split in splits)
        self.lengths = np.array([len(split) for split in splits])
        self.ends = np.cumsum(np.append(0, self.lengths))

    def __len__(self) -> int:
        return int(self.ends[-1])

    def end_to_end(self) -> "Mixture":
        """The same texts cut end to end, in which each token is measured once."""
        return Mixture({label: split.end_to_end() for label, split in self.sources.items()})

    def number(self, source: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """The numbers here of the rows that their sources number `rows` (n,)."""
        epochs, rows = np.divmod(rows, self.lengths[source])
        return epochs * len(self) + self.ends[source] + rows

    def _locate(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The source of each row numbered `indices` (n,), and its number there."""
        epochs, places = np.divmod(np.asarray(indices).astype(np.int64), len(self))
        source = np.searchsorted(self.ends, places, side="right") - 1
        return source, epochs * self.lengths[source] + places - self.ends[source]

    def count_targets(self, indices: np.ndarray) -> int:
        """The number of targets in the rows numbered `indices` (n,)."""
        source, rows = self._locate(indices)
        return sum(split.count_targets(rows[source == i]) for i, split in enumerate(self.sources.values()))

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of the rows numbered `indices`."""
        source, rows = self._locate(indices)
        splits = [*self.sources.values()]
        parts = [splits[i][rows[source == i]] for i in np.unique(source)]
        place = np.argsort(np.argsort(source, kind="stable"))  # of each row among the parts
        return {name: np.concatenate([part[name] for part in parts])[place] for name in parts[0]}


class Turns:
    """The order in which a mixture's sources take turns."""

    def __init__(self, shares: np.ndarray, ends: np.ndarray) -> None:
        """`shares` (steps, sources) of each step's rows add up to 1; `ends` (steps + 1,) are rows drawn after each."""
        self.places = np.append(ends, ends[-1] + 1000)  # so that the end is no bound
        due = np.diff(self.places)[:, None] * np.concatenate([shares, shares[-1:]])
        self.due = np.concatenate([np.zeros_like(shares[:1]), np.cumsum(due, axis=0)])  # of each source by these places

    def _taken(self, places: np.ndarray) -> np.ndarray:
        """Rows of each source among the first `places` (n,) places, int64 (sources, n)."""
        taken, left, axis = [], np.asarray(places), self.places.astype(float)
        for due in self.due.T[:-1]:  # among the places that earlier sources leave
            rows = np.floor(np.round(np.interp(left, axis, due), 6) + 0.5)  # rounded: ties are ties on every machine
            taken.append(np.minimum(rows.astype(np.int64), left))
            left, axis = left - taken[-1], axis - due
        return np.stack([*taken, left])

    def drawn(self, place: int) -> np.ndarray:
        """Rows of each source among the first `place` places, int64 (sources,)."""
        return self._taken(np.array([place]))[:, 0]

    def between(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each place from `first` to before `last`, and which of its rows it is, from 0; int64 (n,)."""
        taken = self._taken(np.arange(first, last + 1))
        source = np.diff(taken).argmax(axis=0)
        return source, taken[source, np.arange(last - first)]


def texts_of(split: Split) -> dict[str, TextSplit]:
    """The sources of a split of text by label; one that is no mixture has the label "", arithmetic has none."""
    if isinstance(split, Mixture):
        return dict(split.sources)
    return {"": split} if isinstance(split, TextSplit) else {}
