"""Built data is found again, built once, and never partial."""

import os
import resource
import signal
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import datasets
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cleangpt import UserError
from cleangpt.data import cache
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


def test_a_failed_build_leaves_nothing_behind(tmp_path):
    def fail(folder: Path):
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        build_once({"test": str(tmp_path)}, fail)
    folder = build_once({"test": str(tmp_path)}, lambda folder: None)
    assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "ingredients.json"]


def test_leftovers_of_a_killed_build_are_cleared(tmp_path):
    def killed(folder: Path):
        (folder / "half").write_text("x")
        os.kill(os.getpid(), signal.SIGKILL)

    child = get_context("fork").Process(target=build_once, args=({"test": str(tmp_path)}, killed))
    child.start()
    child.join()
    folder = build_once({"test": str(tmp_path)}, lambda folder: (folder / "whole").write_text("x"))
    assert sorted(path.name for path in folder.iterdir()) == ["checksums.json", "ingredients.json", "whole"]
    assert not [path for path in folder.parent.iterdir() if path.name.startswith("building-")]


def damage(path: Path, how: str) -> None:
    if how == "missing":
        path.unlink()
    elif how == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(bytes([path.read_bytes()[0] ^ 1]) + path.read_bytes()[1:])


@pytest.mark.parametrize("how", ["missing", "cut off", "flipped"])
@pytest.mark.parametrize("name", ["inside/data", "checksums.json"])
def test_a_damaged_folder_is_built_again(tmp_path, caplog, how, name):
    def build(folder: Path):
        (folder / "inside").mkdir()
        (folder / "inside" / "data").write_text("whole")

    folder = build_once({"test": str(tmp_path)}, build)
    damage(folder / name, how)
    cache.verified.clear()  # as in another process
    assert build_once({"test": str(tmp_path)}, build) == folder
    assert (folder / "inside" / "data").read_text() == "whole" and cache.is_whole(folder)
    assert caplog.messages == [f"{folder} is damaged and built again"]


def test_a_full_disk_is_reported_and_leaves_nothing(tmp_path):
    def fill(folder: Path):
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        (folder / "large").write_text("x" * 2000)

    def child():
        with pytest.raises(UserError, match="cannot be used as the data cache: File too large"):
            build_once({"test": str(tmp_path)}, fill)

    process = get_context("fork").Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == 0
    root = Path(datasets.config.HF_DATASETS_CACHE) / "cleangpt"
    assert not (root / fingerprint({"test": str(tmp_path)})).exists()


def test_a_cache_that_cannot_be_written_is_reported(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be used as the data cache"):
        build_once({"test": 1}, lambda folder: None)


def test_builds_at_the_same_time_do_the_work_once(tmp_path):
    calls = []

    def build(folder: Path):
        calls.append(folder)
        (folder / "data").write_text("x" * 1000)

    with ThreadPoolExecutor(8) as pool:
        folders = set(pool.map(lambda _: build_once({"test": str(tmp_path)}, build), range(8)))
    assert len(folders) == len(calls) == 1


@given(st.dictionaries(st.text(), st.integers()), st.dictionaries(st.text(), st.integers()))
def test_fingerprints_are_equal_exactly_if_ingredients_are(one, other):
    assert (fingerprint(one) == fingerprint(other)) == (one == other)


def test_files_are_distinguished_by_content(tmp_path):
    (tmp_path / "a").write_text("same")
    (tmp_path / "b").write_text("same")
    (tmp_path / "c").write_text("diff")
    assert file_hash(tmp_path / "a") == file_hash(tmp_path / "b") != file_hash(tmp_path / "c")
