"""One optimizer step under a gradient scaler, as fp16 needs it: on a CPU everything but rounding must stay.

A CPU has no fp16 training, but `torch.amp.GradScaler("cpu")` scales as on a GPU. A power of two rounds nothing.
"""

import itertools
import json
import statistics
import traceback

import pytest
import torch
import yaml
from conftest import read_metrics
from safetensors.torch import load_file
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cleangpt import Stopped, load_recipe, train
from cleangpt.data.loader import Loader
from cleangpt.models.nanogpt import modeling_nanogpt
from cleangpt.models.nanollama import modeling_nanollama
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
    options = [*OPTIONS, "--training.micro_batch_size=2", "--tracking.gradient_noise=true"]
    train(plain := load_recipe(tiny_text, [*options, "--run.name=plain"]))
    scaler(2.0**16)
    train(scaled := load_recipe(tiny_text, [*options, "--run.name=scaled"]))
    assert losses(scaled.folder) == losses(plain.folder)
    noise = [[line.get("gradient_noise") for line in read_metrics(run.folder)] for run in (plain, scaled)]
    assert noise[0] == noise[1] and any(noise[0])
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
        if next(calls) != 2:
            return loss
        next(model.parameters()).grad.fill_(float("nan"))
        return loss * float("nan")

    monkeypatch.setattr("cleangpt.training.loop.accumulate", accumulate)
    assert train(load_recipe(tiny_text, OPTIONS)).is_dir()
    assert "step 2: loss nan" in capsys.readouterr().out


READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}
METHODS = ("item", "tolist", "cpu", "numpy", "__bool__", "__int__", "__float__", "__index__", "__array__")


class Recorder:
    """Notes the step in which something on the device is read, which waits for it; on a CPU, any tensor counts."""

    def __init__(self):
        self.step, self.read = 0, {}

    def note(self, what):
        place = next(f for f in reversed(traceback.extract_stack()) if "cleangpt/" in f.filename)
        self.read.setdefault(self.step, set()).add(f"{what} in {place.filename}:{place.lineno}")


class Dispatches(TorchDispatchMode):
    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in READS:
            self.recorder.note(func)
        return func(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __init__(self, recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__name__", "") in METHODS:
            self.recorder.note(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def tiny_documents(tiny_text, stories_file):
    recipe = yaml.safe_load(tiny_text.read_text())
    recipe["data"] |= {"path": "json", "data_files": str(stories_file), "packing": "documents", "block_size": 32}
    tiny_text.write_text(yaml.safe_dump(recipe))
    return tiny_text


@pytest.mark.parametrize(
    ("data", "options"),
    [
        ("tiny_text", ["--optimizer.name=muon", "--training.micro_batch_size=2"]),
        ("tiny_text", ["--model.model_type=nanollama", "--training.mixed_precision=bf16"]),
        ("tiny_text", ["--model.model_type=qwen3"]),
        ("tiny_adder", ["--optimizer.name=muon", "--model.dropout=0.1"]),
        ("tiny_adder", ["--data.zero_pad=false"]),
        ("tiny_documents", ["--optimizer.name=adamw"]),
        ("tiny_text", ["fp16", "--optimizer.name=muon"]),
    ],
)
def test_between_two_lines_of_metrics_nothing_waits_for_the_device(data, options, request, monkeypatch, scaler):
    if "fp16" in options:
        scaler(2.0**16)
    recorder, batch = Recorder(), Loader.batch

    def batch_of(loader, step):
        recorder.step = step
        return batch(loader, step)

    monkeypatch.setattr(Loader, "batch", batch_of)
    for kind in (modeling_nanogpt, modeling_nanollama):  # a check for CPUs only
        monkeypatch.setattr(kind, "check_range", lambda *arguments: None)
    schedule = ["--training.max_steps=9", "--training.macro_batch=9", "--tracking.log_every=4"]
    recipe = load_recipe(request.getfixturevalue(data), [*options[options[0] == "fp16" :], *schedule])
    with Dispatches(recorder), Functions(recorder):
        train(recipe)
    assert {0, 1, 4, 8, 9} <= recorder.read.keys()  # before the first step, and at each line
    assert not {step: recorder.read[step] for step in (2, 3, 5, 6, 7) if step in recorder.read}


def test_the_training_loss_is_the_mean_since_the_last_line_also_after_a_stop(tiny_text, monkeypatch):
    """The run that is stopped after step 5 saves the losses of steps 4 and 5, whose line is due in step 6."""
    plain = ["--training.macro_batch=9", "--training.max_steps=9"]
    train(every := load_recipe(tiny_text, [*plain, "--run.name=every"]))
    train(third := load_recipe(tiny_text, [*plain, "--run.name=third", "--tracking.log_every=3"]))
    steps = losses(every.folder)
    means = [steps[0], *(statistics.fmean(steps[i:j]) for i, j in ((1, 3), (3, 6), (6, 9)))]
    assert losses(third.folder) == pytest.approx(means, abs=1e-12)
    votes = itertools.count(1)
    monkeypatch.setattr("cleangpt.training.launch.StopVote.__call__", lambda vote, wish: next(votes) == 5)
    stopped = load_recipe(tiny_text, [*plain, "--tracking.log_every=3"])
    with pytest.raises(Stopped):
        train(stopped)
    train(stopped)
    assert losses(stopped.folder) == losses(third.folder)
