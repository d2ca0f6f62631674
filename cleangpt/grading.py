"""Grades a model's answers to arithmetic problems: which digits, which carries, which operands go wrong.

    question and right answer ──> one pass tells which problems greedy generation solves (see `evaluate`)
    the other problems        ──> answered by greedy generation, batched, with a cache
    answers and right answers ──> a table, heat maps, the wrong answers with their problems

An answer is right when it is the right text, zeros and all. A digit is right when it stands in the answer that was
written, whatever stands beside it; place 0 is the ones.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object

from .data.arithmetic import read_answer
from .evaluation import evaluate_rows, solve
from .metrics.arithmetic_exact_match.arithmetic_exact_match import compare


@dataclass
class Grades:
    """Answers to n problems, and what may explain them."""

    problems: list[tuple[str, str, str]]
    """Question, the model's answer, the right answer, as text."""
    right: np.ndarray
    """Whether the whole answer is right, bool (n,)."""
    digits: np.ndarray
    """Whether each digit is right, ones first, float (n, places): 1, 0, or NaN where there is no such place."""
    carries: np.ndarray
    """Carries on the way to the right answer, int (n,)."""
    lengths: np.ndarray
    """Digits of each operand, int (n, 2)."""
    is_number: np.ndarray
    """Whether what was written is a number at all, bool (n,)."""


def grade(
    accelerator: Accelerator, model, tokenizer, split, batch_size: int, num_rows: int | None = None
) -> tuple[dict[str, float], Grades]:
    """Grades a whole arithmetic split, or its first `num_rows` problems. All processes call it.

    Returns:
        What `evaluate` measures, with the accuracy of the answers that were written; and the grades.
    """
    figures, wrong = evaluate_rows(accelerator, model, split, batch_size, num_rows=num_rows)
    indices = np.arange(num_rows or len(split))
    problems = [(question, right, right) for question, right in split.texts(indices)]
    answered = zip(wrong.tolist(), solve(model, tokenizer, split, wrong, batch_size), strict=True)
    for index, problem in gather_object(list(answered)):
        problems[index] = problem

    _, answers, rights = zip(*problems, strict=True)
    right, digits = compare(answers, rights, split.section.reverse_answer)
    a, b = split.digits(indices)
    grades = Grades(
        problems=problems,
        right=right,
        digits=digits,
        carries=count_carries(a, b, split.section.path),
        lengths=np.stack([count_digits(a), count_digits(b)], axis=1),
        is_number=np.array([read_answer(answer, split.section) is not None for answer in answers]),
    )
    return {**figures, "accuracy": float(right.mean())}, grades


def count_digits(digits: np.ndarray) -> np.ndarray:
    """Length of each number without leading zeros, one for 0: from digits (n, digits) to int (n,)."""
    leading = (digits != 0).argmax(axis=1)
    return np.where(digits.any(axis=1), digits.shape[1] - leading, 1)


def count_carries(a: np.ndarray, b: np.ndarray, path: str) -> np.ndarray:
    """How often one carries in adding, or multiplying, two numbers on paper, column by column.

    In a long multiplication, column k adds up all products of a digit of `a` with a digit of `b` whose places sum to k,
    and what column k - 1 carried; if it passes on anything, however large, that is one carry.

    Args:
        a, b: digits, int (n, digits), the most significant first. path: `addition` or `multiplication`.

    Returns:
        int (n,).
    """
    a, b = a[:, ::-1], b[:, ::-1]  # the ones first
    width = a.shape[1]
    if path == "addition":
        columns = a + b
    else:
        columns = np.zeros((len(a), 2 * width - 1), int)
        for place in range(width):
            columns[:, place : place + width] += a[:, place : place + 1] * b
    carry, carries = np.zeros(len(a), int), np.zeros(len(a), int)
    for column in columns.T:
        carry = (column + carry) // 10
        carries += carry > 0
    return carries


def table(grades: Grades) -> str:
    """Accuracy by place, by carries, by the length of the longer operand; and the first wrong answers."""
    longer = grades.lengths.max(axis=1)
    places = [(k, grades.digits[~np.isnan(grades.digits[:, k]), k]) for k in range(grades.digits.shape[1])]
    carries = [(k, grades.right[grades.carries == k]) for k in np.unique(grades.carries)]
    lengths = [(k, grades.right[longer == k]) for k in np.unique(longer)]
    lines = []
    for name, groups in (("digit (0: the ones)", places), ("carries", carries), ("longer operand's digits", lengths)):
        lines.append(f"{name:24} {'problems':>12} {'wrong':>10} {'accuracy':>9}")
        lines += [f"{k:<24} {len(r):12,} {len(r) - r.sum():10,.0f} {r.mean():9.4f}" for k, r in groups]
        lines.append("")
    wrong = np.flatnonzero(~grades.right)
    lines.append(f"{len(wrong):,} wrong answers, {(~grades.is_number).sum():,} of them no number" if len(wrong) else "")
    for question, answer, right in (grades.problems[i] for i in wrong[:10]):
        lines.append(f"  {question}{answer}   (right: {right})")
    return "\n".join(lines).strip()


def write_report(grades: Grades, folder: Path) -> None:
    """Writes `accuracy.png`, heat maps, and `wrong_answers.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "wrong_answers.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "answer", "right"])
        writer.writerows(grades.problems[i] for i in np.flatnonzero(~grades.right))
    draw(grades, folder / "accuracy.png")


def draw(grades: Grades, path: Path) -> None:
    """Two heat maps: each digit's accuracy by the number of carries, the whole answer's by the operands' lengths.

    A cell says what fraction is right, and of how many.
    """
    from matplotlib.figure import Figure  # half a second that only a picture needs

    carries, lengths = np.unique(grades.carries), np.arange(1, grades.lengths.max() + 1)
    places = np.arange(grades.digits.shape[1])[::-1]
    digits = [[grades.digits[grades.carries == carry, place] for place in places] for carry in carries]
    answers = [[grades.right[(grades.lengths == (i, j)).all(axis=1)] for j in lengths] for i in lengths]
    size = (3 + 0.75 * (len(places) + len(lengths)), 1.5 + 0.5 * max(len(carries), len(lengths)))
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[len(places), len(lengths)])
    _heat_map(left, digits, [f"$10^{{{place}}}$" for place in places], carries)
    left.set(title="right digits", xlabel="digit of the answer", ylabel="carries")
    image = _heat_map(right, answers, lengths, lengths)
    right.set(title="right answers", xlabel="digits of b", ylabel="digits of a")
    figure.colorbar(image, ax=[left, right], format="{x:.0%}")
    figure.savefig(path, dpi=120)


def _heat_map(axes, cells: list[list[np.ndarray]], columns, rows):
    """Draws the mean of each cell's values, NaN left out."""
    cells = [[values[~np.isnan(values)] for values in row] for row in cells]
    means = np.array([[values.mean() if len(values) else np.nan for values in row] for row in cells])
    image = axes.imshow(means, cmap="viridis", vmin=0, vmax=1, aspect="auto")
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    for (i, j), mean in np.ndenumerate(means):
        if not np.isnan(mean):
            text = f"{np.floor(mean * 1e4) / 1e4:.2%}\nof {len(cells[i][j]):,}"  # 100.00% only where all are right
            color = "black" if mean > 0.6 else "white"
            axes.text(j, i, text, ha="center", va="center", fontsize=6, color=color)
    return image
