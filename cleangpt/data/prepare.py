"""From a recipe to its tokenizer and its splits, building what is not in the cache yet."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models.build import resolve_block_size
from ..recipe import ARITHMETIC, Recipe
from ..tokenization import VERSION, arithmetic_tokenizer, load_tokenizer, train_tokenizer
from .arithmetic import FRACTIONS, ArithmeticSplit
from .cache import fingerprint
from .packing import TextSplit, summarize
from .text import build_text


@dataclass
class PreparedData:
    """What a model is trained and judged on."""

    tokenizer: PreTrainedTokenizerBase
    splits: dict
    """Split name to split, as `data/splits.py` describes; consecutive, non-overlapping sequences but for `train`."""
    folder: Path | None
    """The cache folder, named by the data's fingerprint; None for arithmetic, which is computed."""
    example: str
    """A text to let a model continue: the recipe's first prompt, a held-out problem, the validation split's start
    (empty where `data.block_size` is 1 and leaves no room for it)."""

    @property
    def fingerprint(self) -> str | None:
        """Hash of text, tokenizer and cut; None for arithmetic."""
        return self.folder.name if self.folder else None


def prepare_data(recipe: Recipe) -> PreparedData:
    """Tokenizer and splits of a recipe; `data.block_size` is set where it was left out.

    Raises:
        UserError: for data that cannot be read, or is shorter than one sequence.
    """
    resolve_block_size(recipe)
    data = recipe.data
    if data.path in ARITHMETIC:
        tokenizer = arithmetic_tokenizer()
        names = data.split or FRACTIONS
        splits = {name: ArithmeticSplit(data, name, recipe.run.seed, tokenizer) for name in names}
        if "validation" not in splits:
            raise UserError(("data.split", f"expected a validation split, got {', '.join(splits)}"))
        return PreparedData(tokenizer, splits, None, splits["validation"].texts(np.arange(1))[0][0])

    section = recipe.tokenizer
    if section.path is not None:
        tokenizer = load_tokenizer(section.path)
        identity = fingerprint(
            {"backend": tokenizer.backend_tokenizer.to_str(), "special": tokenizer.special_tokens_map}
        )
        folder = build_text(data, lambda texts: tokenizer, identity)
    else:
        identity = {"version": VERSION, "kind": section.train.kind, "vocab_size": section.train.vocab_size}
        folder = build_text(data, lambda texts: train_tokenizer(section.train, texts), identity)
    splits = {
        name: TextSplit(folder, name, data.block_size, data.packing if name == "train" else "blocks")
        for name in summarize(folder)
    }
    if splits["train"].num_targets < data.block_size:
        length = splits["train"].num_targets + 1
        message = f"expected less than the train split's {length} tokens, got {data.block_size}"
        raise UserError(("data.block_size", message))
    tokenizer = load_tokenizer(folder / "tokenizer")
    beginning = tokenizer.decode(splits["validation"].tokens[: min(8, data.block_size - 1)])  # leaves room for more
    return PreparedData(tokenizer, splits, folder, next(iter(recipe.evaluation.prompts), beginning))
