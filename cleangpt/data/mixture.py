"""Several sources as one split, and which of them each place in the order of samples takes.

    weights 2 : 1     place   0  1  2  3  4  5 ...
                      source  a  b  a  a  b  a ...

Row k of a source is due at the place where its share, summed over the places before, reaches k + 1/2 rows, and places
take rows as they fall due (Webster's method of apportionment): a pure function of place and weights.
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

    def number(self, source: int, rows: np.ndarray) -> np.ndarray:
        """The numbers here of the rows that a source numbers `rows` (n,)."""
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
        self.places = np.append(ends, ends[-1] + 1000)  # beyond the last, some rows are due next
        self.rows = np.cumsum(np.diff(self.places)[:, None] * np.concatenate([shares, shares[-1:]]), axis=0)
        self.rows = np.concatenate([np.zeros_like(shares[:1]), self.rows])  # due of each source by then

    def _due(self, source: int, rows: np.ndarray) -> np.ndarray:
        """The place at which each of `rows` of a source is due, rounded so that ties are ties on every machine."""
        return np.round(np.interp(rows + 0.5, self.rows[:, source], self.places), 3)

    def drawn(self, place: int) -> np.ndarray:
        """Rows of each source among the first `place` places, int64 (sources,)."""
        shares = np.array([np.interp(place, self.places, rows) for rows in self.rows.T])
        first = np.maximum(np.floor(shares).astype(np.int64) - len(shares), 0)  # rows before these are drawn for sure
        window = np.arange(2 * len(shares) + 2)
        due = np.concatenate([self._due(source, row + window) for source, row in enumerate(first)])
        order = np.argsort(due, kind="stable")[: place - first.sum()]  # ties go to the earlier source
        return first + np.bincount(order // len(window), minlength=len(shares))

    def between(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The source of each place from `first` to before `last`, and which of its rows it is, from 0; int64 (n,)."""
        ranges = zip(self.drawn(first), self.drawn(last), strict=True)
        rows = [np.arange(begin, end) for begin, end in ranges]
        order = np.argsort(np.concatenate([self._due(*item) for item in enumerate(rows)]), kind="stable")
        source = np.repeat(np.arange(len(rows)), [len(one) for one in rows])
        return source[order], np.concatenate(rows)[order]


def texts_of(split: Split) -> dict[str, TextSplit]:
    """The sources of a split of text by label; one that is no mixture has the label "", arithmetic has none."""
    if isinstance(split, Mixture):
        return dict(split.sources)
    return {"": split} if isinstance(split, TextSplit) else {}
