"""A split's token stream packed into rows.

windows     any offset of the stream               [the quick b][ick brown f] ...
blocks      cut end to end                         [the quick ][brown fox. ][A stitch i] ...
documents   blocks in which no document sees another: positions restart, and a seam is no target

Each epoch cuts anew, a pure function of seed and epoch: `blocks` from another offset on, round the stream's end to its
beginning, `documents` in another order of them. The first epoch goes from beginning to end, as evaluation does.
"""

import bisect
import functools
from collections.abc import Iterator
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
        """Where each document ends, in an epoch's order of documents and in the stream, int64 (documents,) each."""
        assert self.starts is not None
        ends = np.append(self.starts[1:], self.num_tokens)
        if epoch == 0:
            return ends, ends
        count = len(ends)
        pieces = [np.arange(start, min(start + PIECE, count)) for start in range(0, count, PIECE)]
        order = np.concatenate([permute(piece, count, self.seed, epoch, 1).astype(np.uint32) for piece in pieces])
        return np.cumsum((ends - self.starts)[order]), ends[order]

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
            ends, mine = self.documents(int(epoch))[0][:-1], epochs == epoch
            seams = np.searchsorted(ends, last[mine], "right") - np.searchsorted(ends, first[mine], "right")
            count -= int(seams.sum())
        return count

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """The batch of the rows numbered `indices`; `documents` have `position_ids`."""
        rows, shape = np.asarray(indices).tolist(), (len(indices), self.sequence_length)
        if self.packing == "windows" and self.labels is None:  # each row whole
            starts = [row % len(self) for row in rows]
            tokens = np.stack([self.stream.read(start, start + shape[1] + 1) for start in starts]).astype(np.int64)
            return {"input_ids": tokens[:, :-1], "targets": tokens[:, 1:]}
        last_token = self.stream.read(self.num_tokens - 1, self.num_tokens)[0]
        ids, targets, positions = np.full(shape, last_token, np.int64), np.full(shape, IGNORED), np.zeros(shape, int)
        counted = np.arange(self.sequence_length)
        for row, index in enumerate(rows):
            place = 0
            for first, stop, end in self._parts(index):
                tokens, length = self.stream.read(first, min(stop + 1, end)), stop - first
                following = tokens if self.labels is None else self.labels.read(first, min(stop + 1, end))
                ids[row, place : place + length] = tokens[:length]
                targets[row, place : place + len(tokens) - 1] = following[1:]
                positions[row, place:] = counted[: self.sequence_length - place]
                place += length
        batch = {"input_ids": ids, "targets": targets}
        return batch if self.starts is None else batch | {"position_ids": positions}

    def _parts(self, index: int) -> Iterator[tuple[int, int, int]]:
        """What a row consists of: places in the stream from, to, and where what it belongs to ends."""
        epoch, row = divmod(index, len(self))
        total = self.num_tokens - 1  # the last token is no input
        if self.packing == "windows":
            yield row, row + self.sequence_length, self.num_tokens
            return
        first = row * self.sequence_length
        stop = min(first + self.sequence_length, total)
        if self.starts is None:
            first, stop = first + self.offset(epoch) % total, stop + self.offset(epoch) % total
            for begin in (0, total):
                if max(first, begin) < min(stop, begin + total):
                    yield max(first, begin) - begin, min(stop, begin + total) - begin, self.num_tokens
            return
        ends, sources = self.documents(epoch)
        document = bisect.bisect_right(ends, first)
        while first < stop:
            shift, end = int(sources[document] - ends[document]), int(ends[document])
            yield first + shift, min(stop, end) + shift, end + shift
            first, document = end, document + 1


def document_lengths(folder: Path, name: str) -> np.ndarray:
    """Tokens of each document of a split, end tokens included, int64 (documents,)."""
    stream = TokenStream(folder, name)
    return np.diff(stream.starts, append=len(stream))
