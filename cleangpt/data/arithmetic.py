"""Addition and multiplication problems, computed batch by batch: there is no table of them.

    couple 0 .. 10^(2n) / 2 - 1 ──> permutation ──> digits of a, b ──> "085+050=5310<|endoftext|>" ──> inputs, targets
    cut into splits                 of all couples  of a+b or b+a                ~~~~~~~~~~~~~~~~~~ targets: answer, end

The answer's last digit comes first, in the order in which carries are known: 085 + 050 = 0135 is written 5310.
In arrays, numbers of any length are rows of digits, int64 (problems, digits), the most significant first.
"""

import itertools
import math

import numpy as np
from transformers import PreTrainedTokenizerFast

from ..errors import UserError
from ..recipe.keys import Data
from .permutation import permute_digits
from .splits import IGNORED, cut_points

FRACTIONS = {"train": 0.7, "validation": 0.15, "test": 0.15}
OPERATORS = {"addition": "+", "multiplication": "x"}
VERSION_OF_SPLITS = "mirrors-together"  # a run trained on splits of another version is not resumed
MOST_ROWS = 2**62  # that int64 indices can number; of 10^24 problems only as many are drawn


class ArithmeticSplit:
    """A split (see `Split`) of all ordered pairs of operands; a+b and b+a are always in the same one.

    Operands are all numbers of up to `num_digits` digits, one row per pair. With `min_digits` each pair of lengths is a
    group with splits of its own. Train draws equally often from all groups, so that problems of small groups have
    several rows; the other splits take turns among the groups until each problem has had its row.
    """

    def __init__(self, data: Data, name: str, seed: int, tokenizer: PreTrainedTokenizerFast) -> None:
        """`seed` chooses the permutation that the splits are cut from."""
        self.data, self.seed = data, seed
        fractions = data.split or FRACTIONS
        if name not in fractions:
            raise UserError(("data.split", f"expected a {name} split, got {', '.join(fractions)}"))
        lengths = itertools.product(range(data.min_digits or data.num_digits, data.num_digits + 1), repeat=2)
        groups = [_Group(a, b, data.min_digits is not None, fractions, name) for a, b in lengths]
        self.groups = sorted((group for group in groups if group.size), key=lambda group: group.size)
        if not self.groups:
            raise UserError(("data.split", f"expected a larger fraction for the empty {name} split, got {fractions}"))
        self.num_problems = sum(group.size for group in self.groups)  # distinct ones
        sizes = [min(group.size, MOST_ROWS // len(groups)) for group in self.groups]
        rows = [sizes[-1]] * len(sizes) if name == "train" else sizes
        self.rounds = np.array([0, *rows])  # rounds over the groups after which each is used up
        self.ends = np.cumsum(np.append(0, np.diff(self.rounds) * np.arange(len(rows), 0, -1)))  # rows until then

        self.answer_width = data.num_digits + 1 if data.path == "addition" else 2 * data.num_digits
        self.question_width = 2 * data.num_digits + 2 * data.signs
        self.sequence_length = self.question_width + self.answer_width
        self.num_sequences = len(self)
        self.end = tokenizer.eos_token_id
        self.ids = np.zeros(128, np.int64)  # ASCII code -> token id
        self.ids[[*b"0123456789+x="]] = tokenizer.convert_tokens_to_ids([*"0123456789+x="])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def count_targets(self, indices: np.ndarray) -> int:
        """The number of targets in the rows at `indices` (n,): each problem's answer and the end token."""
        if self.data.zero_pad:
            return len(indices) * (self.answer_width + 1)
        return int(self._written(indices)[1][:, self.question_width :].sum()) + len(indices)

    def digits(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The digits of both operands of each problem, (n, num_digits)."""
        indices = np.asarray(indices).astype(np.int64) % len(self)  # the same in every epoch
        used_up = np.searchsorted(self.ends[1:], indices, side="right")  # groups, at each index
        left, offset = len(self.groups) - used_up, indices - self.ends[used_up]
        number, place = used_up + offset % left, self.rounds[used_up] + offset // left
        a, b = np.zeros((2, len(indices), self.data.num_digits), np.int64)
        for group_number in np.unique(number):
            mine, group = number == group_number, self.groups[group_number]
            drawn = group.operands(place[mine] % min(group.size, MOST_ROWS), self.seed)
            for operand, digits in zip((a, b), drawn, strict=True):
                operand[mine, -digits.shape[1] :] = digits
        return a, b

    def operands(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two operands of each problem, (n,): int64, or Python integers beyond 18 digits."""
        powers = 10 ** np.arange(self.data.num_digits)[::-1].astype(np.int64 if self.data.num_digits <= 18 else object)
        a, b = self.digits(indices)
        return a @ powers, b @ powers

    def _written(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Problems with all their zeros as ASCII codes, uint8 (n, sequence_length), and which of them are written."""
        data, (a, b) = self.data, self.digits(indices)
        answer, order = _compute(a, b, data.path), slice(None, None, -1 if data.reverse_answer else 1)
        operator, equals = (np.full((len(a), int(data.signs)), ord(sign)) for sign in (OPERATORS[data.path], "="))
        codes = [a + ord("0"), operator, b + ord("0"), equals, answer[:, order] + ord("0")]
        kept = [significant(a), operator > 0, significant(b), equals > 0, significant(answer)[:, order]]
        return np.concatenate(codes, axis=1).astype(np.uint8), np.concatenate(kept, axis=1) | data.zero_pad

    def texts(self, indices: np.ndarray) -> list[tuple[str, str]]:
        """Question and answer of each problem as text, `("85+50=", "531")`."""
        cut, rows = self.question_width, zip(*self._written(indices), strict=True)
        return [(bytes(row[:cut][kept[:cut]]).decode(), bytes(row[cut:][kept[cut:]]).decode()) for row, kept in rows]

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """A batch; its targets are the answer and the end token after it, not the question or the padding."""
        codes, kept = self._written(indices)
        ids = np.full((len(codes), self.sequence_length + 1), self.end)
        ids[:, :-1] = self.ids[codes]
        if not self.data.zero_pad:  # what is written moves to the left, and end tokens fill the rest
            order = np.argsort(~kept, axis=1, kind="stable")
            moved = np.take_along_axis(ids[:, :-1], order, axis=1)
            ids[:, :-1] = np.where(np.take_along_axis(kept, order, axis=1), moved, self.end)
        question, length = kept[:, : self.question_width].sum(1, keepdims=True), kept.sum(1, keepdims=True)
        place = np.arange(1, self.sequence_length + 1)
        targets = np.where((place >= question) & (place <= length), ids[:, 1:], IGNORED)
        return {"input_ids": ids[:, :-1], "targets": targets}


class _Group:
    """All problems of two lengths as couples of mirrors, a+b and b+a, permuted, and the range of these in a split.

    `exact` numbers have no leading zero (those of one digit are 0 to 9); others have up to that many digits. Two of one
    length are places on a circle of N, and a and the distance from a to b number its N * N/2 couples of two problems:

        distance 1 to N/2 - 1             a+b and b+a
        distance 0, a in the first half   a+b and b+a, where b is opposite of a
        distance 0, a in the second half  a+a and b+b, where b is opposite of a: each is its own mirror

    Between two lengths a and b number the couples, and the group has one problem of each; the mirrored group the other.
    """

    def __init__(self, left: int, right: int, exact: bool, fractions: dict[str, float], name: str) -> None:
        self.square, self.mirrored = left == right, left > right
        short, long = (_radices(length, exact) for length in sorted((left, right)))
        self.radices = short, [long[0] // 2, *long[1:]] if self.square else long
        self.start, stop = cut_points(math.prod(self.radices[0] + self.radices[1]), fractions)[name]
        self.couples = stop - self.start
        self.size = self.couples * (1 + self.square)

    def operands(self, places: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """The digits of both operands of the problems at `places` (n,); a couple's second is half the group away."""
        (left, right), couples = self.radices, min(self.couples, MOST_ROWS)
        second, places = np.divmod(places, couples)  # the first or the second problem of a couple
        swapped = (second + places) % 2 == 1
        places = couples - 1 - places if self.mirrored else places
        start, rest, carry = self.start, places.astype(np.uint64), np.zeros(len(places), np.uint64)
        digits: list[np.ndarray] = []
        for radix in reversed(left + right):  # start + places, digit by digit: the sum may exceed 64 bits
            start, first = divmod(start, radix)
            rest, second = np.divmod(rest, np.uint64(radix))
            carry, digit = np.divmod(np.uint64(first) + second + carry, np.uint64(radix))
            digits.insert(0, digit)
        halves = permute_digits(digits[: len(left)], digits[len(left) :], left, right, seed)
        a, b = (np.stack(half, axis=1).astype(np.int64) for half in halves)
        if not self.square:
            a, b = _decimal(a, left), _decimal(b, right)
            return (b, a) if self.mirrored else (a, b)
        opposite = ~b.any(axis=1)  # b holds the distance yet
        alone = opposite & (a[:, 0] >= right[0])
        b[:, 0] += opposite * right[0]
        b += a
        for place in range(len(left) - 1, 0, -1):  # carries; the first digit's goes once around the circle
            b[:, place - 1] += b[:, place] // left[place]
        a, b = _decimal(a, left), _decimal(b % left, left)
        one = np.where(swapped[:, None], b, a)
        return one, np.where(alone[:, None], one, np.where(swapped[:, None], a, b))


def _radices(length: int, exact: bool) -> list[int]:
    """The radices of numbers of that many digits; the first two digits of an `exact` number are one, from 10 to 99."""
    return [90] + [10] * (length - 2) if exact and length > 1 else [10] * length


def _decimal(digits: np.ndarray, radices: list[int]) -> np.ndarray:
    """The decimal digits of numbers in such radices, (n, length)."""
    if radices[0] != 90:
        return digits
    return np.concatenate([digits[:, :1] // 10 + 1, digits[:, :1] % 10, digits[:, 1:]], axis=1)


def _compute(a: np.ndarray, b: np.ndarray, path: str) -> np.ndarray:
    """Digits of the sums, one more than of the operands, or of the products, twice as many."""
    columns, width = np.pad(a + b, ((0, 0), (1, 0))), a.shape[1]
    if path == "multiplication":
        columns = np.zeros((len(a), 2 * width), np.int64)
        for place in range(width):
            columns[:, place + 1 : place + 1 + width] += a[:, place : place + 1] * b
    for place in range(columns.shape[1] - 1, 0, -1):  # carries
        columns[:, place - 1] += columns[:, place] // 10
        columns[:, place] %= 10
    return columns


def significant(digits: np.ndarray) -> np.ndarray:
    """Which digits are not leading zeros, bool; the last digit of a zero counts."""
    kept = np.maximum.accumulate(digits != 0, axis=1)
    kept[:, -1] = True
    return kept


def read_answer(text: str, data: Data) -> int | None:
    """The number that a written answer stands for, or None if it is not a number."""
    digits = text[::-1] if data.reverse_answer else text
    return int(digits) if digits.isascii() and digits.isdigit() else None
