"""Grades a model's answers to arithmetic problems by digits, carries and length of the operands.

    question and right answer ──> one pass finds the problems that greedy generation solves (see `evaluate`)
    the other problems        ──> answered by greedy generation, batched, with a cache
    answers and right answers ──> a table, heat maps, the wrong answers with their problems

An answer is right if its text is, zeros included. A digit is right if it stands in its place, counted from the ones
(0), no matter what is next to it.
"""

import csv
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.arithmetic import ArithmeticSplit, read_answer, significant
from .evaluate import evaluate_rows
from .metrics.arithmetic_exact_match.arithmetic_exact_match import score_answers
from .writing import solve


@dataclass(frozen=True)
class Grades:
    """Answers to n problems, and what may explain the mistakes."""

    problems: list[tuple[str, str, str]]  # question, the model's answer, the right answer
    right: np.ndarray  # whether the whole answer is, bool (n,)
    digits: np.ndarray  # 1 if right, 0 if wrong, NaN in a place the right answer lacks; from the ones up, (n, places)
    carries: np.ndarray  # in the calculation, int (n,)
    lengths: np.ndarray  # digits of each operand, int (n, 2)
    is_number: np.ndarray  # whether the model's answer is one at all, bool (n,)


def grade(
    accelerator: Accelerator,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: ArithmeticSplit,
    batch_size: int,
    num_rows: int | None = None,
) -> tuple[dict[str, float], Grades]:
    """The figures of `evaluate`, with the accuracy of answers as written, and their grades; all processes call it."""
    num_rows = num_rows or len(split)
    figures, wrong = evaluate_rows(accelerator, model, split, batch_size, num_rows)
    indices = np.arange(num_rows)
    problems = [(question, right, right) for question, right in split.texts(indices)]
    answered = zip(wrong.tolist(), solve(model, tokenizer, split, wrong, batch_size), strict=True)
    for index, problem in gather_object(list(answered)):
        problems[index] = problem

    answers, references = [answer for _, answer, _ in problems], [right for _, _, right in problems]
    right, digits = score_answers(answers, references, split.data.reverse_answer)
    a, b = split.digits(indices)
    grades = Grades(
        problems=problems,
        right=right,
        digits=digits,
        carries=count_carries(a, b, split.data.path),
        lengths=np.stack([significant(a).sum(axis=1), significant(b).sum(axis=1)], axis=1),
        is_number=np.array([read_answer(answer, split.data) is not None for answer in answers]),
    )
    return {**figures, "accuracy": float(right.mean())}, grades


def count_carries(a: np.ndarray, b: np.ndarray, path: str) -> np.ndarray:
    """Carries in adding or multiplying numbers (n, digits), most significant digit first, on paper, int (n,).

    Column k of a long multiplication adds up the products of digits whose places sum to k, and what column k - 1
    carried. A carry of any size is one carry.
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


def format_table(grades: Grades) -> str:
    """Accuracy by place, by carries and by length of the longer operand, and the first wrong answers."""
    longer = grades.lengths.max(axis=1)
    places = [(k, column[~np.isnan(column)]) for k, column in enumerate(grades.digits.T)]
    carries = [(k, grades.right[grades.carries == k]) for k in np.unique(grades.carries)]
    lengths = [(k, grades.right[longer == k]) for k in np.unique(longer)]
    lines = []
    for name, groups in (("digit (0: the ones)", places), ("carries", carries), ("longer operand's digits", lengths)):
        lines.append(f"{name:24} {'problems':>12} {'wrong':>10} {'accuracy':>9}")
        lines += [f"{k:<24} {len(r):12,} {len(r) - r.sum():10,.0f} {r.mean():9.4f}" for k, r in groups] + [""]
    wrong = np.flatnonzero(~grades.right)
    if len(wrong):
        lines.append(f"{len(wrong):,} wrong answers, {(~grades.is_number).sum():,} of them no number")
    lines += ["  {}{}   (right: {})".format(*grades.problems[i]) for i in wrong[:10]]
    return "\n".join(lines).strip()


def write_report(grades: Grades, folder: Path) -> None:
    """Writes heat maps, `accuracy.png`, and the wrong answers, `wrong_answers.csv`."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "wrong_answers.csv", "w", newline="") as file:
        wrong = [grades.problems[i] for i in np.flatnonzero(~grades.right)]
        csv.writer(file).writerows([("question", "answer", "right"), *wrong])
    draw_accuracy(grades, folder / "accuracy.png")


def draw_accuracy(grades: Grades, path: Path) -> None:
    """Heat maps of accuracy, with the number of problems: of digits by carries, of answers by operands' lengths."""
    from matplotlib.figure import Figure  # half a second that only a picture needs

    carries, lengths = np.unique(grades.carries), np.arange(1, grades.lengths.max() + 1)
    places = np.arange(grades.digits.shape[1])[::-1]
    digits = [[grades.digits[grades.carries == carry, place] for place in places] for carry in carries]
    answers = [[grades.right[(grades.lengths == (i, j)).all(axis=1)] for j in lengths] for i in lengths]
    size = (3 + 0.75 * (len(places) + len(lengths)), 1.5 + 0.5 * max(len(carries), len(lengths)))
    figure = Figure(figsize=size, layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=[len(places), len(lengths)])
    left.set(title="right digits", xlabel="digit of the answer", ylabel="carries")
    right.set(title="right answers", xlabel="digits of b", ylabel="digits of a")
    powers = [f"$10^{{{place}}}$" for place in places]
    for axes, cells, columns, rows in ((left, digits, powers, carries), (right, answers, lengths, lengths)):
        cells = [[values[~np.isnan(values)] for values in row] for row in cells]
        means = np.array([[values.mean() if len(values) else np.nan for values in row] for row in cells])
        image = axes.imshow(means, cmap="viridis", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        for i, j in np.argwhere(~np.isnan(means)):
            text = f"{np.floor(means[i, j] * 1e4) / 1e4:.2%}\nof {len(cells[i][j]):,}"  # 100.00% only if all are right
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="black" if means[i, j] > 0.6 else "white")
    figure.colorbar(image, ax=[left, right], format="{x:.0%}")
    figure.savefig(path, dpi=120)


def draw_lengths(accuracies: dict[int, float], learned: tuple[int, int], path: Path) -> None:
    """Draws accuracy over the operands' digits; the range of lengths that were learned is shaded."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.axvspan(*learned, alpha=0.15, label="learned")
    axes.plot([*accuracies], [*accuracies.values()], marker="o")
    axes.set(xlabel="digits of each operand", ylabel="whole answers right", xlim=(0, None), ylim=(-0.02, 1.02))
    axes.legend(frameon=False, loc="lower left")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)
