"""The order of samples is a pure function of seed and step, however a step is split."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt.data.loader import Batch, Loader, Share
from cleangpt.data.splits import IGNORED


class Numbers:
    """A split whose row n is the number n % length, with a ragged number of targets."""

    sequence_length = 3

    def __init__(self, length: int) -> None:
        self.num_sequences = length

    def __len__(self) -> int:
        return self.num_sequences

    def count_targets(self, indices: np.ndarray) -> int:
        return int((indices % self.num_sequences % 3 + 1).sum())

    def __getitem__(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        rows = np.repeat((indices % self.num_sequences)[:, None], 3, axis=1)
        targets = np.where(np.arange(3) <= rows % 3, rows, IGNORED)
        return {"input_ids": rows, "targets": targets}


def loader(
    length: int = 100, batch_size: int = 7, max_steps: int = 40, growth: int = 0, seed: int = 1, **share: int
) -> Loader:
    sizes = batch_size * (1 + growth * np.arange(1, max_steps + 1))
    return Loader(Numbers(length), sizes, seed, Share(device=torch.device("cpu"), **share))


def samples(batch: Batch) -> list[int]:
    return [int(row[0]) for micro in batch.micro_batches for row in micro["input_ids"]]


@settings(deadline=None)
@given(
    length=st.integers(1, 200),
    batch_size=st.integers(1, 12),
    growth=st.integers(0, 2),
    num_processes=st.integers(1, 4),
    micro=st.integers(1, 5),
    seed=st.integers(0, 10),
)
def test_any_split_of_a_step_has_its_samples_in_order(length, batch_size, growth, num_processes, micro, seed):
    options = {
        "length": length,
        "batch_size": batch_size * num_processes,
        "growth": growth,
        "seed": seed,
        "max_steps": 6,
    }
    for step in range(1, 7):
        whole = loader(**options).batch(step)
        parts = [
            loader(**options, process=process, num_processes=num_processes, micro_batch_size=micro).batch(step)
            for process in range(num_processes)
        ]
        assert [sample for part in parts for sample in samples(part)] == samples(whole)
        assert {part.num_targets for part in parts} == {whole.num_targets}


@settings(deadline=None)
@given(length=st.integers(1, 60), batch_size=st.integers(1, 9), growth=st.integers(0, 2))
def test_every_epoch_has_every_sample_once(length, batch_size, growth):
    steps = loader(length, batch_size, 30, growth=growth)
    drawn = [int(sample) for step in range(1, 31) for sample in steps.indices(step)]
    for start in range(0, len(drawn) - length + 1, length):
        assert sorted(drawn[start : start + length]) == list(range(start, start + length))


def test_targets_are_counted_over_all_processes():
    batch = loader(process=1, num_processes=7).batch(3)
    indices = loader().indices(3)
    assert batch.num_targets == int((Numbers(100)[indices]["targets"] != IGNORED).sum())


@settings(deadline=None)
@given(length=st.integers(1, 50), batch_size=st.integers(1, 9), step=st.integers(0, 30))
def test_coverage_is_what_counting_gives(length, batch_size, step):
    steps = loader(length, batch_size, 30)
    drawn = [int(sample) for number in range(1, step + 1) for sample in steps.indices(number) % length]
    counts = np.bincount(drawn, minlength=length)
    assert steps.coverage(step) == {
        "data/coverage": (counts > 0).mean(),
        "data/visits": pytest.approx(counts.mean()),
        "data/visits_min": counts.min(),
        "data/visits_max": counts.max(),
    }
