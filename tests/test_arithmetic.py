"""Arithmetic problems: right answers, disjoint splits of exact size, targets on the answer alone."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.data.arithmetic import ArithmeticSplit, read_answer
from cleangpt.data.splits import IGNORED
from cleangpt.recipe import Data
from cleangpt.tokenization import arithmetic_tokenizer

TOKENIZER = arithmetic_tokenizer()


def make_split(name: str = "train", seed: int = 42, **options) -> ArithmeticSplit:
    return ArithmeticSplit(Data(**{"path": "addition", "num_digits": 2, **options}), name, seed, TOKENIZER)


def find(split: ArithmeticSplit, a: int, b: int) -> int:
    """The index of a problem in a split that holds it."""
    left, right = split.operands(np.arange(len(split)))
    return int(np.flatnonzero((left == a) & (right == b))[0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, ("85+50=", "531")),
        ({"path": "multiplication"}, ("85x50=", "0524")),
        ({"reverse_answer": False}, ("85+50=", "135")),
        ({"signs": False}, ("8550", "531")),
        ({"num_digits": 3}, ("085+050=", "5310")),
        ({"num_digits": 3, "zero_pad": False}, ("85+50=", "531")),
    ],
)
def test_a_problem_as_text(options, expected):
    split = make_split(split={"train": 1.0}, **options)
    assert split.texts(np.array([find(split, 85, 50)]))[0] == expected


@given(
    path=st.sampled_from(["addition", "multiplication"]),
    num_digits=st.integers(1, 9),
    reverse=st.booleans(),
    zero_pad=st.booleans(),
    place=st.integers(0, 10**6),
)
def test_every_answer_is_right_and_can_be_read(path, num_digits, reverse, zero_pad, place):
    split = make_split(path=path, num_digits=num_digits, reverse_answer=reverse, zero_pad=zero_pad)
    index = np.array([place % len(split)])
    (a,), (b,) = (operand.tolist() for operand in split.operands(index))
    assert 0 <= a < 10**num_digits and 0 <= b < 10**num_digits
    _, answer = split.texts(index)[0]
    assert read_answer(answer, split.section) == (a + b if path == "addition" else a * b)


def test_splits_are_disjoint_whole_and_exact():
    splits = {name: make_split(name, num_digits=3) for name in ("train", "validation", "test")}
    assert [len(split) for split in splits.values()] == [700_000, 150_000, 150_000]
    codes = np.concatenate(
        [a * np.uint64(1000) + b for a, b in (split.operands(np.arange(len(split))) for split in splits.values())]
    )
    assert len(np.unique(codes)) == 1_000_000


def test_another_seed_cuts_other_splits():
    one, other = (make_split("test", seed).operands(np.arange(100))[0] for seed in (1, 2))
    assert (one != other).any()


def test_targets_are_the_answer_and_its_end():
    split = make_split()
    batch = split[np.array([find(split, *(int(x[0]) for x in split.operands(np.array([3]))))])]
    question, answer = split.texts(np.array([3]))[0]
    assert TOKENIZER.decode(batch["input_ids"][0]) == question + answer
    known = batch["targets"][0] != IGNORED
    assert TOKENIZER.decode(batch["targets"][0][known]) == answer + "<|endoftext|>"
    assert known.sum() == split.targets_per_row


@given(st.lists(st.integers(0, 6999), min_size=1, max_size=20))
def test_rows_of_different_length_have_their_own_targets(indices):
    split = make_split(zero_pad=False)
    batch = split[np.array(indices)]
    for row, (_, answer) in zip(batch["targets"], split.texts(np.array(indices)), strict=True):
        assert TOKENIZER.decode(row[row != IGNORED]) == answer + "<|endoftext|>"


def test_what_is_no_number_is_no_answer():
    assert read_answer("5+1", Data(path="addition")) is None
    assert read_answer("", Data(path="addition")) is None
