"""What lm-eval asks a model: the problems, or the text, that a recipe holds out.

    lm_eval run --model hf --model_args pretrained=outputs/adder/final --trust_remote_code \\
        --include_path lm_eval_tasks --tasks cleangpt_addition --batch_size 1000 --device cpu

`--metadata` chooses what to measure: `recipe` (a file), `overrides` (a list of `--section.key=value`) and `split`.
"""

import logging
from collections.abc import Iterator

import numpy as np
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask

from cleangpt.data.packing import TextSplit
from cleangpt.data.prepare import prepare_data
from cleangpt.data.splits import IGNORED
from cleangpt.evaluation import MOST_PROBLEMS
from cleangpt.recipe_reading import load_recipe


class Arithmetic(ConfigurableTask):
    """Answers get as many tokens as the longest right one has, so that short models have room for the question."""

    def __init__(self, config: dict):
        super().__init__(config=_without_class(config))

    def construct_requests(self, doc: dict, ctx: str, **kwargs):
        request = super().construct_requests(doc, ctx, **kwargs)
        request.arguments[1]["max_gen_toks"] = doc["answer_width"]
        return request


class Perplexity(ConfigurableTask):
    """The windows of our own evaluation: one token to start from, then up to `block_size` targets."""

    def __init__(self, config: dict):
        super().__init__(config=_without_class(config))

    def construct_requests(self, doc: dict, ctx: str, **kwargs):
        request = super().construct_requests(doc, ctx, **kwargs)
        request.arguments = (_Kept(doc["first"]), doc["rest"])
        return request


class _Kept(str):
    """lm-eval would take white space off the end of the context and have it predicted; here it stays."""

    def rstrip(self, *_):
        return self


def _without_class(config: dict) -> dict:
    return {key: value for key, value in config.items() if key != "class"}


def addition(recipe: str = "recipes/adder.yaml", **options) -> dict[str, Dataset]:
    """Problems of a recipe: `question`, `answer`, `answer_width`."""
    return _arithmetic(recipe, **options)


def multiplication(recipe: str = "recipes/multiplier.yaml", **options) -> dict[str, Dataset]:
    """Problems of a recipe: `question`, `answer`, `answer_width`."""
    return _arithmetic(recipe, **options)


def _arithmetic(recipe: str, overrides: tuple = (), split: str = "test", **_) -> dict[str, Dataset]:
    problems = prepare_data(load_recipe(recipe, list(overrides))).splits[split]
    indices = np.arange(min(len(problems), MOST_PROBLEMS))
    questions, answers = zip(*problems.texts(indices), strict=True)
    widths = [problems.answer_width] * len(questions)
    return {"test": Dataset.from_dict({"question": questions, "answer": answers, "answer_width": widths})}


def text(
    recipe: str = "recipes/shakespeare_cpu.yaml", overrides: tuple = (), split: str = "validation", **_
) -> dict[str, Dataset]:
    """Windows of a recipe's text: `first` and `rest`, and how many `targets` and `bytes` the rest stands for."""
    recipe = load_recipe(recipe, list(overrides))
    data = prepare_data(recipe)
    windows = TextSplit(data.folder, split, recipe.data.block_size, "blocks")
    return {"test": Dataset.from_list(list(_windows(windows, data.tokenizer)))}


def _windows(split: TextSplit, tokenizer) -> Iterator[dict]:
    """lm-eval takes text and tokenizes it again; says how often that gives other tokens than training saw."""
    changed = 0
    for index in range(len(split)):
        row = split[np.array([index])]
        targets = row["targets"][0][row["targets"][0] != IGNORED]
        ids = [int(row["input_ids"][0, 0]), *targets.tolist()]
        first, rest = tokenizer.decode(ids[:1]), tokenizer.decode(ids[1:])
        changed += tokenizer(first + rest, add_special_tokens=False)["input_ids"] != ids
        num_bytes = split.num_bytes * len(targets) / split.num_targets
        yield {"first": first, "rest": rest, "targets": len(targets), "bytes": num_bytes}
    if changed:
        logging.getLogger("lm_eval").warning(
            f"{changed} of {len(split)} windows are tokenized otherwise at their edges: figures differ by their share"
        )


def nats(doc: dict, results: list) -> dict[str, tuple[float, float]]:
    """Log-likelihood of a window, beside what to divide it by."""
    ((log_likelihood, _),) = results
    per_token = (log_likelihood, doc["targets"])
    return {"loss": per_token, "perplexity": per_token, "bits_per_byte": (log_likelihood, doc["bytes"])}


def mean_nats(items: list[tuple[float, float]]) -> float:
    """Nats a target."""
    log_likelihoods, targets = zip(*items, strict=True)
    return -sum(log_likelihoods) / sum(targets)
