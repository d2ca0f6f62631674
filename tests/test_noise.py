"""The gradient's noise scale: right where it is known, and training does not notice that it is measured."""

import shutil

import numpy as np
import pytest
import torch
from conftest import read_metrics
from safetensors.torch import load_file
from torch import nn

from cleangpt import UserError, load_recipe, train
from cleangpt.data.loader import Loader, Share
from cleangpt.training.checkpoint import list_checkpoints
from cleangpt.training.noise import SquaredNorms, add_step, noise_scale

PARTS = ["--training.batch_size=7", "--training.micro_batch_size=3", "--tracking.gradient_noise=true"]


@pytest.mark.parametrize("micro_batch_size", [8, 5, 1])
def test_a_known_scale_is_found_within_a_tenth(micro_batch_size):
    """The loss of a row x is w x, so its gradient is x: drawn with mean 1/4 in each of 64 places and spread 2."""
    model, generator, means = nn.Linear(64, 1, bias=False), torch.Generator().manual_seed(0), [0.0, 0.0]
    norms = SquaredNorms(model)
    loader = Loader([0] * 16, np.full(600, 16), 0, Share(device=torch.device("cpu"), micro_batch_size=micro_batch_size))
    for step in range(1, 601):
        rows = torch.randn(16, 64, generator=generator) * 2 + 0.25
        for part in rows.split(micro_batch_size):
            (model(part).sum() / len(rows)).backward()
        means = add_step(means, float(model.weight.grad.square().sum()), float(norms.take()), *loader.shares(step))
        model.zero_grad()
    assert noise_scale(means) == pytest.approx(64 * 2**2 / (64 * 0.25**2), rel=0.1)


def test_micro_steps_of_all_processes_are_counted():
    sequences, device = np.array([10, 12]), torch.device("cpu")
    loader = Loader([0] * 16, sequences, 0, Share(device=device, num_processes=2, micro_batch_size=3))
    assert loader.shares(1) == (10, pytest.approx((3**2 + 2**2 + 3**2 + 2**2) / 100))
    assert loader.shares(2) == (12, pytest.approx(4 * 3**2 / 144))
    assert Loader([0] * 16, sequences, 0, Share(device=device)).shares(2) == (12, 1.0)


def test_training_does_not_notice_and_a_resumed_run_measures_the_same(tiny_text, tmp_path):
    options = [*PARTS, "--checkpoint.keep_last=2"]
    folder = train(load_recipe(tiny_text, options)).parent
    without = train(load_recipe(tiny_text, [*options, "--tracking.gradient_noise=false", "--run.name=without"]))
    one, other = (load_file(path / "model.safetensors") for path in (folder / "final", without))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert not any("gradient_noise" in line for line in read_metrics(without.parent))
    before = [line["gradient_noise"] for line in read_metrics(folder) if "train/loss" in line]
    assert len(before) == 6 and all(value is None or value > 0 for value in before)
    shutil.rmtree(folder / "final")
    shutil.rmtree(list_checkpoints(folder)[-1])
    train(load_recipe(tiny_text, options))
    assert [line["gradient_noise"] for line in read_metrics(folder) if "train/loss" in line] == before


def test_one_micro_step_is_refused_before_anything_is_written(tiny_text, tmp_path):
    shrinking = [f"--schedule.accumulation.{option}" for option in ("style=linear", "begin=2", "end=1")]
    for options in (["--training.micro_batch_size=7"], ["--training.micro_batch_size=7", *shrinking]):
        with pytest.raises(UserError, match="expected at least two micro-steps in a step") as error:
            train(load_recipe(tiny_text, [*PARTS, *options]))
        assert error.value.problems[0][0] == "tracking.gradient_noise"
    assert not (tmp_path / "outputs").exists()
