"""Averaged weights: the right ones, measured beside the others, the better of both in `best`, exact after a stop."""

import pytest
import torch
from conftest import read_metrics
from faults import left_behind
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from cleangpt import Stopped, UserError, load_recipe, train
from cleangpt.plan import make_plan
from cleangpt.training.checkpoint import list_checkpoints

EVERY_STEP = ["--training.ema=0.6", "--training.macro_batch=1", "--checkpoint.keep_last=99"]


def test_the_average_is_that_of_the_weights_after_each_step(tiny_text):
    train(recipe := load_recipe(tiny_text, EVERY_STEP))
    average = None
    for checkpoint in list_checkpoints(recipe.folder):
        weights, saved = (load_file(checkpoint / name / "model.safetensors") for name in ("model", "average"))
        average = {name: 0.6 * average[name] + 0.4 * weight if average else weight for name, weight in weights.items()}
        torch.testing.assert_close(saved, average)


def test_the_better_of_both_is_the_best(tiny_text):
    """At a rate at which the weights jump about, their average is better."""
    train(recipe := load_recipe(tiny_text, [*EVERY_STEP, "--optimizer.lr=0.3", "--training.max_steps=30"]))
    last = min(read_metrics(recipe.folder), key=lambda line: line.get("eval/ema/loss", 99))
    assert last["eval/ema/loss"] < min(line["eval/loss"] for line in read_metrics(recipe.folder) if "eval/loss" in line)
    checkpoint = recipe.folder / "checkpoints" / f"step-{last['step']:08d}"
    best, average = (folder / "model.safetensors" for folder in (recipe.folder / "best", checkpoint / "average"))
    assert best.read_bytes() == average.read_bytes()
    card = ModelCard.load(recipe.folder / "best" / "README.md").data
    assert [result.metric_type for result in card.eval_results] == ["loss", "perplexity", "bits_per_byte"]
    assert card.eval_results[0].metric_value == pytest.approx(last["eval/ema/loss"], abs=1e-4)
    train(tuned := load_recipe(tiny_text, ["--run.name=tuned", f"--model.init_from={recipe.folder / 'best'}"]))
    assert read_metrics(tuned.folder)[0]["eval/loss"] == pytest.approx(last["eval/ema/loss"], abs=1e-6)


def test_training_itself_is_the_same_with_and_without(tiny_text):
    with_average, without = (train(load_recipe(tiny_text, options)) for options in (EVERY_STEP, ["--run.name=plain"]))
    assert (with_average / "model.safetensors").read_bytes() == (without / "model.safetensors").read_bytes()


def test_a_run_that_is_stopped_goes_on_to_the_same_average(tiny_text, monkeypatch):
    train(whole := load_recipe(tiny_text, [*EVERY_STEP, "--run.name=whole"]))
    recipe = load_recipe(tiny_text, [*EVERY_STEP, "--run.name=stopped"])
    with monkeypatch.context() as patch:  # as if a signal came in each step
        patch.setattr("cleangpt.training.launch.StopVote.__call__", lambda vote, wish: True)
        for _ in range(3):
            with pytest.raises(Stopped):
                train(recipe)
    train(recipe)
    expected, found = (left_behind(run.folder)["weights"] for run in (whole, recipe))
    assert expected == found and any("average/" in name for name in found)


def test_a_branch_may_begin_an_average(tiny_text):
    train(stable := load_recipe(tiny_text, ["--training.max_steps=3"]))
    (checkpoint,) = list_checkpoints(stable.folder)
    train(branch := load_recipe(tiny_text, [*EVERY_STEP, f"--training.resume={checkpoint}", "--run.name=branch"]))
    first = list_checkpoints(branch.folder)[0]
    start = load_file(checkpoint / "model" / "model.safetensors")
    weights, average = (load_file(first / name / "model.safetensors") for name in ("model", "average"))
    torch.testing.assert_close(average, {name: 0.6 * start[name] + 0.4 * weights[name] for name in weights})


def test_a_plan_counts_the_average(tiny_text):
    plain, averaged = (make_plan(load_recipe(tiny_text, options)).ddp for options in ([], EVERY_STEP[:1]))
    assert averaged.peak - plain.peak in (plain.weights, 2 * plain.weights)  # twice with a checkpoint's copy


@pytest.mark.parametrize("decay", ["0", "1", "often"])
def test_a_decay_that_is_none_is_refused(tiny_text, decay):
    with pytest.raises(UserError, match=r"training.ema: expected a number between 0 and 1"):
        load_recipe(tiny_text, [f"--training.ema={decay}"])
