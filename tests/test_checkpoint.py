"""Checkpoints: whole or not there, checked before they are used, kept as asked."""

import json
import math
import time

import pytest
from conftest import read_metrics

from cleangpt import UserError, load_recipe, train
from cleangpt.files import is_whole, write_folder
from cleangpt.recipe.keys import Checkpoint, EarlyStopping
from cleangpt.training import checkpoint
from cleangpt.training.checkpoint import Progress, list_checkpoints, newest_checkpoint, prune


def test_a_folder_appears_only_when_it_is_whole(tmp_path):
    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "step-1", fail)
    assert not (tmp_path / "step-1").exists()
    write_folder(tmp_path / "step-1", lambda folder: (folder / "data").write_text("x"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]
    assert is_whole(tmp_path / "step-1")


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no manifest"])
def test_damage_is_seen(tmp_path, damage):
    folder = tmp_path / "step-1"
    write_folder(folder, lambda folder: (folder / "data").write_bytes(bytes(range(100))))
    content = bytearray((folder / "data").read_bytes())
    content[50] ^= 1
    if damage == "flip":
        (folder / "data").write_bytes(content)
    elif damage == "truncate":
        (folder / "data").write_bytes(content[:99])
    else:
        (folder / ("data" if damage == "delete" else "manifest.json")).unlink()
    assert not is_whole(folder)


def test_the_newest_whole_checkpoint_is_taken(tiny_adder):
    train(recipe := load_recipe(tiny_adder, ["--checkpoint.keep_last=9"]))
    older, newest = list_checkpoints(recipe.folder)
    assert newest_checkpoint(recipe.folder) == newest
    (newest / "state.json").write_text("{}")
    assert newest_checkpoint(recipe.folder) == older
    (older / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="every checkpoint is damaged"):
        newest_checkpoint(recipe.folder)


def test_a_checkpoint_holds_no_pickle(tiny_adder):
    train(recipe := load_recipe(tiny_adder))
    suffixes = {path.suffix for path in list_checkpoints(recipe.folder)[0].rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".yaml", ".py", ".jinja"}


def test_a_checkpoint_that_is_written_late_is_of_its_own_step(tiny_text, monkeypatch):
    """While it is written, the losses of the next steps are read."""
    save_file = checkpoint.save_file
    monkeypatch.setattr(checkpoint, "save_file", lambda *arguments: (time.sleep(0.5), save_file(*arguments)))
    train(recipe := load_recipe(tiny_text, ["--tracking.log_every=5", "--checkpoint.keep_last=9"]))
    first, _ = list_checkpoints(recipe.folder)
    assert len(json.loads((first / "state.json").read_text())["losses"]) == 2  # of steps 2 and 3


def test_the_last_and_the_best_are_kept(tiny_adder):
    options = ["--training.max_steps=12", "--checkpoint.keep_last=2", "--checkpoint.keep_best=1", "--optimizer.lr=0.5"]
    train(recipe := load_recipe(tiny_adder, options))
    losses = {m["step"]: m["eval/loss"] for m in read_metrics(recipe.folder) if "eval/loss" in m and m["step"]}
    best = min(losses, key=losses.get)
    kept = [int(folder.name.removeprefix("step-")) for folder in list_checkpoints(recipe.folder)]
    assert kept == sorted({best, 10, 12})
    assert json.loads((recipe.folder / "best" / "manifest.json").read_text())


def test_what_is_best_is_finite_and_was_measured_there(tmp_path):
    """Step 1 was saved after a signal, with the figure of an earlier boundary; step 2 has none that is finite."""
    for step, loss, boundary in ((1, 0.5, 0), (2, math.nan, 2), (3, 1.5, 3), (4, 2.0, 4)):
        folder = tmp_path / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        state = {"step": step, "boundary": boundary, "metrics": {"eval/loss": loss}}
        (folder / "state.json").write_text(json.dumps(state))
    prune(tmp_path, Checkpoint(keep_last=1, keep_best=1))
    assert [folder.name[-1] for folder in list_checkpoints(tmp_path)] == ["3", "4"]


def test_progress_counts_evaluations_without_gain():
    progress, section = Progress(), EarlyStopping(patience=2, min_delta=0.1)
    outcomes = []
    for step, loss in enumerate([2.0, 1.5, 1.45, 1.44, 1.0], 1):
        progress.step, progress.metrics = step, {"eval/loss": loss}
        outcomes.append((progress.update_best("eval/loss", section), progress.stopped_early))
    assert outcomes == [(True, False), (True, False), (True, False), (True, True), (True, False)]


def test_a_metric_that_is_not_finite_is_never_the_best():
    progress, patience = Progress(), EarlyStopping(patience=3)
    found = []
    for progress.step, loss in enumerate([math.nan, 3.0, math.nan, 2.0]):
        progress.metrics = {"eval/loss": loss}
        found.append(progress.update_best("eval/loss", patience))
    assert found == [False, True, False, True]
    assert (progress.best, progress.stopped_early) == (2.0, False)


def test_accuracy_counts_upwards():
    progress = Progress()
    for accuracy, better in ((0.5, True), (0.4, False), (0.6, True)):
        progress.metrics = {"eval/accuracy": accuracy}
        assert progress.update_best("eval/accuracy", EarlyStopping()) == better
