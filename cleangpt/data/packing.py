"""A split's token stream packed into rows.

windows     any offset of the stream               [the quick b][ick brown f] ...
blocks      cut end to end                         [the quick ][brown fox. ][A stitch i] ...
documents   blocks in which no document sees another: positions restart, and a seam is no target

Each epoch cuts anew, a pure function of seed and epoch: `blocks` from another offset on, round the stream's end to its
beginning, `documents` in another order of them. The first epoch goes from beginning to end, as evaluation does.
"""

import functools
from pathlib import Path

import numpy as np

from ..errors import UserError
from .permutation import permute
from .splits import IGNORED
from .stream import TokenStream

PIECE = 1 << 16  # documents permuted at once


class TextSplit:
    """A split (see `Split`) of text: a row at each offset (`windows`), or rows cut end to end with a short last one."""

    def __init__(self, folder: Path, name: str, block_size: int, packing: str, seed: int = 0) -> None:
        self.stream = TokenStream(folder, name)
        self.labels = self.stream.labels
        self.starts = self.stream.starts if packing == "documents" else None
        self.num_bytes = self.stream.num_bytes
        self.num_tokens = len(self.stream)
        seams = 0 if self.starts is None else len(self.starts) - 1
        self.num_targets = self.num_tokens - 1 - seams  # in one pass over the split
        if self.labels is not None:
            self.num_targets = int(sum(np.count_nonzero(part != IGNORED) for part in self.labels))
        self.sequence_length, self.packing, self.seed = block_size, packing, seed
        self.num_sequences = -(-(self.num_tokens - 1) // block_size)
        self.offset, self.documents = functools.cache(self._offset), functools.lru_cache(2)(self._documents)
        if self.num_targets < 1:
            expected = "at least 2 tokens" if self.labels is None else "something that the assistant says"
            raise UserError(("data.split", f"expected {expected} in the {name} split, got {self.num_tokens} tokens"))

    def __len__(self) -> int:
        return self.num_tokens - self.sequence_length if self.packing == "windows" else self.num_sequences

    def end_to_end(self) -> "TextSplit":
        """The same text cut end to end, in which each token is measured once."""
        packing = "blocks" if self.packing == "windows" else self.packing
        return TextSplit(self.stream.folder, self.stream.split, self.sequence_length, packing)

    def _offset(self, epoch: int) -> int:
        """Where the blocks of an epoch begin, from 0; each offset comes once before one comes again."""
        length = self.sequence_length
        first, mine = permute(np.array([0, epoch % length]), length, self.seed).tolist()
        return (mine - first) % length

    def _documents(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Where each document begins, in an epoch's order of documents and in the stream, int64 (documents,) each."""
        assert self.starts is not None
        if epoch == 0:
            return self.starts, self.starts
        count, lengths = len(self.starts), np.diff(self.starts, append=self.num_tokens)
        pieces = [np.arange(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
        order = np.concatenate([permute(piece, count, self.seed, epoch, 1).astype(np.uint32) for piece in pieces])
        return np.cumsum(lengths[order]) - lengths[order], self.starts[order]

    def count_targets(self, indices: np.ndarray) -> int:
        """The number of targets in the rows numbered `indices` (n,); only labels have to be read for it."""
        if self.labels is not None:
            return int((self[indices]["targets"] != IGNORED).sum())
        if self.packing == "windows":
            return len(indices) * self.sequence_length
        epochs, rows = np.divmod(np.asarray(indices).astype(np.int64), len(self))
        first = rows * self.sequence_length
        last = np.minimum(first + self.sequence_length, self.num_tokens - 1)  # the place of the last target
        count = int((last - first).sum())
        for epoch in np.unique(epochs) if self.starts is not None else ():
            starts, mine = self.documents(int(epoch))[0], epochs == epoch
            seams = np.searchsorted(starts, last[mine], "right") - np.searchsorted(starts, first[mine], "right")
            count -= int(seams.sum())
        return count

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of the rows numbered `indices`; `documents` have `position_ids`."""
        epochs, rows = np.divmod(np.asarray(indices).astype(np.int64), len(self))
        return self._read_stream(epochs, rows) if self.starts is None else self._read_documents(epochs, rows)

    def _read_stream(self, epochs: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of `windows` and `blocks`."""
        length, total, first = self.sequence_length, self.num_tokens - 1, rows
        if self.packing == "blocks":
            first = rows * length + np.array([self.offset(epoch) for epoch in epochs.tolist()], np.int64)
        if self.labels is None and first.max(initial=0) + length <= total:
            ids = self.stream.read(first, length + 1)
            return {"input_ids": ids[:, :-1], "targets": ids[:, 1:]}
        place = np.arange(length)  # a row goes round the end of the stream, or is the epoch's last one and ends early
        is_used = (self.packing == "windows") | (rows[:, None] * length + place < total)
        places = np.where(is_used, (first[:, None] + place) % total, total)
        following = (self.labels or self.stream).gather(np.minimum(places + 1, total))
        return {"input_ids": self.stream.gather(places), "targets": np.where(is_used, following, IGNORED)}

    def _read_documents(self, epochs: np.ndarray, rows: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of `documents`."""
        width, total = self.sequence_length + 1, self.num_tokens - 1
        places = (rows * self.sequence_length)[:, None] + np.arange(width)  # in the epoch's order, then in the stream
        is_used, seams = places <= total, np.zeros(places.shape, bool)
        np.minimum(places, total, out=places)
        for epoch in np.unique(epochs):
            (starts, sources), mine = self.documents(int(epoch)), epochs == epoch
            first = places[mine, 0]
            begins = seams[mine] = _find_seams(starts, first, width)
            if epoch:
                parts = begins | (np.arange(width) == 0)  # where a document, or the rest of one, begins in a row
                documents = (np.searchsorted(starts, first)[:, None] - 1 + np.cumsum(begins, axis=1))[parts]
                lengths = np.diff(np.flatnonzero(parts), append=parts.size)
                places[mine] += np.repeat(sources[documents] - starts[documents], lengths).reshape(-1, width)
        is_whole = is_used.all() and not epochs.any()
        ids = self.stream.read(places[:, 0], width) if is_whole else self.stream.gather(places)
        place = np.arange(width - 1)
        following = ids[:, 1:] if self.labels is None else self.labels.gather(places[:, 1:])
        begin = np.maximum.accumulate(np.where(seams[:, :-1], place, 0), axis=1)
        targets = np.where(is_used[:, 1:] & ~seams[:, 1:], following, IGNORED)
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
