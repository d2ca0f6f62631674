"""lm-eval tasks on the held-out problems or text of a recipe.

    lm_eval run --model hf --model_args pretrained=outputs/adder/final --trust_remote_code \\
        --include_path lm_eval_tasks --tasks cleangpt_addition --batch_size 1000 --device cpu

`--metadata` chooses what to measure: `recipe` (a file), `overrides` (a list of `--section.key=value`) and `split`.
"""

import itertools
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from transformers import PreTrainedTokenizerBase

from cleangpt import UserError
from cleangpt.data.arithmetic import ArithmeticSplit
from cleangpt.data.mixture import texts_of
from cleangpt.data.packing import TextSplit
from cleangpt.data.splits import IGNORED
from cleangpt.evaluation.evaluate import MAX_GRADED
from cleangpt.recipe.reading import load_recipe
from cleangpt.training.setup import load_data


class Arithmetic(ConfigurableTask):
    """Answers as long as the longest right one, so that a short model has room for the question."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config=_without_class(config))

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        request = super().construct_requests(doc, ctx, **kwargs)
        request.arguments[1]["max_gen_toks"] = doc["answer_width"]
        return request


class Perplexity(ConfigurableTask):
    """The windows of our own evaluation: a first token as context, then up to `block_size` targets."""

    def __init__(self, config: dict[str, Any]):
        super().__init__(config=_without_class(config))

    def construct_requests(self, doc: dict[str, Any], ctx: str, **kwargs: Any) -> Instance:
        request = super().construct_requests(doc, ctx, **kwargs)
        request.arguments = (_Unstripped(doc["first"]), doc["rest"])
        return request


class _Unstripped(str):
    """A context that keeps the white space at its end, which lm-eval would strip and have predicted."""

    def rstrip(self, *_: Any) -> str:
        return self


def _without_class(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "class"}


def addition(recipe: str = "recipes/adder.yaml", **options: Any) -> dict[str, Dataset]:
    """Problems of a recipe: `question`, `answer`, `answer_width`."""
    return _arithmetic(recipe, **options)


def multiplication(recipe: str = "recipes/multiplier.yaml", **options: Any) -> dict[str, Dataset]:
    """Problems of a recipe: `question`, `answer`, `answer_width`."""
    return _arithmetic(recipe, **options)


def _arithmetic(recipe: str, overrides: Sequence[str] = (), split: str = "test", **_: object) -> dict[str, Dataset]:
    problems = load_data(load_recipe(recipe, list(overrides)))[1].splits[split]
    if not isinstance(problems, ArithmeticSplit):
        raise UserError(("recipe", f"expected an arithmetic recipe, got {recipe}"))
    indices = np.arange(min(len(problems), MAX_GRADED))
    questions, answers = zip(*problems.texts(indices), strict=True)
    widths = [problems.answer_width] * len(questions)
    return {"test": Dataset.from_dict({"question": questions, "answer": answers, "answer_width": widths})}


def text(
    recipe: str = "recipes/shakespeare_cpu.yaml", overrides: Sequence[str] = (), split: str = "validation", **_: object
) -> dict[str, Dataset]:
    """Windows of a recipe's text, or the documents in them: `first`, `rest`, and `targets` and `bytes` in the rest."""
    data = load_data(load_recipe(recipe, list(overrides)))[1]
    texts = texts_of(data.splits[split])
    if not texts:
        raise UserError(("recipe", f"expected a recipe on text, got {recipe}"))
    windows = itertools.chain(*(_windows(text.end_to_end(), data.tokenizer) for text in texts.values()))
    return {"test": Dataset.from_list(list(windows))}


def _windows(split: TextSplit, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Windows as text, with a warning about those that lm-eval tokenizes to other tokens than training saw."""
    changed = count = 0
    for index in range(len(split)):
        row = split[np.array([index])]
        (inputs,), (targets,) = row["input_ids"], row["targets"]
        seams = np.flatnonzero(targets == IGNORED)  # where documents meet, and after the end of the text
        for begin, end in zip([0, *(seams + 1)], [*seams, len(targets)], strict=True):
            if begin == end:
                continue
            ids, num_targets = [int(inputs[begin]), *targets[begin:end].tolist()], int(end - begin)
            first, rest = tokenizer.batch_decode([ids[:1], ids[1:]])
            changed, count = (
                changed + (tokenizer(first + rest, add_special_tokens=False)["input_ids"] != ids),
                count + 1,
            )
            num_bytes = split.num_bytes * num_targets / split.num_targets
            yield {"first": first, "rest": rest, "targets": num_targets, "bytes": num_bytes}
    if changed:
        logging.getLogger("lm_eval").warning(
            f"{changed} of {count} windows are tokenized otherwise at their edges, so the figures differ slightly"
        )


def nats(doc: dict[str, Any], results: list[tuple[float, bool]]) -> dict[str, tuple[float, float]]:
    """Log-likelihood of a window, and what to divide it by."""
    ((log_likelihood, _),) = results
    per_token = (log_likelihood, doc["targets"])
    return {"loss": per_token, "perplexity": per_token, "bits_per_byte": (log_likelihood, doc["bytes"])}


def mean_nats(items: list[tuple[float, float]]) -> float:
    """Nats per target."""
    log_likelihoods, targets = zip(*items, strict=True)
    return -sum(log_likelihoods) / sum(targets)
