"""Text: loaded with HF datasets, tokenized, kept as one memory-mapped stream of ids, packed into sequences.

files or Hub ──> splits ──> pieces of text ──> ids ──> train.arrow, validation.arrow ──> TextSplit[indices]
                 (cut)      (64 KB, or a row)          (16 or 32 bits an id)             (inputs and targets)
"""

import glob
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.compute
from datasets import Dataset, DatasetDict, Features, List, Value, load_dataset

from ..errors import UserError
from .cache import build_once, file_hash
from .splits import IGNORED, cut_points

PIECE = 1 << 16  # characters of a text file that are tokenized at once
FRACTIONS = {"train": 0.9, "validation": 0.1}


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
    raw = None if files else _load(section, None, None)
    ingredients = {
        "format": 1,
        "path": section.path if raw is None else _remote_identity(raw),
        "files": {split: [file_hash(file) for file in names] for split, names in (files or {}).items()},
        "split": section.split or FRACTIONS,
        "text_column": section.text_column,
        "tokenizer": tokenizer_identity,
    }

    def build(folder: Path):
        scratch = folder / "scratch"
        splits = _cut(_load(section, files, scratch) if raw is None else raw, section)
        if "validation" not in splits:
            raise UserError(("data.split", f"expected a validation split, got {', '.join(splits)}"))
        tokenizer = make_tokenizer(text for text, _ in splits["train"]())
        tokenizer.save_pretrained(folder / "tokenizer")
        summary = {
            name: _tokenize(name, pieces, tokenizer, section, folder, scratch) for name, pieces in splits.items()
        }
        (folder / "summary.json").write_text(json.dumps(summary, indent=1))
        shutil.rmtree(scratch)

    return build_once(ingredients, build)


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


def _load(section, files: dict | None, cache_dir: Path | None) -> DatasetDict:
    """The splits as HF datasets; text files line by line with their line breaks."""
    options = {"sample_by": "line", "keep_linebreaks": True} if section.path == "text" else {}
    key = "data.data_files" if section.data_files is not None else "data.path"
    try:
        raw = load_dataset(
            section.path,
            section.name,
            data_files=files or section.data_files,
            revision=section.revision,
            cache_dir=None if cache_dir is None else str(cache_dir / "raw"),
            **options,
        )
    except Exception as error:  # datasets and the Hub client raise many kinds; the cause says what is wrong
        cause = error.__cause__ or error
        where = section.path if section.data_files is None else section.data_files
        raise UserError((key, f"{where!r} cannot be loaded: {type(cause).__name__}: {cause}")) from error
    for split in raw.values():
        if section.text_column not in split.column_names:
            columns = ", ".join(split.column_names)
            raise UserError(("data.text_column", f"expected one of {columns}, got {section.text_column!r}"))
    return raw


def _remote_identity(raw: DatasetDict) -> list[str]:
    """Names of the prepared Arrow files: `datasets` puts the commit, or the files' ETags, into them."""
    return sorted("/".join(Path(file["filename"]).parts[-5:]) for split in raw.values() for file in split.cache_files)


def _cut(raw: DatasetDict, section) -> dict[str, Callable[[], Iterator[tuple[str, bool]]]]:
    """Split name to a function that yields its pieces of text, each with whether a document ends there.

    A validation split that the data brings is kept; otherwise train is cut by `data.split`, in order.
    """
    is_stream = section.path == "text"
    read = _stream_pieces if is_stream else _row_pieces
    length = _num_characters if is_stream else len
    given = {name: (dataset, 0, length(dataset)) for name, dataset in raw.items()}
    if "train" not in given:
        raise UserError(("data.data_files", f"expected a train split, got {', '.join(given)}"))
    if "validation" not in given:
        dataset, _, total = given.pop("train")
        bounds = cut_points(total, section.split or FRACTIONS)
        given = {**{name: (dataset, *bounds[name]) for name in bounds}, **given}
    return {
        name: lambda dataset=dataset, start=start, stop=stop: read(dataset, section.text_column, start, stop)
        for name, (dataset, start, stop) in given.items()
    }


def _num_characters(dataset: Dataset) -> int:
    return pyarrow.compute.sum(pyarrow.compute.utf8_length(dataset.data.column("text"))).as_py() or 0


def _stream_pieces(dataset: Dataset, column: str, start: int, stop: int) -> Iterator[tuple[str, bool]]:
    """Characters `start` to `stop` of lines read end to end, in pieces that tokenize as the whole would.

    A piece ends after a single line break between two lines of text, where every usual pre-tokenizer ends a word.
    """
    place, piece = 0, ""
    for batch in dataset.select_columns(column).iter(batch_size=1000):
        for line in batch[column]:
            cut = line[max(start - place, 0) : max(stop - place, 0)]
            place += len(line)
            if len(piece) >= PIECE and not cut[:1].isspace() and piece[-1:] == "\n" and not piece[-2:-1].isspace():
                yield piece, False
                piece = ""
            piece += cut
        if place >= stop:
            break
    if piece:
        yield piece, False


def _row_pieces(dataset: Dataset, column: str, start: int, stop: int) -> Iterator[tuple[str, bool]]:
    """Rows `start` to `stop`, each a document; empty ones are left out."""
    for batch in dataset.select_columns(column).select(range(start, stop)).iter(batch_size=1000):
        yield from ((text, True) for text in batch[column] if text)


def _tokenize(name: str, pieces: Callable, tokenizer, section, folder: Path, scratch: Path) -> dict:
    """Writes `<name>.arrow`, and `<name>.documents.arrow` with where documents start; returns counts."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end = tokenizer.eos_token_id
    if end is None and section.path != "text":
        raise UserError(("tokenizer.path", "expected a tokenizer with an end token (eos_token) between documents"))

    def encode(batch: dict) -> dict:
        encoded = tokenizer(batch["text"], add_special_tokens=False, return_attention_mask=False)["input_ids"]
        for text, ids in zip(batch["text"], encoded, strict=True):
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                raise UserError(_unknown(tokenizer, text, name))
        ids = [np.array([*ids, end] if ends else ids, dtype) for ids, ends in zip(encoded, batch["ends"], strict=True)]
        return {"ids": ids, "bytes": [len(text.encode()) for text in batch["text"]]}

    if next(iter(pieces()), None) is None:
        raise UserError(("data.data_files" if section.data_files else "data.path", f"no text for the {name} split"))
    rows = Dataset.from_generator(
        lambda: ({"text": text, "ends": ends} for text, ends in pieces()),
        features=Features({"text": Value("large_string"), "ends": Value("bool")}),
        cache_dir=str(scratch / name),
        fingerprint=f"{name}-text",
    )
    encoded = rows.map(
        encode,
        batched=True,
        batch_size=256,
        num_proc=section.num_proc,
        remove_columns=rows.column_names,
        features=Features({"ids": List(Value(np.dtype(dtype).name)), "bytes": Value("int64")}),
        cache_file_name=str(scratch / f"{name}-ids.arrow"),
        new_fingerprint=f"{name}-ids",
        desc=f"Tokenizing {name}",
    )
    num_bytes, starts, num_tokens = 0, [np.zeros(1, np.int64)], 0
    with open(scratch / f"{name}.bin", "wb") as file:
        for batch in encoded.with_format("arrow").iter(batch_size=256):
            ids = batch.column("ids").combine_chunks().flatten().to_numpy()
            file.write(ids.tobytes())
            starts.append(np.flatnonzero(ids == end) + 1 + num_tokens if end is not None else [])
            num_tokens += len(ids)
            num_bytes += pyarrow.compute.sum(batch.column("bytes")).as_py()
    starts = np.concatenate(starts).astype(np.int64)
    starts = starts[starts < num_tokens]
    _write_column(folder / f"{name}.arrow", "input_ids", np.memmap(scratch / f"{name}.bin", dtype))
    _write_column(folder / f"{name}.documents.arrow", "start", starts)
    return {"tokens": num_tokens, "documents": len(starts), "bytes": num_bytes}


def _unknown(tokenizer, text: str, split: str) -> tuple[str, str]:
    unknown = [
        c for c in sorted(set(text)) if tokenizer.unk_token_id in tokenizer(c, add_special_tokens=False).input_ids
    ]
    characters = ", ".join(repr(character) for character in unknown[:10])
    return (
        "tokenizer",
        f"has no id for {characters} in the {split} split, expected a tokenizer that knows all of the text",
    )


def _write_column(path: Path, name: str, values: np.ndarray) -> None:
    """One Arrow column in one record batch, so that it is read back as one memory-mapped array."""
    column = pyarrow.RecordBatch.from_arrays([pyarrow.array(values)], names=[name])
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, column.schema) as writer:
        writer.write_batch(column)


def _read_column(path: Path, name: str) -> np.ndarray:
    return Dataset.from_file(str(path)).data.column(name).chunk(0).to_numpy(zero_copy_only=True)


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
        self.tokens = _read_column(folder / f"{name}.arrow", "input_ids")
        self.starts = _read_column(folder / f"{name}.documents.arrow", "start") if packing == "documents" else None
        self.num_bytes = json.loads((folder / "summary.json").read_text())[name]["bytes"]
        self.num_targets = len(self.tokens) - 1
        self.sequence_length = block_size
        self.num_sequences = -(-self.num_targets // block_size)
        self.targets_per_row = block_size if packing == "windows" else None
        self.packing = packing
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
        places = first[:, None] + np.arange(self.sequence_length + 1)  # (n, block_size + 1)
        inside = np.minimum(places, len(self.tokens) - 1)
        ids = self.tokens[inside].astype(np.int64)
        inputs, targets = ids[:, :-1], ids[:, 1:].copy()
        targets[places[:, 1:] >= len(self.tokens)] = IGNORED
        if self.starts is None:
            return {"input_ids": inputs, "targets": targets}
        document = np.searchsorted(self.starts, inside, side="right") - 1
        begin = np.maximum(self.starts[document[:, :-1]], first[:, None])
        targets[document[:, 1:] != document[:, :-1]] = IGNORED
        return {"input_ids": inputs, "targets": targets, "position_ids": places[:, :-1] - begin}


def document_lengths(folder: Path, name: str) -> np.ndarray:
    """Tokens of each document of a split, their ends included, int64 (documents,)."""
    starts = _read_column(folder / f"{name}.documents.arrow", "start")
    return np.diff(starts, append=summarize(folder)[name]["tokens"])


def summarize(folder: Path) -> dict[str, dict[str, int]]:
    """Tokens, documents and bytes of each split in a folder that `build_text` made."""
    return json.loads((folder / "summary.json").read_text())
