"""Trackers get what `metrics.jsonl` gets; a Hub out of reach changes nothing."""

import time

import pytest
from conftest import read_metrics

from cleangpt import UserError, load_recipe, train


def test_wandb_gets_a_run_without_an_account(tiny_adder):
    train(recipe := load_recipe(tiny_adder, ["--tracking.trackers=[wandb]", "--evaluation.prompts=['1+2=']"]))
    (run,) = (recipe.folder / "wandb").glob("offline-run-*/run-*.wandb")
    names = (b"train/loss", b"eval/accuracy", b"grad_norm", b"optimizer.lr", b"sample/0")
    for _ in range(100):  # its own process writes the file, a moment later
        if all(name in run.read_bytes() for name in names):
            break
        time.sleep(0.1)
    assert [name for name in names if name not in run.read_bytes()] == []


def test_a_tracker_that_is_not_installed_is_told(tiny_adder, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking\.trackers: tensorboard is not installed: pip install tensorboard"):
        load_recipe(tiny_adder, ["--tracking.trackers=[tensorboard]"])


def test_a_hub_out_of_reach_does_not_end_a_run(tiny_adder, caplog):
    final = train(recipe := load_recipe(tiny_adder, ["--hub.push=true", "--hub.repo_id=me/tiny"]))
    assert (final / "model.safetensors").exists()
    assert read_metrics(recipe.folder)[-1]["step"] == 4
    assert "hf upload me/tiny" in caplog.text
