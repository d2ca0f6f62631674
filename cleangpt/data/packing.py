"""A split's token stream on disk, and its packing into rows.

    windows     any offset of the stream               [the quick b][ick brown f] ...
    blocks      cut end to end                         [the quick ][brown fox. ][A stitch i] ...
    documents   blocks in which no document sees another: positions restart, and a seam is no target

A stream is one memory-mapped Arrow column: a batch reads only what it needs.
"""

import io
import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
from numpy.lib.stride_tricks import sliding_window_view

from ..errors import UserError
from .splits import IGNORED

AROUND = 1 << 16  # bytes that the system maps around a place that is read
MAPPED = 1 << 25  # bytes that may stay mapped


class _Parts(io.FileIO):
    """A file written in parts, with the pages read of `source` released after each."""

    def __init__(self, path: Path, source: mmap.mmap | None) -> None:
        super().__init__(path, "wb")
        self.source = source

    def write(self, data: Any) -> int:
        rest = memoryview(data)
        while len(rest):
            rest = rest[super().write(rest[:MAPPED]) :]
            _release(self.source)
        return len(data)


def write_column(path: Path, name: str, values: np.ndarray, source: mmap.mmap | None = None) -> None:
    """Writes values as one Arrow column in one batch, which reads back as one array; releases `source`, their map."""
    column = pyarrow.RecordBatch.from_arrays([pyarrow.array(values)], names=[name])
    with _Parts(path, source) as file, pyarrow.ipc.new_stream(file, column.schema) as writer:
        writer.write_batch(column)


def read_column(path: Path, name: str) -> tuple[np.ndarray, mmap.mmap]:
    """The array that `write_column` wrote, and the memory map it lies in."""
    mapped = map_file(path)
    return pyarrow.ipc.open_stream(pyarrow.py_buffer(mapped)).read_next_batch().column(name).to_numpy(), mapped


def map_file(path: Path) -> mmap.mmap:
    """A file as read-only memory."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _release(mapped: mmap.mmap | None) -> None:
    """Unmaps the pages read, which count as this process's memory."""
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


class TextSplit:
    """A split (see `Split`) of text: a row at each offset (`windows`), or rows cut end to end with a short last one."""

    def __init__(self, folder: Path, name: str, block_size: int, packing: str) -> None:
        self.tokens, self.mapped = read_column(folder / f"{name}.arrow", "input_ids")
        self.starts = read_column(folder / f"{name}.documents.arrow", "start")[0] if packing == "documents" else None
        self.num_bytes = summarize(folder)[name]["bytes"]  # of UTF-8 text
        seams = 0 if self.starts is None else len(self.starts) - 1
        self.num_targets = len(self.tokens) - 1 - seams  # in one pass over the split
        self.sequence_length, self.packing = block_size, packing
        self.num_sequences = -(-(len(self.tokens) - 1) // block_size)
        self.read = 0  # bytes mapped since the last release
        if self.num_targets < 1:
            raise UserError(("data.split", f"expected at least 2 tokens in the {name} split, got {len(self.tokens)}"))

    def __len__(self) -> int:
        return len(self.tokens) - self.sequence_length if self.packing == "windows" else self.num_sequences

    def _first(self, indices: np.ndarray) -> np.ndarray:
        """The place of each row's first token in the stream, int64 (n,)."""
        return np.asarray(indices).astype(np.int64) * (1 if self.packing == "windows" else self.sequence_length)

    def count_targets(self, indices: np.ndarray) -> int:
        """The number of targets in the rows at `indices` (n,), without reading a token."""
        first = self._first(indices)
        last = np.minimum(first + self.sequence_length, len(self.tokens) - 1)  # the place of the last target
        starts = np.empty(0, np.int64) if self.starts is None else self.starts
        seams = np.searchsorted(starts, last, "right") - np.searchsorted(starts, first, "right")
        return int((last - first - seams).sum())

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch of rows; `documents` have `position_ids`."""
        first = self._first(indices)
        width, end = self.sequence_length + 1, len(self.tokens)
        if first.max(initial=0) + width <= end:
            ids = sliding_window_view(self.tokens, width)[first].astype(np.int64)  # (n, block_size + 1)
            targets = ids[:, 1:]
        else:  # the last block ends early
            places = first[:, None] + np.arange(width)
            ids = self.tokens[np.minimum(places, end - 1)].astype(np.int64)
            targets = np.where(places[:, 1:] < end, ids[:, 1:], IGNORED)
        self.read += len(first) * (AROUND + width * self.tokens.itemsize)
        if self.read > MAPPED:
            _release(self.mapped)
            self.read = 0
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
    starts, _ = read_column(folder / f"{name}.documents.arrow", "start")
    return np.diff(starts, append=summarize(folder)[name]["tokens"])


def summarize(folder: Path) -> dict[str, dict[str, int]]:
    """Tokens, documents, bytes and empty rows of each split in a folder that `build_text` filled."""
    return json.loads((folder / "summary.json").read_text())
