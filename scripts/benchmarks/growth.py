"""How the time of a step grows with block size, width, vocabulary and the amount of data, as a picture.

Each point is the fastest of `--rounds` steps of a NanoGPT with 2 layers, all else being equal; the fitted exponent is
that of the largest four points.
"""

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate import Accelerator
from matplotlib.figure import Figure

from cleangpt import NanoGPTConfig, NanoGPTForCausalLM
from cleangpt.data.loader import Loader, Share
from cleangpt.data.packing import TextSplit
from cleangpt.recipe import schedules
from cleangpt.recipe.keys import Optimizer, Training
from cleangpt.training.optim import build_optimizers
from cleangpt.training.step import accumulate, update

from .data import write_split

USUAL = {"block_size": 128, "hidden_size": 128, "vocab_size": 256, "megatokens": 1}
AXES = {
    "block_size": (64, 128, 256, 512, 1024, 2048),
    "hidden_size": (128, 256, 512, 1024),
    "vocab_size": (65, 1024, 4096, 16384, 50257),
    "megatokens": (1, 10, 100, 1000),  # of 2 bytes each
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--picture", type=Path, default=Path("growth.png"), help="file to draw to [growth.png]")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Milliseconds a step."""
    write_stream(folder, AXES["megatokens"][0])
    figure = Figure(figsize=(11, 8), layout="constrained")
    for axes, (axis, sizes) in zip(figure.subplots(2, 2).flat, AXES.items(), strict=True):
        times = {}
        for size in sizes:
            if axis == "megatokens":
                write_stream(folder, size)
            times[f"{axis} {size:,}"] = step_times(folder, {**USUAL, axis: size}, arguments.rounds)
        fastest = [min(values) for values in times.values()]
        exponent = np.polyfit(np.log(sizes[-4:]), np.log(fastest[-4:]), 1)[0]
        axes.loglog(sizes, fastest, "o-")
        limits = (min(fastest) / 2, 2 * max(fastest))  # wide enough that noise does not look like growth
        axes.set(xlabel=axis, ylabel="ms a step", title=f"exponent {exponent:.2f}", ylim=limits)
        axes.grid(alpha=0.3, which="both")
        yield f"{axis}, fitted exponent {exponent:.2f}, ms a step", times
    figure.savefig(arguments.picture, dpi=120)


def write_stream(folder: Path, megatokens: int) -> None:
    ids = np.random.default_rng(0).integers(0, 65, megatokens * 1_000_000, np.uint16)
    write_split(folder, ids)


def step_times(folder: Path, shape: dict[str, int], rounds: int) -> list[float]:
    torch.manual_seed(0)
    accelerator, time_ = Accelerator(cpu=True), shape["block_size"]
    sizes = {key: shape[key] for key in ("hidden_size", "vocab_size")}
    config = NanoGPTConfig(num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=time_, **sizes)
    model, section = NanoGPTForCausalLM(config), Optimizer(name="adamw")
    model, *optimizers = accelerator.prepare(model, *build_optimizers(section, model))
    split = TextSplit(folder, "train", time_, "windows")
    loader = Loader(split, np.full(1000, 8), 0, Share(device=torch.device("cpu")))
    recipe = SimpleNamespace(training=Training())
    run = SimpleNamespace(recipe=recipe, accelerator=accelerator, model=model, optimizers=optimizers)
    times = []
    for step in range(1, rounds + 2):
        started = time.perf_counter()
        loss = accumulate(accelerator, model, loader.batch(step))
        update(run, schedules.Values(1e-3, 0.1, 1), loss)[0].item()
        times.append(1000 * (time.perf_counter() - started))
    return times[1:]
