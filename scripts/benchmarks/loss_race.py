"""To the loss that nanoGPT ends with: whole processes, from start to exit.

By default nanoGPT runs the command that its README gives for a laptop (4 layers, width 128, 12 x 64 characters, 2,000
steps), its model is measured on the whole validation split as ours are, and ours is recipes/shakespeare_cpu.yaml in
fewer steps. Another recipe gives nanoGPT its data and its shape too.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cleangpt.recipe.reading import load_recipe
from cleangpt.training.setup import load_data

from . import peers

ROOT = Path(__file__).parents[2]
# One look at the validation split, at the end.
RACE = ["training.macro_batch=100000", "evaluation.prompts=[]", "checkpoint.keep_last=1", "tracking.log_every=50"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--recipe", default="recipes/shakespeare_cpu.yaml", help="[recipes/shakespeare_cpu.yaml]")
    parser.add_argument("--steps", type=int, default=300, help="of ours [300]")
    parser.add_argument("--their_steps", type=int, default=2000, help="of nanoGPT's [2000]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe, for both sides")
    parser.add_argument("--ours", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe, for ours")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Seconds, and loss on the whole validation split."""
    shared = [f"--{option}" for option in arguments.set]
    own = [*shared, *(f"--{option}" for option in [*RACE, *arguments.ours]), f"--training.max_steps={arguments.steps}"]
    load_data(load_recipe(arguments.recipe, shared))  # neither side's data are counted
    sides = {
        "nanoGPT": lambda n: their_run(arguments, shared, folder / f"nanogpt-{n}"),
        "ours": lambda n: our_run(arguments.recipe, own, folder / f"ours-{n}"),
    }
    took, figures = {name: [] for name in sides}, {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name, side in sides.items():
            seconds, found = side(number)
            took[name].append(seconds)
            figures[name].append(found)
    yield "whole process, seconds", took
    for key in ("eval/loss", "eval/bits_per_byte"):
        yield f"{key}, whole validation split", {name: [f[key] for f in found] for name, found in figures.items()}


def their_run(arguments: argparse.Namespace, shared: list[str], folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds and figures of nanoGPT, with the settings of its laptop command but for the recipe's shape and batch."""
    recipe = load_recipe(arguments.recipe, shared)
    data = load_data(recipe)[1]
    peers.copy_nanogpt(arguments.nanogpt, folder, data.splits)
    started = time.perf_counter()
    peers.run_nanogpt(
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
    found = subprocess.run([sys.executable, *evaluate], cwd=ROOT, check=True, capture_output=True, text=True)
    return took, json.loads(found.stdout)


def our_run(recipe: str, options: list[str], folder: Path) -> tuple[float, dict[str, float]]:
    """Seconds and figures of ours."""
    command = [sys.executable, "train.py", recipe, *options, f"--run.output_dir={folder}", "--run.name=ours"]
    started = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    took = time.perf_counter() - started
    lines = [json.loads(line) for line in (folder / "ours/metrics.jsonl").read_text().splitlines()]
    return took, next(line for line in reversed(lines) if "eval/loss" in line)
