"""The keys that say where text comes from: one text, or the sources of a mixture."""

import string
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from .values import Files, NonNegative, Positive, ReadOnly, Section, Text


class Origin(Section):  # where text comes from
    path: Annotated[str, Field(coerce_numbers_to_str=True), BeforeValidator(lambda value: value or ""), "text"] = ""
    """`text`, `json`, `parquet` or `csv` for files, a Hub id, a folder that `save_to_disk` wrote, or `addition` or
    `multiplication` (generated). Rows with `input_ids` (and `labels`) are taken as they are."""
    name: Text | None = None
    """Configuration of the Hub dataset."""
    revision: Text | None = None
    """Branch, tag or commit of the Hub dataset."""
    data_files: Files | Annotated[dict[str, Files], AfterValidator(ReadOnly)] | None = None
    """A file, glob pattern or URL, a list of them, or a mapping from split to them."""
    split: Annotated[dict[str, Positive], AfterValidator(ReadOnly)] | None = None
    """Fractions of train (text by characters, tables by rows, problems by index); null: train 0.9, validation 0.1, or
    for arithmetic train 0.7, validation 0.15, test 0.15. `{train: 0.1}` takes a part of text that brings validation."""
    text_column: Text = "text"
    """Column that holds the text."""
    template: Text | None = None
    """A row's text from several columns, instead of `text_column`: `{question} {answer}`, say."""
    messages_column: Text | None = None
    """Column of conversations, `[{"role": "user", "content": "Hello"}, ...]`, instead of `text_column`: what the
    assistant says is the target. They go through the tokenizer's chat template and are packed as `documents`."""

    @property
    def columns(self) -> list[str]:
        """The columns that hold the text."""
        if self.template is None:
            return [self.messages_column or self.text_column]
        return [name for _, name, _, _ in string.Formatter().parse(self.template) if name is not None]

    @property
    def files(self) -> dict[str, tuple[str, ...]]:
        """`data_files` as a mapping from split to files; in place of a URL its local copy, where there is one."""
        by_split = self.data_files if isinstance(self.data_files, dict) else {"train": self.data_files or ()}
        listed = {split: (files,) if isinstance(files, str) else files for split, files in by_split.items()}
        return {
            split: tuple(str(copy) if (copy := local_copy(file)) and copy.is_file() else file for file in files)
            for split, files in listed.items()
        }


def local_copy(url: str) -> Path | None:
    """Where a URL's file may lie on this machine, `data/tinyshakespeare/input.txt` say; None for other files."""
    return Path("data", *url.split("/")[-2:]) if "://" in url else None


class Ramp(Section):  # linear over the run
    begin: NonNegative
    end: NonNegative


class Source(Origin):  # of a mixture
    label: Text | None = None
    weight: Positive | Ramp = 1.0

    @property
    def name_in_metrics(self) -> str:
        """`label`, by default the name of the first file or of the dataset."""
        files = [file for files in self.files.values() for file in files]
        return self.label or (Path(files[0]).stem if files else Path(self.path).name)
