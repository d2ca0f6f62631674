"""A split reads as one stream of tokens, wherever record batches and files end."""

import numpy as np
import pytest
from conftest import write_split
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from cleangpt.data.stream import TokenStream

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=12)


def documents_of(lengths: list[int]) -> list[np.ndarray]:
    return np.split(np.arange(sum(lengths), dtype=np.uint16), np.cumsum(lengths)[:-1])


@settings(max_examples=50, deadline=None)
@given(lengths=LENGTHS, rows=st.integers(1, 4), data=st.data())
def test_tokens_are_read_across_record_batches(tmp_path_factory, lengths, rows, data):
    folder, total = tmp_path_factory.mktemp("stream"), sum(lengths)
    write_split(folder, "train", documents_of(lengths), rows_a_batch=rows)
    stream = TokenStream(folder, "train")
    assert len(stream) == total and np.concatenate([*stream]).tolist() == list(range(total))
    assert stream.starts.tolist() == np.cumsum([0, *lengths[:-1]]).tolist()
    first = data.draw(st.integers(0, total))
    stop = data.draw(st.integers(first, total))
    assert stream.read(first, stop).tolist() == list(range(first, stop))


def test_ids_above_16_bits_are_read(tmp_path):
    write_split(tmp_path, "train", [np.array([70_000, 1], np.uint32), np.array([2**31], np.uint32)])
    assert TokenStream(tmp_path, "train").read(0, 3).tolist() == [70_000, 1, 2**31]


def test_labels_are_a_stream_beside(tmp_path):
    ids = documents_of([3, 2])
    write_split(tmp_path, "train", ids, labels=[np.array([-100, -100, 2]), np.array([-100, 4])])
    assert TokenStream(tmp_path, "train").labels.read(1, 5).tolist() == [-100, 2, -100, 4]
    write_split(tmp_path, "validation", ids)
    assert TokenStream(tmp_path, "validation").labels is None


def test_a_place_behind_the_end_is_refused(tmp_path):
    write_split(tmp_path, "train", documents_of([3]))
    with pytest.raises(IndexError):
        TokenStream(tmp_path, "train").read(2, 4)


def test_datasets_reads_the_same(tmp_path):
    write_split(tmp_path, "train", documents_of([4, 3, 5]))
    rows = load_from_disk(str(tmp_path / "train"))["input_ids"]
    assert [*rows] == [[0, 1, 2, 3], [4, 5, 6], [7, 8, 9, 10, 11]]
