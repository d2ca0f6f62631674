"""Which sample sits where in which step: a pure function of the seed and the step, so there is no state to lose.

step ──> places in the endless order ──> epoch, place in it ──> permutation of the epoch ──> rows of this process

Where there is an accelerator, a thread reads the next batch into pinned memory while this one is computed with.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from .permutation import permute
from .splits import IGNORED

PIECE = 1024  # places permuted at once: numpy takes hardly longer for them than for a dozen


@dataclass
class Batch:
    """One process's share of one step."""

    micro_batches: list[dict[str, torch.Tensor]]
    """What each forward pass gets: tensors (rows, time) on the device."""
    num_targets: int
    """Targets of the step over all micro-steps and processes."""


class Loader:
    """Batches of a split, the same samples in every step for any number of processes and micro-steps.

    Args:
        split: what `data/splits.py` describes.
        batch_sizes: from a step (from 1) to its number of sequences over all processes.
        max_steps: steps of the run. seed: chooses the order. process, num_processes: whose share to load.
        micro_batch_size: rows of a micro-step; None for the whole share. device: where batches go.
    """

    def __init__(
        self,
        split,
        batch_sizes: Callable[[int], int],
        max_steps: int,
        seed: int,
        process: int,
        num_processes: int,
        micro_batch_size: int | None,
        device: torch.device,
    ):
        self.split, self.seed, self.device = split, seed, device
        self.process, self.num_processes, self.micro_batch_size = process, num_processes, micro_batch_size
        sizes = np.fromiter((batch_sizes(step) for step in range(1, max_steps + 1)), np.int64, max_steps)
        self.ends = np.concatenate([[0], np.cumsum(sizes)])  # samples drawn after each step
        self.piece = functools.lru_cache(2)(self._piece)
        self.reader = None if device.type == "cpu" else ThreadPoolExecutor(1, "loader")
        self.ahead: dict[int, Future] = {}  # the next step, being read

    def indices(self, step: int) -> np.ndarray:
        """The samples of `step` (from 1) over all processes, in order: each epoch permutes the whole split anew."""
        first, last = int(self.ends[step - 1]), int(self.ends[step])
        length = min(PIECE, len(self.split))
        start = first - first % length
        pieces = [self.piece(place, length) for place in range(start, last, length)]
        return np.concatenate(pieces)[first - start : last - start]

    def _piece(self, start: int, length: int) -> np.ndarray:
        """The samples at places start .. start + length - 1 of the endless order."""
        epochs, places = np.divmod(np.arange(start, start + length), len(self.split))
        result = np.empty(len(places), np.uint64)
        for epoch in np.unique(epochs):
            result[epochs == epoch] = permute(places[epochs == epoch], len(self.split), self.seed, int(epoch))
        return result

    def batch(self, step: int) -> Batch:
        """This process's share of `step`, cut into micro-steps."""
        if self.reader is None:
            micro_batches, num_targets = self._read(step)
        else:
            coming = self.ahead.get(step) or self.reader.submit(self._read, step)
            self.ahead = {step + 1: self.reader.submit(self._read, step + 1)} if step + 1 < len(self.ends) else {}
            micro_batches, num_targets = coming.result()
        return Batch([to_device(rows, self.device) for rows in micro_batches], num_targets)

    def _read(self, step: int) -> tuple[list[dict[str, torch.Tensor]], int]:
        """The rows of each micro-step, in pinned memory where the device copies from there, and all targets."""
        indices = self.indices(step)
        share = np.array_split(indices, self.num_processes)[self.process]
        size = self.micro_batch_size or len(share)
        rows = [self.split[share[i : i + size]] for i in range(0, len(share), size)]
        if self.split.targets_per_row is not None:
            num_targets = len(indices) * self.split.targets_per_row
        else:  # counted on every process rather than communicated: no waiting inside a step
            everything = self.split[indices] if self.num_processes > 1 else None
            num_targets = sum(int((row["targets"] != IGNORED).sum()) for row in ([everything] if everything else rows))
        return [to_host(row, self.device) for row in rows], num_targets

    def coverage(self, step: int) -> dict[str, float]:
        """How much of the split the first `step` steps have seen, at no cost: each epoch draws every sample once.

        Returns:
            `data/coverage`, the fraction of samples seen; `data/visits`, `data/visits_min` and `data/visits_max`, how
            often a sample was seen on average, at least and at most.
        """
        drawn, length = int(self.ends[step]), len(self.split)
        visits = {"": drawn / length, "_min": drawn // length, "_max": -(-drawn // length)}
        return {"data/coverage": min(1.0, drawn / length)} | {f"data/visits{k}": v for k, v in visits.items()}


def to_host(batch: dict[str, np.ndarray], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch as tensors from which `device` can copy without waiting."""
    tensors = {name: torch.from_numpy(array) for name, array in batch.items()}
    return {name: tensor.pin_memory() for name, tensor in tensors.items()} if device.type == "cuda" else tensors


def to_device(batch: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A batch on the device, copied without waiting."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
