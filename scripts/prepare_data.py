"""Builds a recipe's data and tokenizer without training, and says what there is.

    python scripts/prepare_data.py recipes/tinystory.yaml [--section.key=value ...]

Ends with a table, a histogram of the documents' lengths, and the line that opens what was built with HF datasets.
Training finds it. `--push REPO_ID` publishes it, with its tokenizer and a card, as a dataset that `data.path: REPO_ID`
takes as it is.
"""

import argparse
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np

from cleangpt.data.packing import document_lengths
from cleangpt.data.prepare import PreparedData
from cleangpt.data.stream import summarize
from cleangpt.errors import UserError, exit_code
from cleangpt.recipe.keys import Recipe
from cleangpt.recipe.reading import load_recipe
from cleangpt.reporting.hub import push_dataset
from cleangpt.training.setup import load_data

CARD = """# {repo_id}

Text tokenized by CleanGPT, a document a row: `input_ids` end with the end token.

    from datasets import load_dataset
    data = load_dataset({arguments})

| split | documents | tokens | bytes of text |
|---|---|---|---|
{rows}

The tokenizer, {tokenizer}, is in `tokenizer/`. In a recipe of CleanGPT, `data.path: {repo_id}`{source} without
`data_files` and with `tokenizer: {{path: null, train: null}}` takes both as they are. Made by this recipe:

```yaml
{recipe}```
"""
QUANTILES = {"min": 0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "max": 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the recipe's file")
    parser.add_argument("--push", metavar="REPO_ID", help="push what was built to the Hub, private as hub.private says")
    arguments, overrides = parser.parse_known_args()
    started = time.perf_counter()
    recipe = load_recipe(arguments.recipe, overrides)
    recipe, data = load_data(recipe)
    report(data, time.perf_counter() - started)
    if arguments.push:
        push(data, arguments.push, recipe)


def push(data: PreparedData, repo_id: str, recipe: Recipe) -> None:
    """Publishes the built splits as a dataset, a configuration a source, with their tokenizer and card."""
    if data.folder is None:
        raise UserError(("--push", "expected built data: arithmetic is computed"))
    rows = "\n".join(
        f"| {label and f'{label}, '}{name} | {counts['documents']:,} | {counts['tokens']:,} | {counts['bytes']:,} |"
        for label, folder in data.folders.items()
        for name, counts in summarize(folder).items()
    )
    tokenizer = f"{type(data.tokenizer).__name__} with {len(data.tokenizer):,} ids"
    first = next(iter(data.folders))
    card = CARD.format(
        repo_id=repo_id,
        arguments=f'"{repo_id}"' + (first and f', "{first}"'),
        source=first and f", `data.name: {first}`",
        rows=rows,
        tokenizer=tokenizer,
        recipe=recipe.to_yaml(),
    )
    try:
        print(f"pushed to {push_dataset(data.folders, repo_id, recipe.hub.private, card)}")
    except ConnectionError as error:
        raise UserError(("--push", str(error))) from None


def report(data: PreparedData, seconds: float) -> None:
    """Prints what there is of each split, of each source of a mixture."""
    if not data.folders:
        for name, split in data.splits.items():
            print(f"{name:12} {split.num_problems:>15,} problems, computed when they are drawn")
        return
    for label, folder in data.folders.items():
        print(f"{label or 'split':12} {'documents':>12} {'tokens':>15} {'bytes of text':>15} {'bytes on disk':>15}")
        for name, counts in summarize(folder).items():
            disk = sum(file.stat().st_size for file in folder.glob(f"{name}/*"))
            print(f"{name:12} {counts['documents']:12,} {counts['tokens']:15,} {counts['bytes']:15,} {disk:15,}")
            if counts["empty"]:
                print(f"{'':12} {counts['empty']:12,} rows without text were skipped")
        lengths = document_lengths(folder, "train")
        quantiles = "  ".join(f"{k} {np.quantile(lengths, q):,.0f}" for k, q in QUANTILES.items())
        draw(lengths, folder / "documents.png")
        print(f"\ntokens per document of train: {quantiles}, lengths drawn in {folder / 'documents.png'}")
        print(f'To open it: datasets.load_from_disk("{folder}")\n')
    print(f"{seconds:.1f} s, vocabulary {len(data.tokenizer):,}")


def draw(lengths: np.ndarray, path: Path) -> None:
    """A histogram of document lengths in tokens, on a logarithmic axis."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.5), layout="constrained")
    axes.hist(lengths, bins=np.geomspace(max(1, lengths.min()), lengths.max() + 1, 50))
    axes.set(
        xscale="log", xlabel="tokens per document", ylabel="documents", title=f"{len(lengths):,} documents of train"
    )
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(exit_code(main))
