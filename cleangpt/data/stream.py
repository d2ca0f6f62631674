"""A split of built data as one stream of tokens, read from the Arrow files that `datasets.load_from_disk` opens.

    rows        [the quick brown fox <end>] [a stitch in time <end>] ...      input_ids: a list a row
    stream       0   1     2     3    4      5 6      7  8    9               places

Files are memory-mapped: a read touches only what it needs, and pages read are unmapped again.
"""

import ctypes
import functools
import json
import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
from numpy.lib.stride_tricks import sliding_window_view

AROUND = 1 << 16  # bytes that the system maps around a place that is read
MAPPED = 1 << 25  # bytes that may stay mapped
LIBC = ctypes.CDLL(None)


class TokenStream:
    """The values of a column of lists, end to end.

    Attributes:
        num_bytes: UTF-8 bytes of the split's text.
    """

    def __init__(self, folder: Path, split: str, column: str = "input_ids") -> None:
        """`folder` is one that `build_text` filled."""
        self.folder, self.split, self.column = folder, split, column
        self.summary = summarize(folder)[split]
        self.num_bytes = self.summary["bytes"]
        names = [file["filename"] for file in json.loads((folder / split / "state.json").read_text())["_data_files"]]
        self.files = [map_file(folder / split / name) for name in names]
        self.read_bytes = 0  # since the last release
        files, begins, lengths = [], [], []  # of each record batch: its file, where its values begin there, how many
        for number, file in enumerate(self.files):
            base = pyarrow.py_buffer(file).address
            for lists in self._batches(file):
                values, itemsize = lists.values, lists.values.type.bit_width // 8
                files.append(number)
                begins.append((values.buffers()[1].address - base) // itemsize + values.offset)
                lengths.append(len(values))
        self.dtype = np.dtype(values.type.to_pandas_dtype())
        self.views = [np.frombuffer(file, self.dtype, len(file) // self.dtype.itemsize) for file in self.files]
        self.file, self.ends = np.array(files), np.cumsum(lengths, dtype=np.int64)  # place after its last
        self.shift = np.array(begins, np.int64) - self.ends + lengths  # from a place in the stream to that in its file
        self._release()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __iter__(self) -> Iterator[np.ndarray]:
        """The tokens in order, in arrays of about a million, as they are stored."""
        for begin, end, number, shift in zip(
            np.append(0, self.ends[:-1]), self.ends, self.file, self.shift, strict=True
        ):
            yield self.views[number][begin + shift : end + shift]
            self._release()

    def read(self, first: np.ndarray, width: int) -> np.ndarray:
        """The `width` tokens from each place of `first` (n,) on, int64 (n, width)."""
        batch = np.searchsorted(self.ends, first, side="right")
        in_one = first + width <= self.ends[batch]  # record batch
        tokens = np.empty((len(first), width), np.int64)
        for number, view in enumerate(self.views):
            mine = in_one & (self.file[batch] == number)
            if mine.any():
                tokens[mine] = sliding_window_view(view, width)[first[mine] + self.shift[batch[mine]]]
        tokens[~in_one] = self._gather(first[~in_one][:, None] + np.arange(width))
        self._count(len(first), width)
        return tokens

    def gather(self, places: np.ndarray) -> np.ndarray:
        """The tokens at `places` (any shape), int64."""
        tokens = self._gather(places)
        self._count(1 + int(np.count_nonzero(np.diff(places.ravel()) != 1)), 1)
        return tokens

    def _gather(self, places: np.ndarray) -> np.ndarray:
        batch = np.searchsorted(self.ends, places, side="right")
        file, place = self.file[batch], places + self.shift[batch]
        tokens = np.empty(places.shape, np.int64)
        for number, view in enumerate(self.views):
            mine = file == number
            tokens[mine] = view[place[mine]]
        return tokens

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The places where documents start, int64 (documents,)."""
        starts, end = [], 0
        for file in self.files:
            for rows in self._batches(file):
                offsets = rows.offsets.to_numpy().astype(np.int64)
                starts.append(offsets[:-1] - offsets[0] + end)
                end += int(offsets[-1] - offsets[0])
            self._release()
        places = np.concatenate(starts)
        return places if len(places) == self.summary["documents"] else places[:1]  # the pieces of a text are one

    @property
    def labels(self) -> "TokenStream | None":
        """The targets at the same places (-100 for none), if the data brings any."""
        has_labels = "labels" in pyarrow.ipc.open_stream(pyarrow.py_buffer(self.files[0])).schema.names
        return TokenStream(self.folder, self.split, "labels") if has_labels else None

    def _batches(self, file: mmap.mmap) -> Iterator[pyarrow.ListArray]:
        """The column in each record batch of a file."""
        for batch in pyarrow.ipc.open_stream(pyarrow.py_buffer(file)):
            yield batch.column(self.column)

    def _count(self, regions: int, width: int) -> None:
        """Notes how much was read, and releases it when it is much."""
        self.read_bytes += regions * (AROUND + width * self.dtype.itemsize)
        if self.read_bytes > MAPPED:
            self._release()

    def _release(self) -> None:
        """Unmaps the pages read, which count as this process's memory."""
        self.read_bytes = 0
        for file in self.files if hasattr(mmap, "MADV_DONTNEED") else ():
            file.madvise(mmap.MADV_DONTNEED)


def map_file(path: Path) -> mmap.mmap:
    """A file as read-only memory."""
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def summarize(folder: Path) -> dict[str, dict[str, int]]:
    """Tokens, documents, bytes and empty rows of each split in a folder that `build_text` filled."""
    return json.loads((folder / "summary.json").read_text())


def release_file(path: Path) -> None:
    """Unmaps the pages read of a file that Arrow has mapped, on Linux."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        if line.endswith(f" {path}"):
            first, stop = (int(place, 16) for place in line.split()[0].split("-"))
            LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_DONTNEED)
