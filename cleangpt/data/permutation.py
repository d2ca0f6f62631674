"""A keyed permutation of 0 .. n - 1 in constant memory, for orders and splits that need no table.

A Feistel network on pairs (left, right) in radix sqrt(n), following Black and Rogaway, "Ciphers with Arbitrary Finite
Domains" (CT-RSA 2002): each round adds a keyed hash of one half to the other, which is invertible whatever the hash,
so the whole is a permutation of the radix² pairs; a result beyond n is put through again until it falls inside
("cycle walking"), which makes it a permutation of 0 .. n - 1.
"""

import math

import numpy as np

ROUNDS = 6  # Luby and Rackoff (1988) need four for a strong pseudo-random permutation of a good hash


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute_pairs(left: np.ndarray, right: np.ndarray, radix: int, *keys: int) -> tuple[np.ndarray, np.ndarray]:
    """Permutes pairs of uint64 arrays with both halves in 0 .. radix - 1 (radix up to 2**63), under integer `keys`."""
    key = np.zeros(1, np.uint64)
    for part in keys:
        key = _mix(key * np.uint64(0x9E3779B97F4A7C15) + np.uint64(part % 2**64) + np.uint64(1))
    for round_number in range(ROUNDS):
        round_key = _mix(key + np.uint64((round_number + 1) * 0x9E3779B97F4A7C15 % 2**64))
        left, right = right, (left + _mix(_mix(right ^ round_key) + round_key) % np.uint64(radix)) % np.uint64(radix)
    return left, right


def permute(indices: np.ndarray, n: int, *keys: int) -> np.ndarray:
    """Where a permutation of 0 .. n - 1, chosen by integer `keys`, sends each of `indices`.

    Args:
        indices: integers in 0 .. n - 1, any shape. n: up to 2**62. keys: a seed and, say, an epoch.

    Returns:
        uint64 array of the same shape.
    """
    radix = math.isqrt(n - 1) + 1
    result = np.asarray(indices, np.uint64).copy()
    walking = np.ones(result.shape, bool)
    while walking.any():
        left, right = np.divmod(result[walking], np.uint64(radix))
        left, right = permute_pairs(left, right, radix, *keys)
        result[walking] = left * np.uint64(radix) + right
        walking[walking] = result[walking] >= n
    return result
