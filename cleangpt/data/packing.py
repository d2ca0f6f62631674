"""A split's token stream packed into rows.

windows     any offset of the stream               [the quick b][ick brown f] ...
blocks      cut end to end                         [the quick ][brown fox. ][A stitch i] ...
documents   blocks in which no document sees another: positions restart, and a seam is no target
"""

from pathlib import Path

import numpy as np

from ..errors import UserError
from .splits import IGNORED
from .stream import TokenStream


class TextSplit:
    """A split (see `Split`) of text: a row at each offset (`windows`), or rows cut end to end with a short last one."""

    def __init__(self, folder: Path, name: str, block_size: int, packing: str) -> None:
        self.stream = TokenStream(folder, name)
        self.starts = self.stream.starts if packing == "documents" else None
        self.num_bytes = self.stream.num_bytes
        seams = 0 if self.starts is None else len(self.starts) - 1
        self.num_targets = len(self.stream) - 1 - seams  # in one pass over the split
        self.sequence_length, self.packing = block_size, packing
        self.num_sequences = -(-(len(self.stream) - 1) // block_size)
        if self.num_targets < 1:
            raise UserError(("data.split", f"expected at least 2 tokens in the {name} split, got {len(self.stream)}"))

    def __len__(self) -> int:
        return len(self.stream) - self.sequence_length if self.packing == "windows" else self.num_sequences

    def _first(self, indices: np.ndarray) -> np.ndarray:
        """The place of each row's first token in the stream, int64 (n,)."""
        return np.asarray(indices).astype(np.int64) * (1 if self.packing == "windows" else self.sequence_length)

    def count_targets(self, indices: np.ndarray) -> int:
        """The number of targets in the rows at `indices` (n,), without reading a token."""
        first = self._first(indices)
        last = np.minimum(first + self.sequence_length, len(self.stream) - 1)  # the place of the last target
        starts = np.empty(0, np.int64) if self.starts is None else self.starts
        seams = np.searchsorted(starts, last, "right") - np.searchsorted(starts, first, "right")
        return int((last - first - seams).sum())

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of rows; `documents` have `position_ids`."""
        first = self._first(indices)
        width, end = self.sequence_length + 1, len(self.stream)
        if first.max(initial=0) + width <= end:
            ids = self.stream.read(first, width)
            targets = ids[:, 1:]
        else:  # the last block ends early
            places = first[:, None] + np.arange(width)
            ids = self.stream.gather(np.minimum(places, end - 1))
            targets = np.where(places[:, 1:] < end, ids[:, 1:], IGNORED)
        if self.starts is None:
            return {"input_ids": ids[:, :-1], "targets": targets}
        seams, place = _find_seams(self.starts, first, width), np.arange(width - 1)
        begin = np.maximum.accumulate(np.where(seams[:, :-1], place, 0), axis=1)
        targets = np.where(seams[:, 1:], IGNORED, targets)
        return {"input_ids": ids[:, :-1], "targets": targets, "position_ids": place - begin}


def _find_seams(starts: np.ndarray, first: np.ndarray, width: int) -> np.ndarray:
    """Where documents start in the rows of `width` tokens from each of `first` on, bool (n, width)."""
    begin, stop = np.searchsorted(starts, first), np.searchsorted(starts, first + width)
    count = stop - begin  # documents that start in each row
    row = np.repeat(np.arange(len(first)), count)
    document = np.arange(len(row)) + np.repeat(begin - np.cumsum(count) + count, count)
    seams = np.zeros((len(first), width), bool)
    seams[row, starts[document] - first[row]] = True
    return seams


def document_lengths(folder: Path, name: str) -> np.ndarray:
    """Tokens of each document of a split, end tokens included, int64 (documents,)."""
    stream = TokenStream(folder, name)
    return np.diff(stream.starts, append=len(stream))
