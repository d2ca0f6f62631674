"""The tokenizer and splits of a recipe, built unless they are cached."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from ..recipe.keys import ARITHMETIC, Recipe
from .arithmetic import FRACTIONS, ArithmeticSplit
from .encoding import build_text
from .packing import TextSplit
from .splits import Split
from .stream import summarize
from .text import own_tokenizer
from .tokenization import arithmetic_tokenizer, load_tokenizer


@dataclass
class PreparedData:
    """What a model is trained and evaluated on."""

    tokenizer: PreTrainedTokenizerFast
    splits: dict[str, Split]  # by name; all but `train` consist of consecutive sequences that do not overlap
    folder: Path | None  # in the cache, named by the data's fingerprint; None for arithmetic, which is computed
    example: str  # to continue: first prompt, validation problem, or start of that split (empty for `block_size` 1)

    @property
    def fingerprint(self) -> str | None:
        """Hash of text, tokenizer and cut; None for arithmetic."""
        return self.folder.name if self.folder else None

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tokens of text, or of problems, in each split."""
        return {name: len(s.stream) if isinstance(s, TextSplit) else len(s) for name, s in self.splits.items()}


def prepare_data(recipe: Recipe) -> PreparedData:
    """Tokenizer and splits of a recipe with its `data.block_size`; a `UserError` for data unreadable or too short."""
    data, block_size, training, seed = recipe.data, recipe.data.block_size, recipe.tokenizer.train, recipe.run.seed
    if data.path in ARITHMETIC:
        tokenizer, names = arithmetic_tokenizer(), dict.fromkeys([*(data.split or FRACTIONS), "validation"])
        problems = {name: ArithmeticSplit(data, name, seed, tokenizer) for name in names}
        return PreparedData(tokenizer, {**problems}, None, problems["validation"].texts(np.arange(1))[0][0])

    assert block_size is not None  # the caller has resolved it
    if training is not None:
        folder = build_text(data, training)
    else:
        folder = build_text(data, load_tokenizer(recipe.tokenizer.path or own_tokenizer(data)))
    summary = summarize(folder)
    if data.packing == "documents" and summary["train"]["documents"] == 1:
        message = "expected rows of a table, with a document each: files of plain text are one document"
        raise UserError(("data.packing", message))
    measured = "documents" if data.packing == "documents" else "blocks"
    packings = {name: data.packing if name == "train" else measured for name in summary}
    splits = {name: TextSplit(folder, name, block_size, packing, seed) for name, packing in packings.items()}
    length = len(splits["train"].stream)
    if length <= block_size:
        raise UserError(("data.block_size", f"expected less than the train split's {length} tokens, got {block_size}"))
    tokenizer = load_tokenizer(folder / "tokenizer")
    beginning = str(
        tokenizer.decode(next(iter(splits["validation"].stream))[: min(8, block_size - 1)])
    )  # room for more
    return PreparedData(tokenizer, {**splits}, folder, (recipe.evaluation.prompts or (beginning,))[0])
