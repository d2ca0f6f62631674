"""One optimizer step under a gradient scaler, as fp16 needs it: on a CPU everything but rounding must stay.

A CPU has no fp16 training, but `torch.amp.GradScaler("cpu")` scales as on a GPU. A power of two rounds nothing.
"""

import itertools
import json

import pytest
import torch
from conftest import read_metrics
from safetensors.torch import load_file

from cleangpt import Stopped, load_recipe, train
from cleangpt.training import setup, step
from cleangpt.training.checkpoint import list_checkpoints

OPTIONS = ["--optimizer.name=muon", "--optimizer.lr=0.01", "--model.dropout=0.1", "--checkpoint.keep_last=9"]


@pytest.fixture
def scaler(monkeypatch):
    """Gives every run a scaler with a scale to start from; without a call there is none."""
    start_accelerator = setup.start_accelerator

    def use(init_scale: float) -> None:
        def start_scaled(*args):
            accelerator = start_accelerator(*args)
            accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=init_scale)

            def unscale_gradients(optimizer=None):
                for optimizer in accelerator._optimizers:
                    accelerator.scaler.unscale_(optimizer.optimizer)

            accelerator.unscale_gradients = unscale_gradients
            return accelerator

        monkeypatch.setattr(setup, "start_accelerator", start_scaled)

    return use


def losses(folder) -> list[float]:
    return [line["train/loss"] for line in read_metrics(folder) if "train/loss" in line]


def same_weights(one, other) -> bool:
    one, other = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_two_optimizers_under_a_scaler_train_as_without(tiny_text, scaler):
    train(plain := load_recipe(tiny_text, [*OPTIONS, "--run.name=plain"]))
    scaler(2.0**16)
    train(scaled := load_recipe(tiny_text, [*OPTIONS, "--run.name=scaled"]))
    assert losses(scaled.folder) == losses(plain.folder)
    assert same_weights(scaled.folder / "final", plain.folder / "final")


def test_a_scaled_run_resumes_exactly(tiny_text, scaler):
    scaler(2.0**16)
    train(whole := load_recipe(tiny_text, [*OPTIONS, "--run.name=whole"]))
    first = list_checkpoints(whole.folder)[0]
    assert json.loads((first / "state.json").read_text())["scaler"]["_growth_tracker"] == 3
    train(again := load_recipe(tiny_text, [*OPTIONS, "--run.name=again", f"--training.resume={first}"]))
    assert same_weights(again.folder / "final", whole.folder / "final")


def test_an_overflow_is_skipped_by_all_optimizers_and_no_mistake(tiny_text, scaler, capsys):
    """2^127 times a loss near 3.8 is beyond float32: two halvings, and training begins."""
    scaler(2.0**127)
    train(recipe := load_recipe(tiny_text, [*OPTIONS, "--training.max_skipped=0"]))
    said = capsys.readouterr().out
    skipped = [line.split(":")[0] for line in said.splitlines() if "overflow in fp16" in line]
    assert skipped == [f"step {number}" for number in range(1, len(skipped) + 1)] and skipped
    assert losses(recipe.folder)[-1] < losses(recipe.folder)[0]


def test_endless_overflow_ends_the_run(tiny_text, scaler, monkeypatch):
    """With a finite loss and a scale that sinks from 4 to 1, whose overflow is no longer the scale's."""
    scaler(4.0)

    def accumulate(accelerator, model, batch):
        loss = step.accumulate(accelerator, model, batch)
        next(model.parameters()).grad.fill_(float("inf"))
        return loss

    monkeypatch.setattr("cleangpt.training.loop.accumulate", accumulate)
    with pytest.raises(Stopped, match="diverged at step 4"):
        train(load_recipe(tiny_text, [*OPTIONS, "--training.max_skipped=1", "--training.macro_batch=2"]))


def test_a_loss_that_is_not_finite_leaves_the_scaler_ready(tiny_text, scaler, monkeypatch, capsys):
    scaler(2.0**10)
    calls = itertools.count(1)

    def accumulate(accelerator, model, batch):
        loss = step.accumulate(accelerator, model, batch)
        return loss * float("nan") if next(calls) == 2 else loss

    monkeypatch.setattr("cleangpt.training.loop.accumulate", accumulate)
    assert train(load_recipe(tiny_text, OPTIONS)).is_dir()
    assert "step 2: loss nan" in capsys.readouterr().out
