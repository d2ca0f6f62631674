"""Text: loaded with HF datasets, cut into splits, tokenized, kept as one stream of ids a split.

files or Hub ──> splits ──> pieces of text ──> ids ──> train.arrow, validation.arrow ──> packing.py
                 (cut)      (64 KB, or a row)          (16 or 32 bits an id)

Files on this machine are read as a stream, several times rather than once into memory: whatever their size, a build
holds a few megabytes of them.
"""

import functools
import glob
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import numpy as np
import pyarrow
import pyarrow.compute
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import DataLoader
from tqdm import tqdm

from ..errors import UserError
from ..tokenization import unknown_test
from .cache import build_once, file_hash
from .packing import copy_to_column, write_column
from .splits import cut_points

logger = logging.getLogger(__name__)

PIECE = 1 << 16  # characters of a text file that are tokenized at once
BATCH = 1 << 20  # characters handed to the tokenizer, or to one of several processes, at a time
FRACTIONS = {"train": 0.9, "validation": 0.1}

Pieces = Callable[[], Iterator[tuple[str, bool]]]  # texts, each with whether a document ends there


def build_text(section, make_tokenizer: Callable, tokenizer_identity) -> Path:
    """The folder with the tokenizer and the token streams of a `data` section, built if it is not there yet.

    Args:
        section: `recipe.data`.
        make_tokenizer: from an iterable of the train split's texts to a tokenizer.
        tokenizer_identity: JSON-able value that is the same exactly when `make_tokenizer` does the same.

    Raises:
        UserError: for data that cannot be read, lacks the column, is empty, or has characters the tokenizer lacks.
    """
    files = _local_files(section)
    raw = None if files else _load(section, None)
    ingredients = {
        "format": 2,
        "path": section.path if raw is None else _remote_identity(raw),
        "files": {split: [_content(section, file) for file in names] for split, names in (files or {}).items()},
        "split": section.split or FRACTIONS,
        "text": section.template or section.text_column,
        "tokenizer": tokenizer_identity,
    }

    def build(folder: Path):
        splits = _cut(_load(section, files) if raw is None else raw, section, files)
        if "validation" not in splits:
            raise UserError(("data.split", f"expected a validation split, got {', '.join(splits)}"))
        tokenizer = make_tokenizer(text for text, _ in splits["train"]() if text)
        tokenizer.save_pretrained(folder / "tokenizer")
        summary = {name: _tokenize(name, pieces, tokenizer, section, folder) for name, pieces in splits.items()}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))

    return build_once(ingredients, build)


def _content(section, file: str) -> str:
    try:
        return file_hash(file)
    except OSError as error:
        raise UserError((_source_key(section), f"{file} cannot be read: {error.strerror}")) from error


def _source_key(section) -> str:
    return "data.data_files" if section.data_files is not None else "data.path"


def _local_files(section) -> dict[str, list[str]]:
    """The local files of each split, patterns expanded; empty where the data is not local."""
    if section.path not in ("text", "json", "parquet", "csv"):
        return {}
    given = section.data_files if isinstance(section.data_files, dict) else {"train": section.data_files}
    given = {split: [value] if isinstance(value, str) else value for split, value in given.items()}
    if any("://" in value for values in given.values() for value in values):
        return {}
    return {
        split: [file for value in values for file in sorted(glob.glob(value, recursive=True))]
        for split, values in given.items()
    }


def _load(section, files: dict | None) -> dict:
    """The splits as HF datasets, those of local files as streams; text line by line with its line breaks."""
    options = {"sample_by": "line", "keep_linebreaks": True} if section.path == "text" else {}
    if section.path in ("text", "json"):
        options["chunksize"] = BATCH  # read at a time
    try:
        return load_dataset(
            section.path,
            section.name,
            data_files=files or section.data_files,
            revision=section.revision,
            streaming=bool(files),
            **options,
        )
    except Exception as error:  # datasets and the Hub client raise many kinds; the cause says what is wrong
        raise _unreadable(section, files, error) from error


def _unreadable(section, files: dict | None, error: Exception) -> UserError:
    """What to tell of data that cannot be read: the file and line where they can be found."""
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    for file in (file for names in (files or {}).values() for file in names if section.path in ("text", "json")):
        with fsspec.open(file, "rb", compression="infer") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    line = line.decode()
                    if section.path == "text" or not line.strip():
                        continue
                    if number == 1 and line.startswith("["):
                        break  # one list, which may go over many lines
                    json.loads(line.removeprefix("\ufeff"))
                except UnicodeDecodeError as wrong:
                    byte = f"0x{wrong.object[wrong.start]:02x}"
                    message = f"{file}, line {number}: expected UTF-8, got the byte {byte} at place {wrong.start + 1}"
                    return UserError((_source_key(section), message))
                except ValueError as wrong:
                    return UserError((_source_key(section), f"{file}, line {number}: expected JSON: {wrong}"))
    where = section.path if section.data_files is None else section.data_files
    return UserError((_source_key(section), f"{where!r} cannot be loaded: {type(error).__name__}: {error}"))


def _remote_identity(raw: dict) -> list[str]:
    """Names of the prepared Arrow files: `datasets` puts the commit, or the files' ETags, into them."""
    return sorted("/".join(Path(file["filename"]).parts[-5:]) for split in raw.values() for file in split.cache_files)


def _cut(raw: dict, section, files: dict | None) -> dict[str, Pieces]:
    """Split name to a function that yields its pieces of text.

    A validation split that the data brings is kept; otherwise train is cut by `data.split`, in order: text by
    characters, tables by rows.
    """
    texts = {name: functools.partial(_texts, dataset, section, files) for name, dataset in raw.items()}
    if "train" not in texts:
        raise UserError(("data.data_files", f"expected a train split, got {', '.join(texts)}"))
    read, measure = (_stream_pieces, _count_characters) if section.path == "text" else (_row_pieces, len)
    if "validation" in texts:
        return {name: functools.partial(read, rows, 0, None) for name, rows in texts.items()}
    train = texts.pop("train")
    bounds = cut_points(sum(measure(rows) for rows in train()), section.split or FRACTIONS)
    cut = {name: functools.partial(read, train, start, stop) for name, (start, stop) in bounds.items()}
    return {**cut, **{name: functools.partial(read, rows, 0, None) for name, rows in texts.items()}}


def _texts(dataset, section, files: dict | None) -> Iterator[pyarrow.Array]:
    """The text of each row, some rows at a time.

    Raises:
        UserError: for rows that cannot be read, and for a column that is not there or holds no text.
    """
    try:
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            for column in section.columns:
                if column not in table.column_names:
                    key = "data.template" if section.template else "data.text_column"
                    raise UserError((key, f"expected one of {', '.join(table.column_names)}, got {column!r}"))
            if section.template:
                rows = table.select(section.columns).to_pylist()
                yield pyarrow.array([_fill(section.template, row) for row in rows], pyarrow.large_string())
                continue
            values = table.column(section.text_column).combine_chunks()
            if not (pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)):
                if values.null_count < len(values):
                    raise UserError(
                        ("data.text_column", f"expected a column of text, {section.text_column} is {values.type}")
                    )
                values = values.cast(pyarrow.string())
            values.validate(full=True)  # that it is UTF-8, which not every reader looks at
            yield values
    except UserError:
        raise
    except Exception as error:  # a stream is read here; each kind of file has its own errors
        raise _unreadable(section, files, error) from error


def _fill(template: str, row: dict) -> str:
    return template.format_map({column: "" if value is None else value for column, value in row.items()})


def _count_characters(lines: pyarrow.Array) -> int:
    return pyarrow.compute.sum(pyarrow.compute.utf8_length(lines)).as_py() or 0


def _stream_pieces(lines: Callable, start: int, stop: int | None) -> Iterator[tuple[str, bool]]:
    """Characters `start` to `stop` of lines read end to end, in pieces that tokenize as the whole would.

    A piece ends after a single line break between two lines of text, where every usual pre-tokenizer ends a word.
    """
    place, piece = 0, ""
    for some in lines():
        for line in some.to_pylist():
            cut = line[max(start - place, 0) : None if stop is None else max(stop - place, 0)]
            place += len(line)
            if len(piece) >= PIECE and not cut[:1].isspace() and piece[-1:] == "\n" and not piece[-2:-1].isspace():
                yield piece, False
                piece = ""
            piece += cut
        if stop is not None and place >= stop:
            break
    if piece:
        yield piece, False


def _row_pieces(rows: Callable, start: int, stop: int | None) -> Iterator[tuple[str, bool]]:
    """Rows `start` to `stop`, each a document; one without text is an empty piece."""
    place = 0
    for some in rows():
        first, last = max(start - place, 0), len(some) if stop is None else max(stop - place, 0)
        place += len(some)
        yield from ((text or "", True) for text in some[first:last].to_pylist())
        if stop is not None and place >= stop:
            break


class _Encoder:
    """Batches of pieces to ids; what a `DataLoader` maps over processes."""

    def __init__(self, tokenizer, dtype: type):
        self.backend, self.end, self.dtype = tokenizer.backend_tokenizer, tokenizer.eos_token_id, dtype
        self.has_unknown = unknown_test(tokenizer)
        self.backend.no_truncation()
        self.backend.no_padding()

    def __getitem__(self, batch: list[tuple[str, bool]]) -> tuple[np.ndarray, int, list[str]]:
        """Ids of a batch end to end, its UTF-8 bytes, and the texts that the tokenizer does not know all of."""
        encoded = self.backend.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        ids, strange = [], []
        for one, (text, ends) in zip(encoded, batch, strict=True):
            ids.append(np.array([*one.ids, self.end] if ends else one.ids, self.dtype))
            if self.has_unknown(ids[-1]):
                strange.append(text)
        return np.concatenate(ids), sum(len(text.encode()) for text, _ in batch), strange


def _tokenize(name: str, pieces: Pieces, tokenizer, section, folder: Path) -> dict:
    """Writes `<name>.arrow`, and `<name>.documents.arrow` with where documents start; returns counts."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = tokenizer.eos_token_id
    if end is None and section.path != "text":
        raise UserError(("tokenizer.path", "expected a tokenizer with an end token (eos_token) between documents"))
    empty = 0

    def batches() -> Iterator[list[tuple[str, bool]]]:
        nonlocal empty
        batch, size = [], 0
        for text, ends in pieces():
            if not text:
                empty += 1
                continue
            batch.append((text, ends))
            size += len(text)
            if size >= BATCH:
                yield batch
                batch, size = [], 0
        if batch:
            yield batch

    encoded = DataLoader(
        _Encoder(tokenizer, dtype),
        sampler=batches(),
        batch_size=None,
        collate_fn=_unchanged,
        num_workers=section.num_proc or 0,
        worker_init_fn=_one_thread,
        generator=torch.Generator(),  # it draws a number, which the run must not miss
    )
    num_bytes, starts, num_tokens = 0, [np.zeros(1, np.int64)], 0
    stream = folder / f"{name}.bin"
    with (
        open(stream, "wb") as file,
        tqdm(desc=f"Tokenizing {name}", unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        for ids, size, strange in encoded:
            if strange:
                raise UserError(_unknown(tokenizer, strange, name))
            file.write(ids)
            starts.append(np.flatnonzero(ids == end) + 1 + num_tokens if end is not None else [])
            num_tokens += len(ids)
            num_bytes += size
            bar.update(size)
    if num_tokens == 0:
        raise UserError((_source_key(section), f"no text for the {name} split"))
    starts = np.concatenate(starts).astype(np.int64)
    starts = starts[starts < num_tokens]
    if empty:
        logger.warning(f"{empty:,} rows of the {name} split have no text and were skipped")
    copy_to_column(stream, dtype, folder / f"{name}.arrow", "input_ids")
    write_column(folder / f"{name}.documents.arrow", "start", starts)
    os.remove(stream)
    return {"tokens": num_tokens, "documents": len(starts), "bytes": num_bytes, "empty": empty}


def _unchanged(batch):
    return batch


def _one_thread(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # what the run does about them is not this process's to do


def _unknown(tokenizer, texts: list[str], split: str) -> tuple[str, str]:
    has_unknown = unknown_test(tokenizer)
    unknown = [
        character
        for character in sorted(set("".join(texts)))
        if has_unknown(np.array(tokenizer(character, add_special_tokens=False).input_ids))
    ]
    characters = ", ".join(repr(character) for character in unknown[:10])
    return (
        "tokenizer",
        f"has no id for {characters} in the {split} split, expected a tokenizer that knows all of the text",
    )
