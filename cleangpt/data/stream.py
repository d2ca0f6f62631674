"""A split of built data as one stream of tokens, read from the Arrow files that `datasets.load_from_disk` opens.

    rows        [the quick brown fox <end>] [a stitch in time <end>] ...      input_ids: a list a row
    stream       0   1     2     3    4      5 6      7  8    9               places

A read takes from the files only what it returns, so that a split of any size needs no memory.
"""

import bisect
import functools
import json
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow


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
        self.files = {folder / split / name: os.open(folder / split / name, os.O_RDONLY) for name in names}
        for file in self.files.values():
            weakref.finalize(self, os.close, file)
        self.parts, self.ends = [], [0]  # of each record batch: its file and where its values begin there, its end here
        for file, begin, lists in self._lists():
            values, offsets = lists.values, lists.offsets
            self.dtype = np.dtype(values.type.to_pandas_dtype())
            skipped = (values.offset + offsets[0].as_py()) * self.dtype.itemsize
            self.parts.append((file, values.buffers()[1].address - begin + skipped))
            self.ends.append(self.ends[-1] + offsets[-1].as_py() - offsets[0].as_py())

    def __len__(self) -> int:
        return self.ends[-1]

    def __iter__(self) -> Iterator[np.ndarray]:
        """The tokens in order, in arrays of about a million."""
        for first, stop in zip(self.ends[:-1], self.ends[1:], strict=True):
            yield self.read(first, stop)

    def read(self, first: int, stop: int) -> np.ndarray:
        """The tokens at places `first` to before `stop`, of the type in which they are stored.

        Raises:
            IndexError: if there are fewer.
        """
        part, pieces = bisect.bisect_right(self.ends, first) - 1, []
        while first < stop:
            begin, end = self.ends[part], min(stop, self.ends[part + 1])
            file, place = self.parts[part]
            size = self.dtype.itemsize
            pieces.append(os.pread(file, (end - first) * size, place + (first - begin) * size))
            first, part = end, part + 1
        return np.frombuffer(pieces[0] if len(pieces) == 1 else b"".join(pieces), self.dtype)

    @functools.cached_property
    def starts(self) -> np.ndarray:
        """The places where documents start, int64 (documents,)."""
        offsets = (lists.offsets.to_numpy().astype(np.int64) for _, _, lists in self._lists())
        places = np.concatenate([one[:-1] - one[0] + end for one, end in zip(offsets, self.ends[:-1], strict=True)])
        return places if len(places) == self.summary["documents"] else places[:1]  # the pieces of a text are one

    @property
    def labels(self) -> "TokenStream | None":
        """The targets at the same places (-100 for none), if the data brings any."""
        has_labels = "labels" in pyarrow.ipc.open_stream(str(next(iter(self.files)))).schema.names
        return TokenStream(self.folder, self.split, "labels") if has_labels else None

    def _lists(self) -> Iterator[tuple]:
        """Of each record batch: its file, the address at which that is mapped for the while, and the column."""
        for path, file in self.files.items():
            mapped = pyarrow.memory_map(str(path)).read_buffer()
            for batch in pyarrow.ipc.open_stream(mapped):
                yield file, mapped.address, batch.column(self.column)


def summarize(folder: Path) -> dict[str, dict[str, int]]:
    """Tokens, documents, bytes and empty rows of each split in a folder that `build_text` filled."""
    return json.loads((folder / "summary.json").read_text())
