"""Text read with HF datasets, cut into splits, and tokenized into one stream of ids per split.

files or Hub ──> splits ──> pieces of text ──> ids ──> train.arrow, validation.arrow ──> packing.py
                 (cut)      (64 KB, or a row)          (16 or 32 bits per id)

Local files are streamed, several times rather than once into memory: a build of any size holds a few megabytes of them.
"""

import functools
import glob
import itertools
import json
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import torch
from datasets import load_dataset
from datasets.exceptions import DatasetGenerationError
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from ..recipe.keys import FILES, Data
from .cache import build_once, file_hash
from .packing import map_file, write_column
from .splits import cut_points
from .tokenization import has_unknown

PIECE = 1 << 16  # characters of a text file tokenized at once
BATCH = 1 << 20  # characters given at once to the tokenizer, or to one of several processes
FRACTIONS = {"train": 0.9, "validation": 0.1}

Texts = Callable[[], Iterator[str]]


def build_text(data: Data, make_tokenizer: Callable[[Iterator[str]], PreTrainedTokenizerFast], identity: Any) -> Path:
    """The folder with the tokenizer and token streams of `data`, built unless it is cached.

    `make_tokenizer` gets the texts of the train split; `identity` (JSON-able) changes exactly when it does.

    Raises:
        UserError: for data that cannot be read, is empty, lacks a column, or has characters unknown to the tokenizer.
    """
    files = _local_files(data)
    raw = {} if files else _load(data)
    prepared = [Path(file["filename"]) for split in raw.values() for file in split.cache_files]
    ingredients = {
        "format": 2,
        # datasets names prepared files by the commit, or by the ETags of the originals
        "path": data.path if files else sorted("/".join(path.parts[-5:]) for path in prepared),
        "files": {split: [_content(data, file) for file in names] for split, names in files.items()},
        "split": data.split or FRACTIONS,
        "text": data.template or data.text_column,
        "tokenizer": identity,
    }

    def build(folder: Path) -> None:
        splits = _cut(raw or _load(data), data)
        if "validation" not in splits:
            raise UserError(("data.split", f"expected a validation split, got {', '.join(splits)}"))
        tokenizer = make_tokenizer(filter(None, splits["train"]()))
        tokenizer.save_pretrained(folder / "tokenizer")
        summary = {name: _tokenize(name, pieces(), tokenizer, data, folder) for name, pieces in splits.items()}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))

    return build_once(ingredients, build)


def _local_files(data: Data) -> dict[str, list[str]]:
    """The files of each split, patterns expanded; empty unless all are on this machine."""
    if data.path not in FILES or any("://" in file for file in itertools.chain(*data.files.values())):
        return {}
    return {
        split: [match for file in files for match in sorted(glob.glob(file, recursive=True))]
        for split, files in data.files.items()
    }


def _content(data: Data, file: str) -> str:
    try:
        return file_hash(file)
    except OSError as error:
        raise _source_error(data, f"{file} cannot be read: {error.strerror}") from error


def _source_error(data: Data, message: str) -> UserError:
    return UserError(("data.path" if data.data_files is None else "data.data_files", message))


def _load(data: Data) -> dict[str, Any]:
    """The splits as HF datasets: local files as streams, text line by line with its line breaks."""
    files = _local_files(data)
    given = {split: list(names) for split, names in data.files.items()} if data.data_files else None
    lines: dict[str, Any] = {"sample_by": "line", "keep_linebreaks": True, "chunksize": BATCH}
    options = {"text": lines, "json": {"chunksize": BATCH}}.get(data.path, {}) | {"streaming": bool(files)}
    try:
        return load_dataset(data.path, data.name, data_files=files or given, revision=data.revision, **options)
    except Exception as error:  # datasets and the Hub client raise many kinds
        raise _unreadable(data, error) from error


def _unreadable(data: Data, error: BaseException) -> UserError:
    """The error for data that cannot be read, with file and line if they can be found."""
    if isinstance(error, DatasetGenerationError) and error.__cause__ is not None:
        error = error.__cause__
    for file in itertools.chain(*_local_files(data).values()) if data.path in ("text", "json") else ():
        if mistake := _find_mistake(file, data.path == "json"):
            return _source_error(data, f"{file}, line {mistake}")
    return _source_error(data, f"{data.data_files or data.path!r} cannot be loaded: {type(error).__name__}: {error}")


def _find_mistake(file: str, is_json: bool) -> str | None:
    """Number and mistake of the first line that is not UTF-8 or, in a file of JSON lines, not JSON."""
    with fsspec.open(file, "rb", compression="infer") as lines:
        for number, line in enumerate(lines, 1):
            try:
                text = line.decode()
                if is_json and number == 1 and text.startswith("["):
                    return None  # one list, which may span many lines
                if is_json and text.strip():
                    json.loads(text.removeprefix("\ufeff"))
            except UnicodeDecodeError as error:
                return f"{number}: expected UTF-8, got the byte 0x{line[error.start]:02x} at place {error.start + 1}"
            except ValueError as error:
                return f"{number}: expected JSON: {error}"
    return None


def _texts(dataset: Any, data: Data) -> Iterator[str]:
    """The text of each row, empty if there is none; what goes wrong is a `UserError`."""
    try:
        for table in dataset.with_format("arrow").iter(batch_size=1000):
            _check_columns(table, data)
            if data.template is None:
                yield from (text or "" for text in table.column(data.text_column).to_pylist())
                continue
            for row in table.select(data.columns).to_pylist():
                yield data.template.format_map({name: "" if value is None else value for name, value in row.items()})
    except UserError:
        raise
    except Exception as error:  # streams are read here, and each file format has its own errors
        raise _unreadable(data, error) from error


def _check_columns(table: pyarrow.Table, data: Data) -> None:
    for column in data.columns:
        if column not in table.column_names:
            key = "data.text_column" if data.template is None else "data.template"
            raise UserError((key, f"expected one of {', '.join(table.column_names)}, got {column!r}"))
    values = table.column(data.columns[0])
    is_text = pyarrow.types.is_string(values.type) or pyarrow.types.is_large_string(values.type)
    if data.template is None and not is_text and values.null_count < len(values):
        raise UserError(("data.text_column", f"expected a column of text, {data.text_column} is {values.type}"))


def _cut(raw: dict[str, Any], data: Data) -> dict[str, Texts]:
    """Functions that yield the texts to tokenize of each split: pieces of a text file, or rows of a table.

    Without a validation split in the data, train is cut by `data.split`, in order: by characters, or by rows.
    """
    texts: dict[str, Texts] = {name: functools.partial(_texts, dataset, data) for name, dataset in raw.items()}
    if "train" not in texts:
        raise UserError(("data.data_files", f"expected a train split, got {', '.join(texts)}"))
    read = _pieces if data.path == "text" else (lambda rows, *bounds: itertools.islice(rows(), *bounds))
    splits: dict[str, Texts] = {name: functools.partial(read, rows, 0, None) for name, rows in texts.items()}
    if "validation" not in splits:
        del splits["train"]
        total = sum(len(text) if data.path == "text" else 1 for text in texts["train"]())
        cuts = cut_points(total, data.split or FRACTIONS)
        splits = {name: functools.partial(read, texts["train"], *bounds) for name, bounds in cuts.items()} | splits
    return splits


def _pieces(lines: Texts, start: int, stop: int | None) -> Iterator[str]:
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


class _Encoder(Dataset[tuple[np.ndarray, int, str | None]]):
    """Batches of texts to ids, each text followed by the ids `end`; a `DataLoader` spreads them over processes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, end: list[int]) -> None:
        self.tokenizer, self.backend, self.end = tokenizer, tokenizer.backend_tokenizer, end
        self.dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
        self.backend.no_truncation()
        self.backend.no_padding()

    def __getitem__(self, batch: list[str]) -> tuple[np.ndarray, int, str | None]:
        """The ids of a batch end to end, its UTF-8 bytes, and the characters unknown to the tokenizer, if any."""
        encoded = self.backend.encode_batch_fast(batch, add_special_tokens=False)
        ids = np.concatenate([np.array(one.ids + self.end, self.dtype) for one in encoded])
        size, unknown = sum(len(text.encode()) for text in batch), None
        if has_unknown(self.tokenizer, ids):
            characters = sorted(set("".join(batch)))
            alone = zip(characters, self.backend.encode_batch(characters, add_special_tokens=False), strict=True)
            strange = [repr(text) for text, one in alone if has_unknown(self.tokenizer, np.array(one.ids))]
            unknown = ", ".join(strange[:10])
        return ids, size, unknown


def _batches(texts: Iterable[str], counts: dict[str, int]) -> Iterator[list[str]]:
    """Texts in batches of `BATCH` characters or little more; empty ones are only counted."""
    batch: list[str] = []
    size = 0
    for text in texts:
        counts["empty"] += not text
        batch += [text] if text else []
        size += len(text)
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _tokenize(
    name: str, texts: Iterator[str], tokenizer: PreTrainedTokenizerFast, data: Data, folder: Path
) -> dict[str, int]:
    """Writes the ids, `<name>.arrow`, and where documents start, `<name>.documents.arrow`; returns counts."""
    end, is_table = tokenizer.eos_token_id, data.path != "text"
    if end is None and is_table:
        raise UserError(("tokenizer.path", "expected a tokenizer with an end token (eos_token) between documents"))
    encoder = _Encoder(tokenizer, [end] if is_table else [])
    counts = {"tokens": 0, "documents": 0, "bytes": 0, "empty": 0}
    encoded = DataLoader(
        encoder,
        sampler=_batches(texts, counts),
        batch_size=None,
        collate_fn=tuple,  # leaves them as they are
        num_workers=data.num_proc or 0,
        worker_init_fn=_start_worker,
        generator=torch.Generator(),  # a DataLoader draws a number, which must not come from the run's generator
    )
    starts, stream = [np.zeros(1, np.int64)], folder / f"{name}.bin"
    bar = tqdm(desc=f"Tokenizing {name}", unit="B", unit_scale=True, disable=None, leave=False)
    with bar, open(stream, "wb") as file:
        for ids, size, unknown in encoded:
            if unknown is not None:
                message = f"expected one that knows all of the text, has no id for {unknown} in the {name} split"
                raise UserError(("tokenizer", message))
            file.write(ids)
            starts.append(np.flatnonzero(ids == end) + 1 + counts["tokens"])
            counts["tokens"] += len(ids)
            counts["bytes"] += size
            bar.update(size)
    if counts["tokens"] == 0:
        raise _source_error(data, f"no text for the {name} split")
    if empty := counts["empty"]:
        logging.getLogger(__name__).warning(f"{empty:,} rows of the {name} split have no text and were skipped")
    documents = np.concatenate(starts)
    documents = documents[documents < counts["tokens"]]
    mapped = map_file(stream)
    write_column(folder / f"{name}.arrow", "input_ids", np.frombuffer(mapped, encoder.dtype), mapped)
    write_column(folder / f"{name}.documents.arrow", "start", documents)
    os.remove(stream)
    return {**counts, "documents": len(documents)}


def _start_worker(worker: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the processes share the cores
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)  # the run's handlers are not for its workers
