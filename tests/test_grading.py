"""Grading: every answer is what greedy generation writes; carries and lengths explain the wrong ones."""

import csv

import numpy as np
import pytest
from accelerate import Accelerator
from hypothesis import given
from hypothesis import strategies as st

from cleangpt import load_recipe, train
from cleangpt.data.arithmetic import significant
from cleangpt.evaluation.grading import Grades, count_carries, format_table, grade, write_report
from cleangpt.evaluation.writing import solve
from cleangpt.models.build import load_model
from cleangpt.training.setup import load_data


@pytest.fixture(scope="module")
def graded(tmp_path_factory) -> tuple[list, dict, Grades]:
    """All 1,500 test problems of a small model that has learned a part of two-digit addition, and its own answers."""
    path = tmp_path_factory.mktemp("grading") / "adder.yaml"
    path.write_text("data: {path: addition, num_digits: 2}\nmodel: {model_type: nanogpt}\ntraining: {max_steps: 400}\n")
    options = ["--model.hidden_size=64", "--model.num_hidden_layers=1", "--model.num_attention_heads=2"]
    options += ["--training.macro_batch=400", "--optimizer.lr=0.005", f"--run.output_dir={path.parent}"]
    recipe = load_recipe(path, options)
    (_, data), model = load_data(recipe), load_model(train(recipe)).eval()
    split = data.splits["test"]
    answers = solve(model, data.tokenizer, split, np.arange(len(split)))
    return answers, *grade(Accelerator(cpu=True), model, data.tokenizer, split, 100)


def test_every_answer_is_what_generation_writes(graded):
    answers, figures, grades = graded
    assert grades.problems == answers
    assert figures["accuracy"] == np.mean([answer == right for _, answer, right in answers])
    assert 0.02 < figures["accuracy"] < 0.98


def test_digits_are_graded_one_by_one(graded):
    answers, _, grades = graded
    for place in range(3):  # last digit first, so that a place is an index
        assert grades.digits[:, place].mean() == np.mean(
            [one[place : place + 1] == other[place] for _, one, other in answers]
        )


def test_operands_explain_a_problem(graded):
    _, _, grades = graded
    for (question, _, _), carries, lengths in zip(grades.problems, grades.carries, grades.lengths, strict=True):
        a, b = map(int, question[:-1].split("+"))
        assert lengths.tolist() == [len(str(a)), len(str(b))]
        assert carries == (a % 10 + b % 10 > 9) + (a + b > 99)


def digits(number: int) -> np.ndarray:
    return np.array([[int(digit) for digit in f"{number:012}"]])


@given(st.integers(0, 10**12 - 1), st.integers(0, 10**12 - 1))
def test_each_carry_of_an_addition_takes_nine_from_the_digit_sum(a, b):
    nines = digits(a).sum() + digits(b).sum() - sum(map(int, str(a + b)))
    assert count_carries(digits(a), digits(b), "addition") == nines // 9


@pytest.mark.parametrize(
    ("a", "b", "carries"),
    [
        (12, 12, 0),  # columns 4, 4, 1
        (25, 12, 2),  # columns 10, 9 + 1, 2 + 1: passes on 1 and 1
        (99, 99, 3),  # columns 81, 162 + 8, 81 + 17: passes on 8, 17 and 9
        (0, 99, 0),
        (999_999_999_999, 999_999_999_999, 23),
    ],
)
def test_carries_of_a_multiplication(a, b, carries):
    assert count_carries(digits(a), digits(b), "multiplication") == carries


@given(st.integers(0, 10**12 - 1))
def test_digits_are_counted_without_leading_zeros(number):
    assert significant(digits(number)).sum() == len(str(number))


def by_hand() -> Grades:
    """5 + 7 and 15 + 7 answered right, 5 + 95 not, 1 + 1 with what is no number."""
    problems = [("05+07=", "210", "210"), ("15+07=", "220", "220"), ("05+95=", "000", "001"), ("01+01=", "+0", "200")]
    return Grades(
        problems=problems,
        right=np.array([True, True, False, False]),
        digits=np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [0, 1, 0]], float),
        carries=np.array([1, 1, 2, 0]),
        lengths=np.array([[1, 1], [2, 1], [1, 2], [1, 1]]),
        is_number=np.array([True, True, True, False]),
    )


def test_the_table_is_the_count_by_hand():
    lines = [line.split() for line in format_table(by_hand()).splitlines()]
    assert lines[1:4] == [["0", "4", "1", "0.7500"], ["1", "4", "0", "1.0000"], ["2", "4", "2", "0.5000"]]
    assert lines[6:9] == [["0", "1", "1", "0.0000"], ["1", "2", "0", "1.0000"], ["2", "1", "1", "0.0000"]]
    assert lines[11:13] == [["1", "2", "1", "0.5000"], ["2", "2", "1", "0.5000"]]
    assert format_table(by_hand()).endswith("2 wrong answers, 1 of them no number\n  05+95=000   (right: 001)\n"
                                     "  01+01=+0   (right: 200)")  # fmt: skip


def test_the_report_lists_the_wrong_answers(tmp_path):
    write_report(by_hand(), tmp_path / "new" / "folder")
    with open(tmp_path / "new" / "folder" / "wrong_answers.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [["question", "answer", "right"], ["05+95=", "000", "001"], ["01+01=", "+0", "200"]]
    assert (tmp_path / "new" / "folder" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
