"""Addition and multiplication problems, computed in the batch: no table of them is ever built.

    place 0 .. 10^(2n) - 1 ──> permutation ──> digits of a, b ──> "085+050=5310<|endoftext|>" ──> inputs and targets
    cut into splits            of all pairs                              ~~~~~~~~~~~~~~~~~~ targets: answer and end

The answer's last digit comes first, in the order in which one carries:

      085
    + 050        the answer 0135 is written 5310
    -----
     0135

Numbers are rows of digits throughout, so that they may be of any length. All arrays of digits are int64 (problems,
digits), the most significant first.
"""

import functools
import itertools

import numpy as np

from ..errors import UserError
from .permutation import permute_digits
from .splits import IGNORED, cut_points

FRACTIONS = {"train": 0.7, "validation": 0.15, "test": 0.15}
OPERATORS = {"addition": "+", "multiplication": "x"}
MOST_ROWS = 2**62  # that can be numbered; who samples 10^24 problems draws from so many of them


class ArithmeticSplit:
    """A split of all ordered pairs of operands; `split[indices]` is a batch.

    The operands are all numbers of up to `num_digits` digits, each pair in one row. With `min_digits` they form a group
    for each pair of lengths, split each for itself. Train then draws from all groups equally often, so that problems of
    small groups stand in several rows; the other splits go around the groups until each problem has had its row.

    Attributes:
        num_problems: different problems in the split.
        sequence_length: tokens of a row.
        num_sequences: rows of one pass.
        targets_per_row: targets of every row; None where rows differ, without `zero_pad`.
        answer_width: digits of the longest answer.
    """

    def __init__(self, section, name: str, seed: int, tokenizer):
        """`section` is `recipe.data`; `seed` chooses the permutation that the splits are cut from."""
        self.section, self.seed = section, seed
        digits, fractions = section.num_digits, section.split or FRACTIONS
        if name not in fractions:
            raise UserError(("data.split", f"expected a {name} split, got {', '.join(fractions)}"))
        if section.min_digits is None:
            lengths = [(digits, digits)]
        else:
            lengths = list(itertools.product(range(section.min_digits, digits + 1), repeat=2))
        groups = [_Group(a, b, section.min_digits is not None, fractions, name) for a, b in lengths]
        self.groups = sorted((group for group in groups if group.size), key=lambda group: group.size)
        if not self.groups:
            raise UserError(
                ("data.split", f"the {name} split is empty, expected a larger fraction than in {fractions}")
            )
        self.num_problems = sum(group.size for group in self.groups)
        self.evenly = name == "train"
        sizes = [min(group.size, MOST_ROWS // len(groups)) for group in self.groups]
        rows = [sizes[-1]] * len(sizes) if self.evenly else sizes
        self.rounds = np.array([0, *rows])  # rounds over the groups after which each of them is through
        self.ends = np.cumsum(np.diff(self.rounds) * np.arange(len(rows), 0, -1))  # rows until then

        self.answer_width = digits + 1 if section.path == "addition" else 2 * digits
        self.question_width = 2 * digits + 2 * section.signs
        self.sequence_length = self.question_width + self.answer_width
        self.num_sequences = len(self)
        self.targets_per_row = self.answer_width + 1 if section.zero_pad else None
        self.end = tokenizer.eos_token_id
        self.ids = np.zeros(128, np.int64)  # ASCII code -> token id
        for character in "0123456789+x=":
            self.ids[ord(character)] = tokenizer.convert_tokens_to_ids(character)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def digits(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The digits of both operands of each problem, (n, num_digits)."""
        indices = np.asarray(indices).astype(np.int64)
        through = np.searchsorted(self.ends, indices, side="right")  # groups that are through by then
        left = len(self.groups) - through
        offset = indices - np.where(through > 0, self.ends[through - 1], 0)
        number, place = through + offset % left, self.rounds[through] + offset // left
        a, b = (np.zeros((len(indices), self.section.num_digits), np.int64) for _ in range(2))
        for group_number in np.unique(number):
            mine, group = number == group_number, self.groups[group_number]
            one, other = group.operands(place[mine] % min(group.size, MOST_ROWS), self.seed)
            a[mine, a.shape[1] - one.shape[1] :] = one
            b[mine, b.shape[1] - other.shape[1] :] = other
        return a, b

    def operands(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two operands of each problem, (n,): int64, or Python's integers beyond 18 digits."""
        return tuple(_number(digits) for digits in self.digits(indices))

    def _written(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Problems as ASCII codes, uint8 (n, sequence_length) with all zeros, and which of these are written."""
        section = self.section
        a, b = self.digits(indices)
        answer = _add(a, b) if section.path == "addition" else _multiply(a, b)
        operator = [np.full((len(a), 1), ord(OPERATORS[section.path]))] if section.signs else []
        equals = [np.full((len(a), 1), ord("="))] if section.signs else []
        order = slice(None, None, -1 if section.reverse_answer else 1)
        codes = [ord("0") + a, *operator, ord("0") + b, *equals, (ord("0") + answer)[:, order]]
        kept = [_significant(a), *operator, _significant(b), *equals, _significant(answer)[:, order]]
        codes = np.concatenate(codes, axis=1).astype(np.uint8)
        return codes, np.ones(codes.shape, bool) if section.zero_pad else np.concatenate(kept, axis=1).astype(bool)

    def texts(self, indices: np.ndarray) -> list[tuple[str, str]]:
        """Question and answer of each problem as text, `("85+50=", "531")`."""
        cut, problems = self.question_width, []
        for codes, kept in zip(*self._written(indices), strict=True):
            parts = codes[:cut][kept[:cut]], codes[cut:][kept[cut:]]
            problems.append(tuple(part.tobytes().decode() for part in parts))
        return problems

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows for integer `indices` (n,): `input_ids` and `targets`, int64 (n, sequence_length).

        Targets are the answer and the end token after it; the question and what pads a short row are -100.
        """
        codes, kept = self._written(indices)
        ids = np.full((len(codes), self.sequence_length + 1), self.end)
        ids[:, :-1] = self.ids[codes]
        if not self.section.zero_pad:  # what is written moves to the left, the end token fills the rest
            order = np.argsort(~kept, axis=1, kind="stable")
            moved = np.take_along_axis(ids[:, :-1], order, axis=1)
            ids[:, :-1] = np.where(np.take_along_axis(kept, order, axis=1), moved, self.end)
        question = kept[:, : self.question_width].sum(1, keepdims=True)
        length = kept.sum(1, keepdims=True)
        place = np.arange(1, self.sequence_length + 1)
        targets = np.where((place >= question) & (place <= length), ids[:, 1:], IGNORED)
        return {"input_ids": ids[:, :-1], "targets": targets}


class _Group:
    """The pairs of operands of two lengths, permuted, and the part of them that is in a split.

    `exact` numbers have no zero in front, so that 0 to 9 are those of one digit; others have up to so many digits.
    """

    def __init__(self, left: int, right: int, exact: bool, fractions: dict[str, float], name: str):
        self.radices = [([9] if exact and length > 1 else [10]) + [10] * (length - 1) for length in (left, right)]
        total = functools.reduce(lambda product, radix: product * radix, self.radices[0] + self.radices[1])
        self.start, stop = cut_points(total, fractions)[name]
        self.size = stop - self.start

    def operands(self, places: np.ndarray, seed: int) -> list[np.ndarray]:
        """The digits of both operands of the problems at `places` of the split, int64 (n,)."""
        radices, start = self.radices[0] + self.radices[1], self.start
        rest, carry, digits = places.astype(np.uint64), np.zeros(len(places), np.uint64), []
        for radix in reversed(radices):  # start + places, digit by digit: the sum may be longer than 64 bits
            start, first = divmod(start, radix)
            rest, second = np.divmod(rest, np.uint64(radix))
            carry, digit = np.divmod(np.uint64(first) + second + carry, np.uint64(radix))
            digits.insert(0, digit)
        cut = len(self.radices[0])
        halves = permute_digits(digits[:cut], digits[cut:], *self.radices, seed)
        operands = [np.stack(half, axis=1).astype(np.int64) for half in halves]
        for operand, (leading, *_) in zip(operands, self.radices, strict=True):
            operand[:, 0] += leading == 9
        return operands


def _add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Digits of the sums, one more than of the operands."""
    return _carry(np.pad(a + b, ((0, 0), (1, 0))))


def _multiply(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Digits of the products, as many as of both operands."""
    result = np.zeros((len(a), 2 * a.shape[1]), np.int64)
    for place in range(a.shape[1]):
        result[:, place + 1 : place + 1 + b.shape[1]] += a[:, place : place + 1] * b
    return _carry(result)


def _carry(digits: np.ndarray) -> np.ndarray:
    """Columns of any size to digits."""
    for place in range(digits.shape[1] - 1, 0, -1):
        digits[:, place - 1] += digits[:, place] // 10
        digits[:, place] %= 10
    return digits


def _significant(digits: np.ndarray) -> np.ndarray:
    """Which digits are no leading zeros; of a zero its last."""
    kept = np.maximum.accumulate(digits != 0, axis=1)
    kept[:, -1] = True
    return kept


def _number(digits: np.ndarray) -> np.ndarray:
    result = np.zeros(len(digits), np.int64 if digits.shape[1] <= 18 else object)
    for column in digits.T:
        result = result * 10 + column
    return result


def read_answer(text: str, section) -> int | None:
    """The number that a written answer stands for; None when it is no number. `section` is `recipe.data`."""
    digits = text[::-1] if section.reverse_answer else text
    return int(digits) if digits.isascii() and digits.isdigit() else None
