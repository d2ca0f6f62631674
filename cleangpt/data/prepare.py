"""The tokenizer and splits of a recipe, built unless they are cached."""

import contextlib
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from ..recipe.keys import ARITHMETIC, FILES, Data, Recipe, TokenizerTraining
from ..recipe.schedules import source_weights
from ..recipe.sources import Origin
from .arithmetic import FRACTIONS, VERSION_OF_SPLITS, ArithmeticSplit
from .cache import build_once, fingerprint
from .conversations import message_texts, write_prompt
from .encoding import build_text
from .mixture import Mixture, texts_of
from .packing import TextSplit
from .splits import IGNORED, Split
from .stream import summarize
from .text import Rows, cut, identify, load_splits, own_tokenizer
from .tokenization import VERSION, arithmetic_tokenizer, load_tokenizer, train_tokenizer


@dataclass
class PreparedData:
    """What a model is trained and evaluated on."""

    tokenizer: PreTrainedTokenizerFast
    splits: dict[str, Split]  # by name; all but `train` consist of consecutive sequences that do not overlap
    folders: dict[str, Path]  # in the cache, of each source by label ("" without sources); none for arithmetic
    prompts: tuple[str, ...] | None  # the recipe's, as the model reads them: to a chat model, the user says them
    example: str  # to continue: first prompt, validation problem, or start of that split (empty for `block_size` 1)

    @property
    def folder(self) -> Path | None:
        """That of the first source."""
        return next(iter(self.folders.values()), None)

    @property
    def fingerprint(self) -> str:
        """Hash of text, tokenizer and cut, of all sources; for arithmetic, the version of its splits."""
        names = [folder.name for folder in self.folders.values()]
        return fingerprint({"sources": names}) if len(names) > 1 else next(iter(names), VERSION_OF_SPLITS)

    @property
    def sizes(self) -> dict[str, int]:
        """The number of tokens of text, or of problems, in each split."""
        return {n: sum(t.num_tokens for t in texts_of(s).values()) or len(s) for n, s in self.splits.items()}


def prepare_data(recipe: Recipe) -> PreparedData:
    """Tokenizer and splits of a recipe with its `data.block_size`; a `UserError` for data unreadable or too short."""
    data, block_size, seed = recipe.data, recipe.data.block_size, recipe.run.seed
    if not data.sources and data.path in ARITHMETIC:
        tokenizer, names = arithmetic_tokenizer(), dict.fromkeys([*(data.split or FRACTIONS), "validation"])
        problems = {name: ArithmeticSplit(data, name, seed, tokenizer) for name in names}
        first = problems["validation"].texts(np.arange(1))[0][0]
        return PreparedData(tokenizer, {**problems}, {}, recipe.evaluation.prompts, first)

    assert block_size is not None  # the caller has resolved it
    tokenizer = _tokenizer(recipe)
    folders: dict[str, Path] = {}
    splits: dict[str, dict[str, TextSplit]] = {}
    for number, (label, source) in enumerate(data.parts.items()):
        with source_keys(data, number):
            folder = folders[label] = build_text(source, tokenizer, recipe.tokenizer.train is None)
            summary = summarize(folder)
            if data.packing == "documents" and not data.sources and summary["train"]["documents"] == 1:
                message = "expected rows of a table, with a document each: files of plain text are one document"
                raise UserError(("data.packing", message))
            for name in summary:
                packing = "blocks" if name != "train" and data.packing == "windows" else data.packing
                split = TextSplit(folder, name, block_size, packing, seed + number)
                splits.setdefault(name, {})[label] = split
            if (length := splits["train"][label].num_tokens) <= block_size:
                message = f"expected less than the {length} tokens of the train split{label and f' of {label}'}"
                raise UserError(("data.block_size", f"{message}, got {block_size}"))
    validation, width = next(iter(splits["validation"].values())), 8
    if validation.labels is not None:  # up to what the assistant says
        width = int(np.argmax(next(iter(validation.labels)) != IGNORED))
    beginning = str(tokenizer.decode(next(iter(validation.stream))[: min(width, block_size - 1)]))  # room for more
    prompts, is_chat = recipe.evaluation.prompts, any(part.messages_column for part in data.parts.values())
    if prompts is not None and is_chat:
        prompts = tuple(write_prompt(prompt, tokenizer) for prompt in prompts)
    whole = {name: Mixture(parts) if data.sources else parts[""] for name, parts in splits.items()}
    return PreparedData(tokenizer, {**whole}, folders, prompts, (prompts or (beginning,))[0])


def _tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The recipe's tokenizer: saved, brought by the data, or trained on it."""
    data, training = recipe.data, recipe.tokenizer.train
    if training is None:
        built = [part for part in data.parts.values() if part.path not in FILES]  # which may bring theirs
        return load_tokenizer(recipe.tokenizer.path or own_tokenizer(built[0]))
    return load_tokenizer(_train_on_data(data, training))


def _train_on_data(data: Data, training: TokenizerTraining) -> Path:
    """The folder of a tokenizer trained on the data, unless it is cached: on each source by its mean weight."""
    parts, sources, shares = [*data.parts.values()], [], [1.0]
    for number, part in enumerate(parts):
        with source_keys(data, number):
            sources.append(identify(part))
    if data.sources:
        weights = source_weights(data.sources, np.arange(1, 101) / 100)
        shares = (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0).round(6).tolist()
    ingredients = {"version": VERSION, **training.model_dump(mode="json"), "sources": sources, "shares": shares}

    def read(number: int, rows: Rows) -> Iterator[str]:
        with source_keys(data, number):
            is_chat = parts[number].messages_column is not None
            yield from itertools.chain.from_iterable(map(message_texts, rows())) if is_chat else filter(None, rows())

    def build(folder: Path) -> None:
        texts = []
        for number, part in enumerate(parts):
            with source_keys(data, number):
                splits = cut(load_splits(part), part, False)
            texts.append({name: functools.partial(read, number, rows) for name, rows in splits.items()})
        chosen: Iterable[str] = itertools.chain.from_iterable(rows() for splits in texts for rows in splits.values())
        if training.kind == "bpe":  # its merges are those of train
            chosen = _mix([splits["train"] for splits in texts], shares)
        train_tokenizer(training, chosen).save_pretrained(folder / "tokenizer")

    return build_once(ingredients, build) / "tokenizer"


def _mix(sources: list[Rows], shares: list[float]) -> Iterator[str]:
    """Texts with as many characters as all sources together, of each its share: small ones come several times."""
    if len(sources) == 1:
        yield from sources[0]()
        return
    sizes = [sum(map(len, rows())) for rows in sources]
    taken, total = np.where(np.array(sizes) * shares > 0, 0.0, np.inf), sum(sizes)  # of each in units of its share
    endless = [itertools.chain.from_iterable(call() for call in itertools.repeat(rows)) for rows in sources]
    while total > 0:
        source = int(taken.argmin())
        yield (text := next(endless[source]))
        taken[source] += len(text) / shares[source]
        total -= len(text)


@contextlib.contextmanager
def source_keys(data: Data, number: int) -> Iterator[None]:
    """Reports mistakes in source `number` of a mixture under its own keys, `data.sources.0.path` say."""
    try:
        yield
    except UserError as error:
        names = {f"data.{name}": f"data.sources.{number}.{name}" for name in Origin.model_fields if data.sources}
        raise UserError(*((names.get(key, key), message) for key, message in error.problems)) from error
