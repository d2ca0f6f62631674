"""The order of samples is a permutation, and looks like a random one."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.data.permutation import permute, permute_digits


@given(n=st.integers(1, 5000), seed=st.integers(0, 2**63), epoch=st.integers(0, 1000))
def test_it_permutes_all_numbers(n, seed, epoch):
    assert sorted(permute(np.arange(n), n, seed, epoch).tolist()) == list(range(n))


@given(n=st.integers(2**40, 2**62), places=st.lists(st.integers(0, 2**40 - 1), min_size=1, max_size=50, unique=True))
def test_it_stays_in_range_and_one_to_one_where_no_table_could(n, places):
    result = permute(np.array(places), n, 7)
    assert result.max() < n
    assert len(set(result.tolist())) == len(places)


def test_it_depends_only_on_place_and_keys():
    whole = permute(np.arange(1000), 1000, 42, 3)
    assert np.array_equal(permute(np.arange(500, 510), 1000, 42, 3), whole[500:510])


def test_each_seed_and_epoch_has_its_own_order():
    orders = {tuple(permute(np.arange(100), 100, seed, epoch)) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_it_looks_random():
    """Fixed points, rises and neighbours are as frequent as in random permutations, within 6 standard deviations."""
    n, rounds = 1000, 200
    orders = np.stack([permute(np.arange(n), n, seed).astype(np.int64) for seed in range(rounds)])
    assert abs((orders == np.arange(n)).sum() - rounds) < 6 * rounds**0.5
    rises = (np.diff(orders, axis=1) > 0).mean()
    assert abs(rises - 0.5) < 6 * (1 / 12 / n / rounds) ** 0.5
    assert abs((abs(np.diff(orders, axis=1)) == 1).sum() - 2 * rounds) < 6 * (2 * rounds) ** 0.5
    # Images are uniform over the seeds: chi-square over 10 bins for each of the first 20 places.
    for place in range(20):
        counts = np.bincount(orders[:, place] // 100, minlength=10)
        assert ((counts - rounds / 10) ** 2 / (rounds / 10)).sum() < 36


@pytest.mark.parametrize(
    ("left", "right"), [([1], [1]), ([2], [2]), ([10], [10]), ([9, 10], [10]), ([10, 10], [10, 10]), ([3], [9, 10, 2])]
)
def test_digits_are_permuted_in_any_radices(left, right):
    numbers = np.array(list(itertools.product(*(range(radix) for radix in left + right))), np.uint64)
    digits = list(numbers.T)
    halves = permute_digits(digits[: len(left)], digits[len(left) :], left, right, 5)
    permuted = np.stack([*halves[0], *halves[1]], axis=1)
    assert sorted(map(tuple, permuted)) == sorted(map(tuple, numbers))
    assert len(numbers) < 10 or (permuted != numbers).any()
