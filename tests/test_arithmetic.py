"""Arithmetic problems have right answers, disjoint splits of exact sizes, and targets on the answer alone."""

import itertools
import re
from collections import Counter
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt.data.arithmetic import ArithmeticSplit, _Group, read_answer
from cleangpt.data.splits import IGNORED
from cleangpt.data.tokenization import arithmetic_tokenizer
from cleangpt.recipe.keys import Data

TOKENIZER = arithmetic_tokenizer()


def make_split(name: str = "train", seed: int = 42, **options) -> ArithmeticSplit:
    return ArithmeticSplit(Data(**{"path": "addition", "num_digits": 2, **options}), name, seed, TOKENIZER)


def find(split: ArithmeticSplit, a: int, b: int) -> int:
    """The index of a problem in its split."""
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


@settings(deadline=None)
@given(
    path=st.sampled_from(["addition", "multiplication"]),
    num_digits=st.integers(1, 30),
    min_digits=st.none() | st.integers(1, 30),
    reverse=st.booleans(),
    zero_pad=st.booleans(),
    place=st.integers(0, 2**62),
)
def test_every_answer_is_right_and_can_be_read(path, num_digits, min_digits, reverse, zero_pad, place):
    least = None if min_digits is None else min(min_digits, num_digits)
    options = {"num_digits": num_digits, "min_digits": least, "reverse_answer": reverse, "zero_pad": zero_pad}
    split = make_split(path=path, **options)
    index = np.array([place % len(split)])
    (a,), (b,) = (operand.tolist() for operand in split.operands(index))
    for operand in (a, b):
        assert (least or 1) <= len(str(operand)) <= num_digits
    question, answer = split.texts(index)[0]
    assert [int(number) for number in re.split(r"[+x]", question[:-1])] == [a, b]
    assert read_answer(answer, split.data) == (a + b if path == "addition" else a * b)


def test_splits_are_disjoint_whole_and_exact():
    splits = {name: make_split(name, num_digits=3) for name in ("train", "validation", "test")}
    assert [len(split) for split in splits.values()] == [700_000, 150_000, 150_000]
    codes = np.concatenate(
        [a * 1000 + b for a, b in (split.operands(np.arange(len(split))) for split in splits.values())]
    )
    assert len(np.unique(codes)) == 1_000_000


@pytest.mark.parametrize("seed", [1, 42])
@pytest.mark.parametrize("min_digits", [None, 1, 2])
def test_mirrors_share_a_split(min_digits, seed):
    """Of all problems of two digits each is once in one split, with its mirror; both orders come equally often."""
    rows = {}
    for name in ("train", "validation", "test"):
        split = make_split(name, seed, min_digits=min_digits)
        a, b = (operand.tolist() for operand in split.operands(np.arange(len(split))))
        rows[name] = Counter(zip(a, b, strict=True))
        assert all(rows[name][b, a] == count for (a, b), count in rows[name].items())
        assert 0.4 < np.mean(np.less(a, b)[: len(a) // 4]) < 0.6  # from the start
    numbers = range(10 if min_digits == 2 else 0, 100)
    assert sorted(itertools.chain(*rows.values())) == list(itertools.product(numbers, repeat=2))
    for name, share in (("train", 0.7), ("validation", 0.15), ("test", 0.15)):
        assert abs(len(rows[name]) - share * len(numbers) ** 2) <= 4


@settings(deadline=None)
@given(length=st.integers(1, 20), exact=st.booleans(), test=st.booleans(), place=st.integers(0, 2**62 - 1))
def test_a_mirror_is_in_the_same_split_at_any_length(length, exact, test, place):
    """Mirrors are one couple, and a split has whole couples."""
    group = _Group(length, length, exact, {"train": 0.7, "test": 0.3}, "test" if test else "train")
    couples = min(group.couples, 2**62)
    places = np.array([place % couples, place % couples + couples])
    (one, two), (other, another) = (operand.tolist() for operand in group.operands(places, 5))
    assert (one, other) == (another, two) or (one, two) == (other, another)
    assert len(one) == length and (not exact or length == 1 or (one[0] and two[0]))


@settings(deadline=None)
@given(left=st.integers(1, 20), right=st.integers(1, 20), exact=st.booleans(), place=st.integers(0, 2**62 - 1))
def test_a_mirror_of_other_lengths_is_in_the_same_split(left, right, exact, place):
    group, mirrored = (_Group(*lengths, exact, {"train": 1.0}, "train") for lengths in ((left, right), (right, left)))
    couples = min(group.couples, 2**62)
    (place, last) = (place % couples, couples - 1 - place % couples)
    one, other = (one.operands(np.array([at]), 5) for one, at in ((group, place), (mirrored, last)))
    assert left == right or all(np.array_equal(a, b) for a, b in zip(one, other[::-1], strict=True))


def test_twelve_digits_are_cut_exactly_and_sampled():
    """10^24 pairs, more than 64 bits can count; the splits follow each other without a gap."""
    splits = [make_split(name, num_digits=12) for name in ("train", "validation", "test")]
    assert [split.num_problems for split in splits] == [7 * 10**23, 15 * 10**22, 15 * 10**22]
    (train,), (validation,), (test,) = (split.groups for split in splits)
    assert train.start == 0 and validation.start == train.couples and test.start == train.couples + validation.couples
    seen = {pair for split in splits for pair in zip(*split.operands(np.arange(5000)), strict=True)}
    assert len(seen) == 15_000
    assert 0.45 < np.mean([a / 10**12 for a, _ in seen]) < 0.55


def test_places_beyond_64_bits_are_added_digit_by_digit():
    group = _Group(12, 12, False, {"train": 0.7, "test": 0.3}, "test")
    places, drawn = np.array([0, 1, 999, 2**61]), []
    with patch("cleangpt.data.arithmetic.permute_digits", lambda a, b, *_: drawn.append((a, b)) or (a, b)):
        group.operands(places, 0)
    ((left, right),) = drawn
    numbers = [int("".join(map(str, row))) for row in np.stack([*left, *right], axis=1)]  # the 13th digit is below 5
    assert [number - number // 10**12 * 5 * 10**11 for number in numbers] == [35 * 10**22 + int(p) for p in places]


def test_pairs_of_lengths_are_equally_frequent_in_training():
    split = make_split(num_digits=3, min_digits=1)
    a, b = split.operands(np.arange(9000))
    lengths = Counter((len(str(x)), len(str(y))) for x, y in zip(a, b, strict=True))
    assert lengths == dict.fromkeys(itertools.product((1, 2, 3), repeat=2), 1000)


def test_splits_of_mixed_lengths_are_disjoint_and_list_each_problem_once():
    splits = {name: make_split(name, num_digits=2, min_digits=1) for name in ("train", "validation", "test")}
    pairs = {name: list(zip(*split.operands(np.arange(len(split))), strict=True)) for name, split in splits.items()}
    assert len(set().union(*map(set, pairs.values()))) == 10_000
    for name, split in splits.items():
        assert len(set(pairs[name])) == split.num_problems
    assert sum(split.num_problems for split in splits.values()) == 10_000
    assert len(pairs["test"]) == splits["test"].num_problems
    assert {len(str(a)) + len(str(b)) for a, b in pairs["test"][:4]} == {2, 3, 4}  # lengths alternate from the start


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
    assert known.sum() == split.count_targets(np.array([3]))


@settings(deadline=None)
@given(st.lists(st.integers(0, 6999), min_size=1, max_size=20))
def test_rows_of_different_length_have_their_own_targets(indices):
    split = make_split(zero_pad=False)
    batch = split[np.array(indices)]
    for row, (_, answer) in zip(batch["targets"], split.texts(np.array(indices)), strict=True):
        assert TOKENIZER.decode(row[row != IGNORED]) == answer + "<|endoftext|>"
    assert split.count_targets(np.array(indices)) == (batch["targets"] != IGNORED).sum()


def test_what_is_no_number_is_no_answer():
    assert read_answer("5+1", Data(path="addition")) is None
    assert read_answer("", Data(path="addition")) is None
