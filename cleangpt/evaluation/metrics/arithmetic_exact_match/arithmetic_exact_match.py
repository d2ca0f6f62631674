"""Exact match of written answers, as a whole and digit by digit.

    metric = evaluate.load("cleangpt/evaluation/metrics/arithmetic_exact_match")   # a path: nothing is downloaded
    metric.compute(predictions=["531", "630"], references=["531", "631"], reverse_answer=True)

`evaluate` reads the imports line by line, so each has its own.
"""

import datasets
import evaluate
import numpy as np

DESCRIPTION = "Exact match of written answers: an answer is right if its text is, zeros included."
INPUTS = """
Args:
    predictions (`list` of `str`): the answers. One that is no number is wrong, and also counted in `no_number`.
    references (`list` of `str`): the right answers.
    reverse_answer (`bool`, default `True`): answers are written last digit first.
Returns:
    `accuracy`, the fraction of right answers; `accuracy_by_digit`, for each place from the ones up, the fraction of
    right digits where the right answer has that place; `no_number`, the fraction of answers that are no number.
"""


def score_answers(answers: list[str], references: list[str], reverse_answer: bool) -> tuple[np.ndarray, np.ndarray]:
    """Right answers, bool (n,), and digits from the ones up, float (n, places): 1, 0, NaN where the reference ends."""
    width = max(map(len, references), default=0)
    written, expected = (_from_the_ones(texts, width, reverse_answer) for texts in (answers, references))
    right = np.array([one == other for one, other in zip(answers, references, strict=True)], bool)
    return right, np.where(expected == 0, np.nan, written == expected)


def _from_the_ones(texts: list[str], width: int, reverse_answer: bool) -> np.ndarray:
    """Character codes (n, width), ones first, 0 after the end of a text."""
    texts = [(text if reverse_answer else text[::-1])[:width] for text in texts]
    return np.array(texts, f"<U{width}").view(np.uint32).reshape(len(texts), width)


class ArithmeticExactMatch(evaluate.Metric):
    """What `evaluate.load` returns."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({name: datasets.Value("string") for name in ("predictions", "references")})
        return evaluate.MetricInfo(DESCRIPTION, citation="", features=features, inputs_description=INPUTS)

    def _compute(self, predictions: list[str], references: list[str], reverse_answer: bool = True) -> dict[str, object]:
        right, digits = score_answers(predictions, references, reverse_answer)
        is_number = [answer.isascii() and answer.isdigit() for answer in predictions]
        return {
            "accuracy": float(right.mean()),
            "accuracy_by_digit": np.nanmean(digits, axis=0).tolist(),
            "no_number": 1 - sum(is_number) / len(is_number),
        }
