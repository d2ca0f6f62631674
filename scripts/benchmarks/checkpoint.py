"""How long a checkpoint keeps training waiting, beside one plain `safetensors` save of the same tensors."""

import argparse
import functools
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

from cleangpt.recipe import schedules
from cleangpt.training.boundary import save
from cleangpt.training.run_folder import Start
from cleangpt.training.setup import build_run, resolve
from cleangpt.training.step import accumulate, update

from . import train

STEPS = 10  # in which the background writes what it was given; a save of this size is over before


def add_arguments(parser: argparse.ArgumentParser) -> None:
    train.add_arguments(parser)
    parser.set_defaults(shape="baby")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    arguments.steps = 10_000
    run = build_run(*resolve(train.make_recipe(arguments, folder)), Start())
    some_steps(run)
    figures = {"safetensors save_file": [], "seconds more for the steps around a checkpoint": [], "its call alone": []}
    for number in range(arguments.rounds):
        plain = seconds(lambda: some_steps(run))
        tensors = {name: weight.detach() for name, weight in run.model.named_parameters()}
        for name, weight in run.model.named_parameters():
            state = run.optimizers[0].state[weight]
            tensors |= {f"{name}/{entry}": value for entry, value in state.items() if torch.is_tensor(value)}
        figures["safetensors save_file"].append(
            seconds(functools.partial(save_file, tensors, folder / "plain.safetensors"))
        )
        run.progress.step = number + 1
        call = seconds(lambda: save(run, None, checkpoint=True))
        around = call + seconds(lambda: some_steps(run))
        run.saver.wait()
        again = seconds(lambda: some_steps(run))
        figures["seconds more for the steps around a checkpoint"].append(max(1e-9, around - (plain + again) / 2))
        figures["its call alone"].append(call)
    yield f"{run.model.num_parameters():,} parameters, seconds", figures


def some_steps(run) -> None:
    values = schedules.at(run.recipe.schedule, run.recipe.optimizer, 5000, run.max_steps)
    for step in range(1, STEPS + 1):
        loss = accumulate(run.accelerator, run.model, run.loader.batch(step))
        update(run, values, loss)


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
