"""To the loss that nanoGPT ends with: whole processes, from start to exit, round n with seed n on each side.

nanoGPT runs the command that its README gives for a laptop (4 layers, width 128, 12 x 64 characters, 2,000 steps), or
with the data, shape and batch of another `--recipe`, and its model is measured on the whole validation split as ours
are. Ours is the recipe of `--entry`.
"""

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from cleangpt.models.build import load_model
from cleangpt.recipe.reading import load_recipe
from cleangpt.training.setup import load_data

from . import peers

ROOT = Path(__file__).parents[2]
# One look at the validation split, at the end.
RACE = ["training.macro_batch=100000", "evaluation.prompts=[]", "tracking.log_every=20"]
SMOOTHED = 20  # steps of nanoGPT to a point of its curve, as many as to one of ours

Curve = list[tuple[float, float]]  # seconds since the process began, training loss


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    laptop, entry = "recipes/shakespeare_cpu.yaml", "recipes/shakespeare_race.yaml"
    parser.add_argument("--recipe", default=laptop, help=f"of nanoGPT's data, shape and batch [{laptop}]")
    parser.add_argument("--entry", default=entry, help=f"our recipe, of the same data [{entry}]")
    parser.add_argument("--their_steps", type=int, default=2000, help="of nanoGPT's [2000]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe, for both sides")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe, for ours")
    parser.add_argument("--picture", type=Path, help="file to draw the first round to, loss over seconds")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Seconds, loss on the whole validation split, and parameters."""
    shared = [f"--{option}" for option in arguments.set]
    own = [*shared, *(f"--{option}" for option in [*RACE, *arguments.ours])]
    for recipe in (arguments.recipe, arguments.entry):
        load_data(load_recipe(recipe, shared))  # neither side's data are counted
    sides = {
        "nanoGPT": lambda n: their_run(arguments, shared, folder / f"nanogpt-{n}", n),
        "ours": lambda n: our_run(arguments.entry, own, folder / f"ours-{n}", n),
    }
    took, figures, curves = {name: [] for name in sides}, {name: [] for name in sides}, {}
    for number in range(1, arguments.rounds + 1):
        for name, side in sides.items():
            seconds, found, curve = side(number)
            took[name].append(seconds)
            figures[name].append(found)
            curves.setdefault(name, curve)
    if arguments.picture:
        ends = {name: (took[name][0], figures[name][0]["eval/loss"]) for name in sides}
        draw_race(curves, ends, arguments.picture)
    yield "whole process, seconds", took
    for key in ("eval/loss", "eval/bits_per_byte", "parameters"):
        yield key, {name: [f[key] for f in found] for name, found in figures.items()}


def draw_race(curves: dict[str, Curve], ends: dict[str, tuple[float, float]], path: Path) -> None:
    """Draws the training loss of each side, and where its process ended: a star at its loss on the validation split."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, curve), end in zip(curves.items(), ends.values(), strict=True):
        (line,) = axes.plot(*zip(*curve, strict=True), label=f"{name}: {end[1]:.2f} after {end[0]:.0f} s")
        axes.plot(*end, "*", color=line.get_color(), markersize=14, clip_on=False, zorder=3)
    axes.set(xlabel="seconds since the process began", ylabel="loss, nats per token", xlim=(0, None))
    axes.legend(title="★ whole validation split", frameon=False)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=100)


def their_run(
    arguments: argparse.Namespace, shared: list[str], folder: Path, seed: int
) -> tuple[float, dict[str, float], Curve]:
    """Seconds, figures and curve of nanoGPT, with its laptop command's settings but the recipe's shape and batch."""
    recipe = load_recipe(arguments.recipe, shared)
    data = load_data(recipe)[1]
    peers.copy_nanogpt(arguments.nanogpt, folder, data.splits, seed)
    started = time.perf_counter()
    printed = peers.run_nanogpt(
        folder,
        vocab_size=len(data.tokenizer),
        out_dir="out",
        n_layer=recipe.model["num_hidden_layers"],
        n_head=recipe.model["num_attention_heads"],
        n_embd=recipe.model["hidden_size"],
        block_size=recipe.data.block_size,
        batch_size=recipe.training.batch_size,
        max_iters=arguments.their_steps,
        lr_decay_iters=arguments.their_steps,
        learning_rate=1e-3,
        min_lr=1e-4,
        beta2=0.99,
        warmup_iters=100,
        always_save_checkpoint=False,
        eval_iters=20,
        eval_interval=250,
        log_interval=1,
    )
    took = time.perf_counter() - started
    last = folder / "model"
    convert = ["scripts/import_checkpoint.py", str(folder / "out/ckpt.pt"), str(last)]
    subprocess.run([sys.executable, *convert], cwd=ROOT, check=True, capture_output=True)
    evaluate = ["scripts/evaluate_model.py", str(last), "--recipe", arguments.recipe, "--json", *shared]
    done = subprocess.run([sys.executable, *evaluate], cwd=ROOT, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout) | {"parameters": load_model(last).num_parameters()}
    return took, found, their_curve(printed, took)


def their_curve(printed: str, took: float) -> Curve:
    """The mean of every `SMOOTHED` losses that nanoGPT printed; time outside the steps is taken for its start."""
    steps = re.findall(r"^iter \d+: loss ([\d.]+), time ([\d.]+)ms", printed, re.MULTILINE)
    losses, milliseconds = np.array(steps, float).T
    elapsed, ends = milliseconds.cumsum() / 1000, np.arange(SMOOTHED, len(steps) + 1, SMOOTHED)
    means = losses[: ends[-1]].reshape(-1, SMOOTHED).mean(axis=1)
    return [*zip(took - elapsed[-1] + elapsed[ends - 1], means, strict=True)]


def our_run(recipe: str, options: list[str], folder: Path, seed: int) -> tuple[float, dict[str, float], Curve]:
    """Seconds, figures and curve of ours."""
    place = [f"--run.output_dir={folder}", "--run.name=ours", f"--run.seed={seed}"]
    command = [sys.executable, "train.py", recipe, *options, *place]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    took = time.perf_counter() - started
    lines = [json.loads(line) for line in (folder / "ours/metrics.jsonl").read_text().splitlines()]
    steps, outside = [line for line in lines if "train/loss" in line], took - lines[-1]["elapsed_s"]
    curve = [(outside + line["elapsed_s"], line["train/loss"]) for line in steps[1:]]
    found = next(line for line in reversed(lines) if "eval/loss" in line)
    return took, {**found, "parameters": load_model(folder / "ours/final").num_parameters()}, curve
