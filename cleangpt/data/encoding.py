"""Texts tokenized by `Dataset.map` into a folder that `datasets.load_from_disk` opens.

texts/train.arrow ──> Dataset.map ──> train/data.arrow      a row a text: input_ids, 16 or 32 bits an id
(a row a megabyte     (Encoder)       tokenizer/            saved
 of texts; removed)                   summary.json          what `summarize` reads
"""

import itertools
import json
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import multiprocess
import numpy as np
import pyarrow
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from ..recipe.keys import Data
from .cache import build_once, fingerprint
from .conversations import encode_conversations, message_texts, said
from .splits import IGNORED
from .text import brings_ids, cut, identify, load_splits, release_file, source_error
from .tokenization import has_unknown

BATCH = 1 << 20  # characters that the tokenizer gets at once, or ids written at once
SHARE = 8  # batches for which another process pays
logger = logging.getLogger(__name__)


def build_text(data: Data, tokenizer: PreTrainedTokenizerFast, takes_ids: bool = True) -> Path:
    """The folder with the tokenizer and the tokenized splits of `data`, built unless it is cached.

    Rows that bring `input_ids` (and `labels`) are taken as they are, if the tokenizer is theirs: `takes_ids`.

    Raises:
        UserError: for data that cannot be read, is empty, lacks a column, or does not fit the tokenizer.
    """
    is_chat = data.messages_column is not None
    parts = [tokenizer.backend_tokenizer.to_str(), tokenizer.special_tokens_map, tokenizer.chat_template, takes_ids]
    ingredients = {"format": 4, **identify(data), "tokenizer": fingerprint({"parts": parts})}

    def build(folder: Path) -> None:
        import datasets  # half a second that only a build needs

        raw = load_splits(data)
        if not sys.stderr.isatty():
            datasets.disable_progress_bars()  # they are for who watches
        has_ids = takes_ids and not is_chat and brings_ids(raw, data)
        texts, summary = folder / "texts", {}
        for name, rows in cut(raw, data, has_ids).items():
            counts = (
                _write_ids(tokenizer, rows(), folder / name) if has_ids else _write_texts(texts, name, rows(), is_chat)
            )
            if not counts["documents"]:
                raise source_error(data, f"no text for the {name} split")
            if empty := counts["empty"]:
                logger.warning(f"{empty:,} rows of the {name} split have no text and were skipped")
            summary[name] = counts
        for name, counts in reversed(summary.items()):  # once it has forked, a process tokenizes in one thread
            key = f"{fingerprint(ingredients)}-{name}"
            if not has_ids:
                encoder = Encoder(tokenizer, texts / f"{name}.arrow", data.path != "text", is_chat)
                tokenize(encoder, folder / name, key, data.num_proc)
            counts["tokens"] = describe_split(folder / name, key)
            if data.path == "text":
                counts["documents"] = 1  # in pieces
        shutil.rmtree(texts, ignore_errors=True)
        tokenizer.save_pretrained(folder / "tokenizer")
        (folder / "dataset_dict.json").write_text(json.dumps({"splits": [*summary]}))
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))

    return build_once(ingredients, build)


def _write_texts(folder: Path, name: str, texts: Iterator[str], is_chat: bool) -> dict[str, int]:
    """Writes texts for `tokenize`; counts them, their UTF-8 bytes, and empty ones, which are left out.

    The bytes of a conversation are those of what the assistant says.
    """
    counts = {"documents": 0, "bytes": 0, "empty": 0}

    def tables() -> Iterator[pyarrow.Table]:
        for batch in _batches(texts, len, counts):
            counts["bytes"] += sum(len((said(text) if is_chat else text).encode()) for text in batch)
            yield pyarrow.table({"texts": pyarrow.array([batch], pyarrow.list_(pyarrow.large_string()))})

    write_tables(tables(), folder / f"{name}.arrow")
    return counts


def _write_ids(
    tokenizer: PreTrainedTokenizerFast, rows: Iterator[tuple[np.ndarray, np.ndarray | None]], folder: Path
) -> dict[str, int]:
    """Writes ids that the data brings, once they fit the tokenizer; counts as `_write_texts` does."""
    counts, size = {"documents": 0, "bytes": 0, "empty": 0}, len(tokenizer)

    def tables() -> Iterator[pyarrow.Table]:
        for batch in _batches(rows, lambda row: len(row[0]), counts):
            ids, labels = zip(*batch, strict=True)
            for column, lists, special in (("input_ids", ids, 0), ("labels", labels, IGNORED)):
                values = np.concatenate(lists) if lists[0] is not None else np.zeros(1)
                wrong = values[(values >= size) | (values < 0) & (values != special)]
                if len(wrong):
                    message = f"expected {column} below the tokenizer's {size:,}, got {wrong[0]}"
                    raise UserError(("tokenizer", f"{message} in the {folder.name} split"))
            spoken = ids if labels[0] is None else [row[row != IGNORED] for row in labels]
            texts = tokenizer.backend_tokenizer.decode_batch([row.tolist() for row in spoken], skip_special_tokens=True)
            counts["bytes"] += sum(len(text.encode()) for text in texts)
            yield to_table([row.astype(id_type(size)) for row in ids], None if labels[0] is None else labels)

    write_tables(tables(), folder / "data.arrow")
    return counts


def _batches(rows: Iterable[Any], measure: Callable[[Any], int], counts: dict[str, int]) -> Iterator[list[Any]]:
    """Rows in lists that `measure` `BATCH` or little more; empty ones are only counted."""
    batch: list[Any] = []
    size = 0
    for row in rows:
        length = measure(row)
        counts["documents" if length else "empty"] += 1
        batch += [row] if length else []
        size += length
        if size >= BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def write_tables(tables: Iterator[pyarrow.Table], path: Path) -> None:
    from datasets.arrow_writer import ArrowWriter

    path.parent.mkdir(parents=True, exist_ok=True)
    with ArrowWriter(path=str(path)) as writer:
        for table in tables:
            writer.write_table(table)


def to_table(ids: Sequence[np.ndarray], labels: Sequence[np.ndarray] | None = None) -> pyarrow.Table:
    """Rows of ids, and of labels, as the columns that a built split has; a row's first label is no target."""
    offsets = np.cumsum([0, *map(len, ids)], dtype=np.int32)
    columns = {"input_ids": np.concatenate(ids)}
    if labels is not None:
        columns["labels"] = np.concatenate(labels).astype(np.int32)
        columns["labels"][offsets[:-1]] = IGNORED
    return pyarrow.table({name: pyarrow.ListArray.from_arrays(offsets, column) for name, column in columns.items()})


def id_type(num_ids: int) -> type[np.unsignedinteger]:
    """The type in which ids below `num_ids` are kept."""
    return np.uint16 if num_ids <= 2**16 else np.uint32


class Encoder:
    """Makes a row of ids of each text in a row of texts: `Dataset.map` calls it, in several processes if it shall."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: Path, has_end: bool, is_chat: bool = False) -> None:
        """`texts` is the file, named after the split; `has_end` appends the end token to each text.

        With `is_chat` the texts are conversations, which end as their template says.
        """
        if has_end and not is_chat and tokenizer.eos_token_id is None:
            raise UserError(("tokenizer.path", "expected a tokenizer with an end token (eos_token) between documents"))
        self.tokenizer, self.texts, self.process, self.calls = tokenizer, texts, os.getpid(), 0
        self.end, self.is_chat = [tokenizer.eos_token_id] if has_end else [], is_chat

    def __call__(self, rows: pyarrow.Table) -> pyarrow.Table:
        if os.getpid() != self.process:
            for number in (signal.SIGTERM, signal.SIGUSR1):  # the run's handlers are not for its workers,
                signal.signal(number, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # which it ends after a Ctrl-C
        self.calls += 1
        if self.calls % SHARE == 0:
            release_file(self.texts)
        return self.encode(rows.column("texts").chunk(0).flatten().to_pylist())

    def encode(self, texts: list[str]) -> pyarrow.Table:
        """A row of `input_ids` for each text, and of `labels` for each conversation."""
        backend, dtype = self.tokenizer.backend_tokenizer, id_type(len(self.tokenizer))
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # what looks like one is text
        if self.is_chat:
            ids, labels = zip(*encode_conversations(texts, self.tokenizer), strict=True)
            texts = [*itertools.chain.from_iterable(map(message_texts, texts))]
        else:
            labels, encoded = None, backend.encode_batch_fast(texts, add_special_tokens=False)
            ids = [one.ids + self.end for one in encoded]
        ids = [np.array(row, dtype) for row in ids]
        if has_unknown(self.tokenizer, np.concatenate(ids)):
            characters = sorted(set("".join(texts)))
            alone = zip(characters, backend.encode_batch(characters, add_special_tokens=False), strict=True)
            strange = [repr(text) for text, one in alone if has_unknown(self.tokenizer, np.array(one.ids))]
            message = f"expected one that knows all of the text, has no id for {', '.join(strange[:10])}"
            raise UserError(("tokenizer", f"{message} in the {self.texts.stem} split"))
        return to_table(ids, labels)


def tokenize(encoder: Encoder, folder: Path, key: str, num_proc: int | None) -> None:
    """Tokenizes the encoder's texts with `Dataset.map` into `folder`; the result's fingerprint is `key`."""
    from datasets import Dataset

    source = Dataset.from_file(str(encoder.texts))
    try:
        source.with_format("arrow").map(
            encoder,
            batched=True,
            batch_size=1,
            remove_columns=source.column_names,
            cache_file_name=str(folder / "data.arrow"),
            new_fingerprint=key,
            num_proc=min(num_proc or 0, len(source) // SHARE) or None,
            desc=f"Tokenizing {folder.name}",
        )
    except multiprocess.TimeoutError as error:  # of workers that end late, after what really went wrong
        raise error.__context__ or error from None


def describe_split(folder: Path, key: str) -> int:
    """Writes beside a split's Arrow files what `load_from_disk` reads first; returns the number of tokens."""
    from datasets import Dataset

    files = sorted(path.name for path in folder.glob("data*.arrow"))
    parts = [Dataset.from_file(str(folder / file)) for file in files]
    parts[0].info.write_to_directory(str(folder))
    state: dict[str, Any] = {
        "_data_files": [{"filename": file} for file in files],
        "_fingerprint": key,
        "_split": folder.name,
    }
    state |= dict.fromkeys(["_format_columns", "_format_type"]) | {"_format_kwargs": {}, "_output_all_columns": False}
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    return sum(len(chunk.values) for part in parts for chunk in part.data.column("input_ids").chunks)
