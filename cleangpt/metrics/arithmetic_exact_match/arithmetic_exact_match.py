"""How many written answers are right, as a whole and digit by digit.

    metric = evaluate.load("cleangpt/metrics/arithmetic_exact_match")   # a path: nothing is downloaded
    metric.compute(predictions=["531", "630"], references=["531", "631"], reverse_answer=True)

The imports stand on lines of their own because `evaluate` reads them line by line.
"""

import datasets
import evaluate
import numpy as np

DESCRIPTION = "Exact match of written answers: an answer is right when it is the right text, zeros and all."
CITATION = ""
INPUTS = """
Args:
    predictions (`list` of `str`): the answers. What is no number is wrong as a whole and counted besides.
    references (`list` of `str`): the right answers.
    reverse_answer (`bool`, default `True`): answers are written last digit first.
Returns:
    `accuracy`, the fraction of right answers; `accuracy_by_digit`, for each place from the ones on the fraction of
    right digits among the right answers that have this place; `no_number`, the fraction of answers that are none.
"""


def compare(predictions: list[str], references: list[str], reverse_answer: bool) -> tuple[np.ndarray, np.ndarray]:
    """Lays answers beside right answers.

    Returns:
        Whether each answer is right, bool (n,); and each of its digits, float (n, places): 1 or 0 with the ones first,
        NaN where the right answer has no such place.
    """
    width = max(map(len, references), default=0)
    answers, rights = (_from_the_ones(texts, width, reverse_answer) for texts in (predictions, references))
    right = np.array([one == other for one, other in zip(predictions, references, strict=True)], bool)
    return right, np.where(rights == 0, np.nan, answers == rights)


def _from_the_ones(texts: list[str], width: int, reverse_answer: bool) -> np.ndarray:
    """Character codes (n, width), ones first, 0 behind the end of a text."""
    texts = [(text if reverse_answer else text[::-1])[:width] for text in texts]
    return np.array(texts, f"<U{width}").view(np.uint32).reshape(len(texts), width)


class ArithmeticExactMatch(evaluate.Metric):
    """What `evaluate.load` returns."""

    def _info(self) -> evaluate.MetricInfo:
        inputs = {name: datasets.Value("string") for name in ("predictions", "references")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(inputs),
        )

    def _compute(self, predictions: list[str], references: list[str], reverse_answer: bool = True) -> dict:
        right, digits = compare(predictions, references, reverse_answer)
        numbers = [answer.isascii() and answer.isdigit() for answer in predictions]
        return {
            "accuracy": float(right.mean()),
            "accuracy_by_digit": np.nanmean(digits, axis=0).tolist(),
            "no_number": 1 - sum(numbers) / len(numbers),
        }
