"""A keyed permutation of 0 .. n - 1 in constant memory: orders and splits without tables.

A Feistel network on the digits of a number (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002).
Each round adds a keyed hash of one half to the other, digit by digit, which any hash leaves invertible: the network
permutes all numbers with those digits. Results from n on are permuted again until they fall below n ("cycle walking").

    left   | right              each round:  left <- left + hash(right, key), then the halves swap
    3  0  7|1  9  4
"""

import math

import numpy as np

GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2**64 / golden ratio, odd: the increment of SplitMix64
ROUNDS = 6  # four make a strong pseudo-random permutation, given a good hash (Luby and Rackoff, 1988)


def _mix(x: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit affects every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute_digits(
    left: list[np.ndarray], right: list[np.ndarray], left_radices: list[int], right_radices: list[int], *keys: int
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Permutes numbers, given and returned as the digits of their two halves, under integer `keys`.

    A digit is a uint64 array (n,) with values in 0 .. radix - 1; radices go up to 2**63.
    """
    key = np.zeros(1, np.uint64)
    for part in keys:
        key = _mix(key * GOLDEN + np.uint64(part % 2**64) + np.uint64(1))
    for round_number in range(ROUNDS):
        state = _mix(key + np.uint64((round_number + 1) * int(GOLDEN) % 2**64))
        for digit in right:
            state = _mix(_mix(digit ^ state) + state)
        places = enumerate(zip(left, map(np.uint64, left_radices), strict=True))
        added = [(digit + _mix(state + np.uint64(place)) % radix) % radix for place, (digit, radix) in places]
        left, right, left_radices, right_radices = right, added, right_radices, left_radices
    return left, right


def permute(indices: np.ndarray, n: int, *keys: int) -> np.ndarray:
    """The images (uint64) of `indices` (any shape) under the permutation of 0 .. n - 1 of `keys`, n up to 2**62."""
    radix = math.isqrt(n - 1) + 1
    result = np.asarray(indices, np.uint64).copy()
    walking = np.ones(result.shape, bool)
    while walking.any():
        left, right = np.divmod(result[walking], np.uint64(radix))
        (left,), (right,) = permute_digits([left], [right], [radix], [radix], *keys)
        result[walking] = left * np.uint64(radix) + right
        walking[walking] = result[walking] >= n
    return result
