"""Which samples each step trains on: a pure function of seed and step, so that there is no state to save or lose.

step ──> places ──> source, row of it ──> epoch, place in it ──> permutation of the epoch ──> rows of this process
         (endless)  (a mixture's turn)

With an accelerator, a thread reads the next batch into pinned memory during the current step.
"""

import functools
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import torch

from .mixture import Mixture, Turns
from .permutation import permute
from .splits import Split

PIECE = 1024  # places permuted at once: hardly slower in numpy than a dozen


@dataclass
class Batch:
    """One process's share of a step."""

    micro_batches: list[dict[str, torch.Tensor]]  # the inputs of each forward pass: (rows, time) on the device
    num_targets: int  # of the step over all micro-steps and processes
    num_tokens: int  # likewise, those that are no target included


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of each step that a process loads."""

    device: torch.device
    process: int = 0
    num_processes: int = 1
    micro_batch_size: int | None = None  # None for the whole share


class Order:
    """An endless order of `length` rows: each epoch permutes all of them again."""

    def __init__(self, length: int, seed: int) -> None:
        self.length, self.seed = length, seed
        self.piece = functools.lru_cache(2)(self._piece)

    def rows(self, first: int, last: int) -> np.ndarray:
        """The numbers (see `Split`) of the rows at places `first` to before `last`, which are not the same."""
        length = min(PIECE, self.length)
        start = first - first % length
        pieces = [self.piece(place, length) for place in range(start, last, length)]
        return np.concatenate(pieces)[first - start : last - start]

    def _piece(self, start: int, length: int) -> np.ndarray:
        """The numbers of the rows at places start .. start + length - 1."""
        epochs, places = np.divmod(np.arange(start, start + length), self.length)
        result = epochs * self.length
        for epoch in np.unique(epochs):
            mine = epochs == epoch
            result[mine] += permute(places[mine], self.length, self.seed, int(epoch)).astype(np.int64)
        return result


class Loader:
    """Batches of a split, with the same samples in a step for any number of processes and micro-steps."""

    def __init__(
        self, split: Split, batch_sizes: np.ndarray, seed: int, share: Share, shares: np.ndarray | None = None
    ) -> None:
        """`shares` (steps, sources) of each step's rows are those of a mixture's sources."""
        self.split, self.share = split, share
        self.ends = np.cumsum(np.append(0, batch_sizes))  # samples drawn after each step over all processes
        lengths = split.lengths.tolist() if isinstance(split, Mixture) else [len(split)]
        self.orders = [Order(length, seed + source) for source, length in enumerate(lengths)]
        self.turns = None if shares is None else Turns(shares, self.ends)
        self.reader = None if share.device.type == "cpu" else ThreadPoolExecutor(1, "loader")
        self.ahead: dict[int, Future] = {}  # the next step, being read

    def indices(self, step: int) -> np.ndarray:
        """The numbers (see `Split`) of the rows of `step` (from 1) over all processes, in order."""
        first, last = self.ends[step - 1 : step + 1].tolist()
        if self.turns is None or not isinstance(self.split, Mixture):
            return self.orders[0].rows(first, last)
        source, row = self.turns.between(first, last)
        for i in np.unique(source):
            mine = source == i
            row[mine] = self.orders[i].rows(int(row[mine][0]), int(row[mine][-1]) + 1)  # they follow one another
        return self.split.number(source, row)

    def shares(self, step: int) -> tuple[int, float]:
        """The rows of `step` over all processes, and the sum of the squares of its micro-steps' shares in them."""
        rows, share = int(self.ends[step] - self.ends[step - 1]), self.share
        parts = [len(part) for part in np.array_split(np.arange(rows), share.num_processes)]
        size = share.micro_batch_size or rows
        return rows, sum((min(size, part - i) / rows) ** 2 for part in parts for i in range(0, part, size))

    def batch(self, step: int) -> Batch:
        """This process's share of `step`, cut into micro-steps."""
        if self.reader is None:
            return self._read(step)
        coming = self.ahead.get(step) or self.reader.submit(self._read, step)
        self.ahead = {step + 1: self.reader.submit(self._read, step + 1)} if step + 1 < len(self.ends) else {}
        read = coming.result()
        return replace(read, micro_batches=[to_device(rows, self.share.device) for rows in read.micro_batches])

    def _read(self, step: int) -> Batch:
        """`batch` in host memory."""
        indices = self.indices(step)
        mine = np.array_split(indices, self.share.num_processes)[self.share.process]
        size = self.share.micro_batch_size or len(mine)
        rows = [to_host(self.split[mine[i : i + size]], self.share.device) for i in range(0, len(mine), size)]
        # Every process counts the targets of all, which spares communication.
        return Batch(rows, self.split.count_targets(indices), len(indices) * self.split.sequence_length)

    def coverage(self, step: int) -> dict[str, float]:
        """The fraction of samples seen in the first `step` steps, and how often on average, at least and at most."""
        end, lengths = int(self.ends[step]), [order.length for order in self.orders]
        drawn = [end] if self.turns is None else self.turns.drawn(end).tolist()
        pairs, total = [*zip(drawn, lengths, strict=True)], sum(lengths)
        figures = {
            "data/coverage": sum(map(min, pairs)) / total,
            "data/visits": end / total,
            "data/visits_min": min(count // length for count, length in pairs),
            "data/visits_max": max(-(-count // length) for count, length in pairs),
        }
        labels = [*self.split.sources] if isinstance(self.split, Mixture) else []
        return figures | {f"data/coverage/{labels[i]}": min(pair) / pair[1] for i, pair in enumerate(pairs) if labels}


def to_host(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as tensors that `device` can copy from asynchronously: pinned for a GPU."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if device.type == "cuda" else tensors


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Copies a batch to the device asynchronously."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
