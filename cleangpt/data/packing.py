"""The stream of a text's ids on disk, and its packing into rows.

    windows     any offset of the stream               [the quick b][ick brown f] ...
    blocks      cut end to end                         [the quick ][brown fox. ][A stitch i] ...
    documents   blocks in which no document sees another: positions restart, and a seam is no target

A stream is one Arrow column, memory-mapped: what a batch needs is read when it needs it.
"""

import json
import mmap
from pathlib import Path

import numpy as np
import pyarrow
from numpy.lib.stride_tricks import sliding_window_view

from ..errors import UserError
from .splits import IGNORED

AROUND = 1 << 16  # bytes that the system maps at once around a place that is read
MAPPED = 1 << 25  # bytes of the stream that may stay mapped


def write_column(path: Path, name: str, values: np.ndarray) -> None:
    """One Arrow column in one record batch, so that it is read back as one memory-mapped array."""
    column = pyarrow.RecordBatch.from_arrays([pyarrow.array(values)], names=[name])
    with open(path, "wb") as file, pyarrow.ipc.new_stream(file, column.schema) as writer:
        writer.write_batch(column)


def copy_to_column(source: Path, dtype: type, path: Path, name: str) -> None:
    """`write_column` of a file that holds nothing but the values, without ever holding all of them in memory."""
    with open(source, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    class InParts:
        closed = False

        def write(self, data):
            data = memoryview(data)
            for start in range(0, len(data), MAPPED):
                file.write(data[start : start + MAPPED])
                _give_back(mapped)

        def flush(self):
            file.flush()

    values = pyarrow.array(np.frombuffer(mapped, dtype))
    column = pyarrow.RecordBatch.from_arrays([values], names=[name])
    with open(path, "wb") as file, pyarrow.ipc.new_stream(InParts(), column.schema) as writer:
        writer.write_batch(column)


def _give_back(mapped: mmap.mmap) -> None:
    """Lets go of the pages read: while mapped, they count as this process's memory."""
    if hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def read_column(path: Path, name: str) -> tuple[np.ndarray, mmap.mmap]:
    """The array in a file that `write_column` wrote, and the memory map it lies in."""
    with pyarrow.memory_map(str(path)) as file:
        content = file.read_buffer()
        column = pyarrow.ipc.open_stream(content).read_next_batch().column(name)
        offset = column.buffers()[1].address - content.address
    with open(path, "rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    return np.frombuffer(mapped, column.type.to_pandas_dtype(), len(column), offset), mapped


class TextSplit:
    """A split as sequences of `block_size` targets: `split[indices]` is a batch.

    Attributes:
        num_targets: targets in one pass over the split.
        num_bytes: UTF-8 bytes of the split's text.
        sequence_length: tokens of a row.
        num_sequences: rows that hold as many targets as one pass.
        targets_per_row: targets of every row; None where rows differ.
    """

    def __init__(self, folder: Path, name: str, block_size: int, packing: str):
        self.tokens, self.mapped = read_column(folder / f"{name}.arrow", "input_ids")
        self.starts = read_column(folder / f"{name}.documents.arrow", "start")[0] if packing == "documents" else None
        self.num_bytes = summarize(folder)[name]["bytes"]
        self.num_targets = len(self.tokens) - 1
        self.sequence_length = block_size
        self.num_sequences = -(-self.num_targets // block_size)
        self.targets_per_row = block_size if packing == "windows" else None
        self.packing = packing
        self.read = 0  # bytes mapped since the map was last given back
        if self.num_targets < 1:
            raise UserError(("data.split", f"expected at least 2 tokens in the {name} split, got {len(self.tokens)}"))

    def __len__(self) -> int:
        """`windows`: one at each offset; otherwise what cutting end to end gives, the last short one included."""
        if self.packing == "windows":
            return len(self.tokens) - self.sequence_length
        return self.num_sequences

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows for integer `indices` (n,).

        Returns:
            `input_ids` and `targets`, int64 (n, block_size); a target is the next token, or -100 where there is none.
            With `documents` also `position_ids`, which restart at each document.
        """
        first = np.asarray(indices).astype(np.int64) * (1 if self.packing == "windows" else self.sequence_length)
        width, end = self.sequence_length + 1, len(self.tokens)
        if first.max(initial=0) + width <= end:
            ids = sliding_window_view(self.tokens, width)[first].astype(np.int64)  # (n, block_size + 1)
            inputs, targets = ids[:, :-1], ids[:, 1:]
        else:  # the last block ends early
            places = first[:, None] + np.arange(width)
            ids = self.tokens[np.minimum(places, end - 1)].astype(np.int64)
            inputs, targets = ids[:, :-1], np.where(places[:, 1:] < end, ids[:, 1:], IGNORED)
        self.read += len(first) * (AROUND + width * self.tokens.itemsize)
        if self.read > MAPPED:
            _give_back(self.mapped)
            self.read = 0
        if self.starts is None:
            return {"input_ids": inputs, "targets": targets}
        seams = self._seams(first, width)
        place = np.arange(width - 1)
        begin = np.maximum.accumulate(np.where(seams[:, :-1], place, 0), axis=1)
        targets = np.where(seams[:, 1:], IGNORED, targets)
        return {"input_ids": inputs, "targets": targets, "position_ids": place - begin}

    def _seams(self, first: np.ndarray, width: int) -> np.ndarray:
        """Where in rows of `width` tokens from each of `first` on a document starts, (n, width)."""
        begin, stop = np.searchsorted(self.starts, first), np.searchsorted(self.starts, first + width)
        count = stop - begin  # documents that start in a row
        row = np.repeat(np.arange(len(first)), count)
        document = np.arange(len(row)) + np.repeat(begin - np.cumsum(count) + count, count)
        seams = np.zeros((len(first), width), bool)
        seams[row, self.starts[document] - first[row]] = True
        return seams


def document_lengths(folder: Path, name: str) -> np.ndarray:
    """Tokens of each document of a split, their ends included, int64 (documents,)."""
    starts, _ = read_column(folder / f"{name}.documents.arrow", "start")
    return np.diff(starts, append=summarize(folder)[name]["tokens"])


def summarize(folder: Path) -> dict[str, dict[str, int]]:
    """Tokens, documents, bytes and empty rows of each split in a folder that `build_text` made."""
    return json.loads((folder / "summary.json").read_text())
