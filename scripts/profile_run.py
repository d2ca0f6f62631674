"""Says where the time of a step goes, and writes a trace of it.

    python scripts/profile_run.py recipes/shakespeare_cpu.yaml [--section.key=value ...]

Trains ten steps in a temporary folder and profiles the last six, without compilation. The trace opens in
<https://ui.perfetto.dev>.
"""

import argparse
import contextlib
import io
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch.autograd.profiler_util import FunctionEvent
from transformers import PreTrainedModel

from cleangpt import UserError
from cleangpt.errors import exit_code
from cleangpt.hardware import default_device
from cleangpt.recipe.keys import Recipe
from cleangpt.recipe.reading import load_recipe
from cleangpt.training import loop, step
from cleangpt.training.launch import join_processes
from cleangpt.training.run_folder import Start
from cleangpt.training.setup import build_run, resolve
from cleangpt.training.signals import StopSignals

FIRST, LAST = 5, 10  # the steps profiled; the first ones allocate memory and choose kernels
PARTS = ("attention", "MLP", "embeddings and norms", "head and loss", "optimizer", "data", "loop")


class Finished(Exception):
    """Ends the run after the last step."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("recipe", help="the recipe's file; --section.key=value changes it")
    parser.add_argument("--trace", type=Path, help="the trace's file [NAME-trace.json beside the run's folder]")
    arguments, overrides = parser.parse_known_args()
    recipe = load_recipe(arguments.recipe, overrides)
    trace = arguments.trace or recipe.folder.with_name(f"{recipe.run.name}-trace.json")
    try:
        trace.parent.mkdir(parents=True, exist_ok=True)
        trace.touch()
    except OSError as error:
        raise UserError(("--trace", f"{trace} cannot be written: {error.strerror}")) from error
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would announce itself
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        seconds, profiler = profile_steps(recipe, folder)
    profiler.export_chrome_trace(str(trace))
    report(times(profiler.events(), seconds), trace)


def profile_steps(recipe: Recipe, folder: str) -> tuple[float, torch.profiler.profile]:
    """Trains in `folder`; the seconds of the profiled steps, and their profile, with a range around each of `PARTS`."""
    trial = {"run": {"output_dir": folder, "seeds": None}, "tracking": {"trackers": ()}, "hub": {"push": False}}
    training = {"compile": False, "macro_batch": LAST + 2, "resume": "auto"}
    recipe = recipe.changed(**trial, training=training, evaluation={"at_start": False})
    join_processes()
    recipe, data = resolve(recipe)
    steps = max(recipe.training.max_steps or 0, LAST + 1)
    run = build_run(recipe.changed(training={"max_steps": steps}), data, Start())
    profiler, since = torch.profiler.profile(), [0.0]
    batch = labelled("data", run.loader.batch)

    def next_batch(number: int) -> Any:
        if number == FIRST:
            profiler.start()
            since[0] = time.perf_counter()
        if number == LAST + 1:
            if run.accelerator.device.type != "cpu":
                torch.accelerator.synchronize()
            since.append(time.perf_counter())
            profiler.stop()
            raise Finished
        return batch(number)

    run.loader.batch = next_batch
    label(run.network)
    update, sum_nats = labelled("optimizer", step.update), labelled("head and loss", step.sum_nats)
    patched = patch.multiple(loop, update=update), patch.multiple(step, sum_nats=sum_nats)
    with patched[0], patched[1], contextlib.suppress(Finished):
        loop.run_steps(run, StopSignals())
    run.tracker.close()
    return since[1] - since[0], profiler


def label(network: PreTrainedModel) -> None:
    """Puts ranges around the parts of a model."""
    network.base_model.forward = labelled("embeddings and norms", network.base_model.forward)
    for name, module in network.named_modules():
        part = name.rsplit(".")[-1]
        if "attn" in part or "attention" in part:
            module.forward = labelled("attention", module.forward)
        elif "mlp" in part or "feed_forward" in part:
            module.forward = labelled("MLP", module.forward)


def labelled(name: str, function: Callable) -> Callable:
    """`function` inside a range of the profile."""

    def call(*arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(name):
            return function(*arguments, **options)

    return call


def times(events: Iterable[FunctionEvent], seconds: float) -> dict[str, float]:
    """Seconds of each of `PARTS`, forward and backward: of the device where there is one, else of the CPU.

    A backward operation belongs to the part of the forward operation that has its sequence number.
    """
    events = sorted(
        (event for event in events if event.device_type.name == "CPU"), key=lambda one: one.time_range.start
    )
    made: dict[int, str] = {}  # the part in which a node of the autograd graph was made
    found, on_device = dict.fromkeys(PARTS, 0.0), default_device().type != "cpu"
    for event in events:
        part, above = "loop", event
        while above is not None and above.name not in PARTS:
            if above.name.startswith("autograd::engine::evaluate_function"):
                part = made.get(above.sequence_nr, "loop")
                break
            above = above.cpu_parent
        else:
            part = above.name if above is not None else "loop"
            if event.sequence_nr >= 0:
                made[event.sequence_nr] = part
        found[part] += (event.self_device_time_total if on_device else event.self_cpu_time_total) / 1e6
    found["loop"] += seconds - sum(found.values())
    return found


def report(found: dict[str, float], trace: Path) -> None:
    """Prints the table."""
    total, steps = sum(found.values()), LAST - FIRST + 1
    print(f"{f'steps {FIRST} to {LAST}':22} {'ms a step':>10} {'share':>6}")
    for name, seconds in found.items():
        print(f"{name:22} {1000 * seconds / steps:10.2f} {seconds / total:6.0%}")
    print(f"{'all':22} {1000 * total / steps:10.2f}\ntrace: {trace}, for https://ui.perfetto.dev")


if __name__ == "__main__":
    sys.exit(exit_code(main))
