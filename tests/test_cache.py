"""Built data is found again, built once, and never half there."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleangpt.data.cache import build_once, file_hash, fingerprint


def test_a_build_is_found_again(tmp_path):
    calls = []

    def build(folder: Path):
        calls.append(folder)
        (folder / "data").write_text("x")

    first = build_once({"test": str(tmp_path)}, build)
    assert build_once({"test": str(tmp_path)}, build) == first
    assert (first / "data").read_text() == "x"
    assert len(calls) == 1


def test_a_build_that_fails_leaves_nothing_that_counts(tmp_path):
    def fail(folder: Path):
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        build_once({"test": str(tmp_path)}, fail)
    folder = build_once({"test": str(tmp_path)}, lambda folder: None)
    assert [path.name for path in folder.iterdir()] == ["ingredients.json"]


def test_builds_at_the_same_time_do_the_work_once(tmp_path):
    calls = []

    def build(folder: Path):
        calls.append(folder)
        (folder / "data").write_text("x" * 1000)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: build_once({"test": str(tmp_path)}, build), range(8)))
    assert len(folders) == len(calls) == 1


@given(st.dictionaries(st.text(), st.integers()), st.dictionaries(st.text(), st.integers()))
def test_a_fingerprint_is_the_same_exactly_for_the_same(one, other):
    assert (fingerprint(one) == fingerprint(other)) == (one == other)


def test_files_are_told_apart_by_content(tmp_path):
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    (tmp_path / "c").write_text("diff")
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "b") != file_hash(tmp_path / "c")
