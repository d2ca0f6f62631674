"""Text read with HF datasets, cut into splits.

files or Hub ──> tables ──> splits ──> texts (64 KB, or a row), or ids that the rows bring ──> encoding.py

Local files are streamed, several times rather than once into memory: a build of any size holds a few megabytes of them.
"""

import ctypes
import functools
import glob
import itertools
import json
import mmap
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
from huggingface_hub import snapshot_download

from ..errors import UserError
from ..recipe.keys import FILES, Data
from ..recipe.sources import local_copy
from .cache import file_hash
from .conversations import write_conversation
from .splits import cut_points

PIECE = 1 << 16  # characters of a text file tokenized at once
CHUNK = 1 << 20  # characters or bytes of a file read at once
FRACTIONS = {"train": 0.9, "validation": 0.1}
LIBC = ctypes.CDLL(None)

Rows = Callable[[], Iterator[Any]]  # yields texts, or ids and labels (or None): int64 arrays of one length


def is_saved(data: Data) -> bool:
    """Whether `data.path` is a folder that `DatasetDict.save_to_disk` wrote, or a build here."""
    return Path(data.path, "dataset_dict.json").is_file()


def own_tokenizer(data: Data) -> Path:
    """The folder of the tokenizer that a dataset of ids brings."""
    options: dict[str, Any] = {"repo_type": "dataset", "revision": data.revision, "allow_patterns": "tokenizer/*"}
    try:
        folder = Path(data.path if is_saved(data) else snapshot_download(data.path, **options), "tokenizer")
        if not folder.is_dir():
            raise FileNotFoundError("it brings no folder tokenizer/")
    except Exception as error:  # the Hub client raises many kinds
        expected = "expected one of path and train, with the other null, or a dataset that brings its tokenizer"
        raise UserError(("tokenizer", f"{expected}: {error}")) from error
    return folder


def identify(data: Data) -> dict[str, Any]:
    """What the text depends on, JSON-able: the content of files, wherever they are, or the commit of a Hub dataset."""
    files = local_files(data)
    try:
        contents = {split: [file_hash(file) for file in names] for split, names in files.items()}
    except OSError as error:
        raise source_error(data, f"{error.filename} cannot be read: {error.strerror}") from error
    splits = {} if files else load_splits(data)
    prepared = [Path(file["filename"]) for split in splits.values() for file in split.cache_files]
    # datasets names prepared files by the commit, or by the ETags of the originals
    names = [file_hash(path) if is_saved(data) else "/".join(path.parts[-5:]) for path in prepared]
    return {
        "path": data.path if files else sorted(names),
        "files": contents,
        "split": data.split and [*data.split.items()],  # in this order
        "text": [data.template or data.text_column, data.messages_column],
    }


def local_files(data: Data) -> dict[str, list[str]]:
    """The files of each split, patterns expanded; empty unless all are on this machine."""
    if data.path not in FILES or any("://" in file for file in itertools.chain(*data.files.values())):
        return {}
    found = {file: [file] * Path(file).is_file() or sorted(glob.glob(file, recursive=True)) for file in _listed(data)}
    return {split: [match for file in files for match in found[file]] for split, files in data.files.items()}


def _listed(data: Data) -> list[str]:
    return [*itertools.chain(*data.files.values())]


def source_error(data: Data, message: str) -> UserError:
    return UserError(("data.path" if data.data_files is None else "data.data_files", message))


def load_splits(data: Data) -> dict[str, Any]:
    """The splits as HF datasets: local files as streams, text line by line with its line breaks."""
    from datasets import load_dataset, load_from_disk  # half a second that local files, once built, do not need

    if is_saved(data):
        return load_from_disk(data.path)
    files = {split: [glob.escape(file) for file in names] for split, names in local_files(data).items()}
    given = {split: list(names) for split, names in data.files.items()} if data.data_files else None
    readers: dict[str, dict[str, Any]] = {
        "text": {"sample_by": "line", "keep_linebreaks": True, "chunksize": CHUNK, "encoding": "utf-8-sig"},
        "json": {"chunksize": CHUNK},
        "csv": {"converters": dict.fromkeys(data.columns, str), "keep_default_na": False},  # "NA" and "007" are text
    }
    options = readers.get(data.path, {}) | {"streaming": bool(files)}
    try:
        return load_dataset(data.path, data.name, data_files=files or given, revision=data.revision, **options)
    except Exception as error:  # datasets and the Hub client raise many kinds
        raise _unreadable(data, error) from error


def _unreadable(data: Data, error: BaseException) -> UserError:
    """The error for data that cannot be read, with file and line if they can be found."""
    from datasets.exceptions import DatasetGenerationError

    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    for file in itertools.chain(*local_files(data).values()) if data.path in ("text", "json", "csv") else ():
        if mistake := _find_mistake(file, data.path == "json"):
            return source_error(data, f"{file}, line {mistake}")
    copies = filter(None, map(local_copy, _listed(data)))
    hint = "".join(f"; without a network, put it at {copy}" for copy in copies)
    reason = f"{data.data_files or data.path!r} cannot be loaded: {type(error).__name__}: {error}{hint}"
    return source_error(data, reason)


def _find_mistake(file: str, is_json: bool) -> str | None:
    """Number and mistake of the first line that is not UTF-8 or, in a file of JSON lines, not JSON."""
    with fsspec.open(file, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode("utf-8-sig").strip()
                if is_json and number == 1 and text.startswith("["):
                    return None  # one list, which may span many lines
                if is_json and text:
                    json.loads(text)
            except UnicodeDecodeError as error:
                got = f"got the byte 0x{line[error.start]:02x} at place {error.start + 1}"
                encoding = "utf-16" if number == 1 and line[:2] in (b"\xff\xfe", b"\xfe\xff") else "latin1"
                return f"{number}: expected UTF-8, {got}; convert it: iconv -f {encoding} -t utf-8"
            except ValueError as error:
                return f"{number}: expected JSON: {error}"
    return None


def brings_ids(raw: dict[str, Any], data: Data) -> bool:
    """Whether the rows are tokenized already, in a column `input_ids`."""
    first = next(iter(raw.values()))
    return next(_rows(first, data, lambda table, _: iter(["input_ids" in table.column_names])), False)


def release_file(path: str | Path) -> None:
    """Unmaps the pages read of a file that Arrow has mapped, which count as this process's memory, on Linux."""
    maps = Path("/proc/self/maps")
    for line in maps.read_text().splitlines() if maps.exists() else ():
        if line.endswith(f" {path}"):
            first, stop = (int(place, 16) for place in line.split()[0].split("-"))
            LIBC.madvise(ctypes.c_void_p(first), ctypes.c_size_t(stop - first), mmap.MADV_DONTNEED)


def _rows(dataset: Any, data: Data, read: Callable[[pyarrow.Table, Data], Iterator[Any]]) -> Iterator[Any]:
    """What `read` makes of the dataset's rows; what goes wrong is a `UserError`."""
    try:
        for number, table in enumerate(dataset.with_format("arrow").iter(batch_size=1000)):
            yield from read(table, data)
            for file in getattr(dataset, "cache_files", ()) if number % 32 == 31 else ():
                release_file(file["filename"])
    except UserError:
        raise
    except Exception as error:  # streams are read here, and each file format has its own errors
        raise _unreadable(data, error) from error


def _texts(table: pyarrow.Table, data: Data) -> Iterator[str]:
    """The text of each row, empty if there is none; a conversation as JSON."""
    kind = "messages_column" if data.messages_column else "template" if data.template else "text_column"
    for column in data.columns:
        if column not in table.column_names:
            raise UserError((f"data.{kind}", f"expected one of {', '.join(table.column_names)}, got {column!r}"))
    if kind == "template":
        yield from (_fill_in(data.template or "", row) for row in table.select(data.columns).to_pylist())
        return
    values = table.column(data.columns[0])
    if kind == "messages_column":
        yield from map(write_conversation, values.to_pylist())
        return
    is_text = pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)
    if not is_text and values.null_count < len(values):
        raise UserError(("data.text_column", f"expected a column of text, {data.text_column} is {values.type}"))
    yield from (text or "" for text in values.to_pylist())


def _fill_in(template: str, row: dict[str, Any]) -> str:
    values = {name: "" if value is None else value for name, value in row.items()}
    try:
        return template.format_map(values)
    except (ValueError, TypeError) as error:
        raise UserError(("data.template", f"{template!r} cannot be filled in with {values}: {error}")) from error


def _ids(table: pyarrow.Table, data: Data) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The ids of each row, and its labels if there are any."""
    columns: list[Iterable[Any]] = [[], itertools.repeat(None, len(table))]
    for place, name in enumerate(name for name in ("input_ids", "labels") if name in table.column_names):
        lists = table.column(name).combine_chunks().cast(pyarrow.large_list(pyarrow.int64()))
        offsets = lists.offsets.to_numpy()
        columns[place] = np.split(lists.values.to_numpy()[offsets[0] : offsets[-1]], offsets[1:-1] - offsets[0])
    for ids, labels in zip(*columns, strict=True):
        if labels is not None and len(labels) != len(ids):
            raise source_error(data, f"expected as many labels as input_ids, got {len(labels)} and {len(ids)}")
        yield ids, labels


def cut(raw: dict[str, Any], data: Data, has_ids: bool) -> dict[str, Rows]:
    """Functions that yield what to tokenize of each split: pieces of a text file, or rows of a table.

    Without a validation split in the data, train is cut by `data.split`, in order: by characters, or by rows.
    With one, `data.split` can take the first part of train.
    """
    whole: dict[str, Rows] = {
        name: functools.partial(_rows, raw[name], data, _ids if has_ids else _texts) for name in raw
    }
    if "train" not in whole:
        raise UserError(("data.data_files", f"expected a train split, got {', '.join(whole)}"))
    fractions = data.split or ({} if "validation" in whole else FRACTIONS)
    if own := whole.keys() & fractions.keys() - {"train"}:
        message = f"the data brings its own {', '.join(sorted(own))}, expected fractions of other splits"
        raise UserError(("data.split", f"{message}, got {dict(fractions)}"))
    read = _pieces if data.path == "text" else (lambda rows, *bounds: itertools.islice(rows(), *bounds))
    splits: dict[str, Rows] = {name: functools.partial(read, rows, 0, None) for name, rows in whole.items()}
    if fractions:
        total = sum(len(text) if data.path == "text" else 1 for text in whole["train"]())
        cuts = cut_points(total, fractions)
        splits |= {name: functools.partial(read, whole["train"], *bounds) for name, bounds in cuts.items()}
    if "validation" not in splits:
        raise UserError(("data.split", f"expected a validation split, got {', '.join(splits)}"))
    return splits


def _pieces(lines: Rows, start: int, stop: int | None) -> Iterator[str]:
    """Characters `start` to `stop` of the lines, in pieces that tokenize as the whole would.

    A piece ends after a single line break between two lines of text, where every usual pre-tokenizer ends a word.
    """
    place, piece = 0, ""
    for line in lines():
        if stop is not None and place >= stop:
            break
        cut = line[max(start - place, 0) : None if stop is None else stop - place]
        place += len(line)
        if len(piece) >= PIECE and not cut[:1].isspace() and piece[-1:] == "\n" and not piece[-2:-1].isspace():
            yield piece
            piece = ""
        piece += cut
    if piece:
        yield piece
