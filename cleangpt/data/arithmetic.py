"""Addition and multiplication problems, computed in the batch: no table of them is ever built.

    place 0 .. 10^(2n) - 1 ──> permutation ──> (a, b) ──> "085+050=5310<|endoftext|>" ──> inputs and targets
    cut into splits            of all pairs                       ~~~~~~~~~~~~~~~~~~ targets: the answer and its end

The answer's last digit comes first, in the order in which one carries:

      085
    + 050        the answer 0135 is written 5310
    -----
     0135
"""

import numpy as np

from ..errors import UserError
from .permutation import permute_pairs
from .splits import IGNORED, cut_points

FRACTIONS = {"train": 0.7, "validation": 0.15, "test": 0.15}
OPERATORS = {"addition": "+", "multiplication": "x"}


class ArithmeticSplit:
    """A split of all ordered pairs of operands with up to `num_digits` digits; `split[indices]` is a batch.

    Attributes:
        sequence_length: tokens of a row.
        num_sequences: rows of one pass.
        targets_per_row: targets of every row; None where rows differ, without `zero_pad`.
        answer_width: digits of the longest answer.
    """

    def __init__(self, section, name: str, seed: int, tokenizer):
        """`section` is `recipe.data`; `seed` chooses the permutation that the splits are cut from."""
        self.section, self.seed = section, seed
        self.radix = 10**section.num_digits
        bounds = cut_points(self.radix**2, section.split or FRACTIONS)
        if name not in bounds:
            raise UserError(("data.split", f"expected a {name} split, got {', '.join(bounds)}"))
        self.start, self.stop = bounds[name]
        if self.start == self.stop:
            raise UserError(("data.split", f"the {name} split is empty, expected a larger fraction than in {bounds}"))
        self.answer_width = section.num_digits + 1 if section.path == "addition" else 2 * section.num_digits
        self.sequence_length = 2 * section.num_digits + 2 * section.signs + self.answer_width
        self.num_sequences = len(self)
        self.targets_per_row = self.answer_width + 1 if section.zero_pad else None
        self.ids = np.full(128, tokenizer.eos_token_id)  # ASCII code -> token id; the space becomes the end token
        for character in "0123456789+x=":
            self.ids[ord(character)] = tokenizer.convert_tokens_to_ids(character)

    def __len__(self) -> int:
        return self.stop - self.start

    def operands(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The two operands of each problem, uint64 (n,)."""
        place = np.asarray(indices, np.uint64) + np.uint64(self.start)
        return permute_pairs(*np.divmod(place, np.uint64(self.radix)), self.radix, self.seed)

    def texts(self, indices: np.ndarray) -> list[tuple[str, str]]:
        """Question and answer of each problem as text, `("85+50=", "531")`."""
        section = self.section
        pad = f"0{section.num_digits}" if section.zero_pad else ""
        answer_pad = f"0{self.answer_width}" if section.zero_pad else ""
        operator, equals = (OPERATORS[section.path], "=") if section.signs else ("", "")
        order = slice(None, None, -1 if section.reverse_answer else 1)
        problems = []
        for a, b in zip(*(operand.tolist() for operand in self.operands(indices)), strict=True):
            result = a + b if section.path == "addition" else a * b
            problems.append((f"{a:{pad}}{operator}{b:{pad}}{equals}", f"{result:{answer_pad}}"[order]))
        return problems

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows for integer `indices` (n,): `input_ids` and `targets`, int64 (n, sequence_length).

        Targets are the answer and the end token after it; the question and what pads a short row are -100.
        """
        problems = self.texts(indices)
        width = self.sequence_length + 1
        rows = "".join((question + answer).ljust(width) for question, answer in problems)
        ids = self.ids[np.frombuffer(rows.encode("ascii"), np.uint8).reshape(-1, width)]
        questions = np.array([len(question) for question, _ in problems])[:, None]
        ends = questions + np.array([len(answer) for _, answer in problems])[:, None]
        place = np.arange(1, width)
        targets = np.where((place >= questions) & (place <= ends), ids[:, 1:], IGNORED)
        return {"input_ids": ids[:, :-1].astype(np.int64), "targets": targets.astype(np.int64)}


def read_answer(text: str, section) -> int | None:
    """The number that a written answer stands for; None when it is no number. `section` is `recipe.data`."""
    digits = text[::-1] if section.reverse_answer else text
    return int(digits) if digits.isascii() and digits.isdigit() else None
