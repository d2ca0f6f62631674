"""To the loss that nanoGPT's laptop command ends with on a text: whole processes, from start to exit.

`--nanogpt DIR` runs that command (4 layers, width 128, 12 x 64 characters, 2,000 steps), measures its model on the
whole validation split as ours are measured, and then trains recipes/shakespeare_cpu.yaml for `--steps` steps.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from cleangpt.data.prepare import prepare_data
from cleangpt.recipe_reading import load_recipe

from . import peers

ROOT = Path(__file__).parents[2]
# A short schedule, and one look at the validation split: the end.
RACE = ["--training.macro_batch=100000", "--checkpoint.keep_last=1", "--evaluation.prompts=[]"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--nanogpt", type=Path, required=True, help="a clone of nanoGPT")
    parser.add_argument("--text", type=Path, required=True, help="a text file, tiny Shakespeare say")
    parser.add_argument("--steps", type=int, default=300, help="of ours [300]")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of the recipe to change")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Seconds, and loss on the whole validation split."""
    path, text = str(ROOT / "recipes/shakespeare_cpu.yaml"), f"--data.data_files={arguments.text.resolve()}"
    recipe = load_recipe(path, [text])
    prepare_data(recipe)  # neither side's data are counted
    sides = {
        "nanoGPT's laptop command": lambda n: their_run(recipe, arguments.nanogpt, folder / f"nanogpt-{n}"),
        "ours": lambda n: our_run(
            path, [text, *(f"--{option}" for option in arguments.set)], arguments.steps, folder / f"ours-{n}"
        ),
    }
    seconds, losses = {name: [] for name in sides}, {name: [] for name in sides}
    for number in range(arguments.rounds):
        for name, side in sides.items():
            took, loss = side(number)
            seconds[name].append(took)
            losses[name].append(loss)
    yield "whole process, seconds", seconds
    yield "loss on the whole validation split", losses


def their_run(recipe, source: Path, folder: Path) -> tuple[float, float]:
    data = prepare_data(recipe)
    peers.copy_nanogpt(source, folder, data.splits)
    started = time.perf_counter()
    peers.run_nanogpt(
        folder,
        vocab_size=len(data.tokenizer),
        out_dir="out",
        n_layer=4,
        n_head=4,
        n_embd=128,
        block_size=64,
        batch_size=12,
        max_iters=2000,
        lr_decay_iters=2000,
        learning_rate=1e-3,
        min_lr=1e-4,
        beta2=0.99,
        warmup_iters=100,
        eval_iters=20,
        eval_interval=250,
        log_interval=1,
    )
    took = time.perf_counter() - started
    model = folder / "model"
    script = [sys.executable, "scripts/import_checkpoint.py", str(folder / "out/ckpt.pt"), str(model)]
    subprocess.run(script, cwd=ROOT, check=True, capture_output=True)
    measure_it = [sys.executable, "scripts/evaluate_model.py", str(model), "--json", "--recipe"]
    measure_it += ["recipes/shakespeare_cpu.yaml", f"--data.data_files={recipe.data.data_files}"]
    figures = subprocess.run(measure_it, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return took, json.loads(figures)["eval/loss"]


def our_run(path: str, overrides: list[str], steps: int, folder: Path) -> tuple[float, float]:
    options = [*RACE, *overrides, f"--training.max_steps={steps}", f"--run.output_dir={folder}"]
    started = time.perf_counter()
    subprocess.run([sys.executable, "train.py", path, *options], cwd=ROOT, check=True, capture_output=True)
    took = time.perf_counter() - started
    lines = [json.loads(line) for line in (folder / "shakespeare_cpu/metrics.jsonl").read_text().splitlines()]
    return took, [line["eval/loss"] for line in lines if "eval/loss" in line][-1]
