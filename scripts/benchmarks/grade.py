"""Grading arithmetic beside generating the answers without a cache, as many a small trainer does.

`--batch_size` is that of the side without a cache; the others use the recipe's.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator

from cleangpt.evaluation.grading import grade
from cleangpt.evaluation.writing import solve
from cleangpt.models.build import load_model
from cleangpt.recipe.reading import load_recipe
from cleangpt.training.setup import load_data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", default="outputs/adder/final", help="a trained model [outputs/adder/final]")
    parser.add_argument("--recipe", default="recipes/adder.yaml", help="its recipe, zero-padded [recipes/adder.yaml]")
    parser.add_argument("--problems", type=int, default=6400, help="of each run [6400]")
    parser.add_argument("--batch_size", type=int, default=64, help="problems generated at once without a cache [64]")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Seconds for all problems of each side, one figure a round."""
    recipe = load_recipe(arguments.recipe, [])
    data, model, accelerator = load_data(recipe)[1], load_model(arguments.model).eval(), Accelerator(cpu=True)
    split, size, indices = data.splits["test"], recipe.evaluation.batch_size, np.arange(arguments.problems)
    sides = {
        "no cache": lambda: without_cache(model, data.tokenizer, split, indices, arguments.batch_size),
        "generate, cached": lambda: [answer for _, answer, _ in solve(model, data.tokenizer, split, indices, size)],
        "grade": lambda: [
            answer
            for _, answer, _ in grade(accelerator, model, data.tokenizer, split, size, arguments.problems)[1].problems
        ],
    }
    figures, answers = {name: [] for name in sides}, []
    for _ in range(arguments.rounds):
        for name, side in sides.items():
            started = time.perf_counter()
            answers.append(side())
            figures[name].append(time.perf_counter() - started)
    if any(other != answers[0] for other in answers):
        raise RuntimeError("the sides answer differently")
    yield f"{arguments.problems:,} problems of {arguments.recipe}, seconds", figures


@torch.no_grad()
def without_cache(model, tokenizer, split, indices: np.ndarray, batch_size: int) -> list[str]:
    """One batch of problems after another, the whole prefix again for each token."""
    answers = []
    for batch in np.split(indices, range(batch_size, len(indices), batch_size)):
        ids = tokenizer([question for question, _ in split.texts(batch)], return_tensors="pt")["input_ids"]
        length = ids.shape[1]
        for _ in range(split.answer_width):
            logits = model(ids, use_cache=False).logits  # (problems, time, vocab)
            ids = torch.cat([ids, logits[:, -1:].argmax(-1)], dim=1)
        answers += tokenizer.batch_decode(ids[:, length:])
    return answers
