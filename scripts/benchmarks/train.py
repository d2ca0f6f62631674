"""The loop of `train.py` beside a bare PyTorch loop around the same model and batches."""

import argparse
import contextlib
import io
import json
import random
import string
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.nn import functional as F

from cleangpt import train
from cleangpt.models.build import build_model
from cleangpt.optim import build_optimizers
from cleangpt.outputs import Start
from cleangpt.recipe import Recipe
from cleangpt.recipe_reading import parse_recipe
from cleangpt.run import build_run

# Shapes that nanoGPT's README names: its laptop command and its "baby GPT" (with a batch that a laptop bears).
SHAPES = {
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "block_size": 64, "batch_size": 12},
    "baby": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "block_size": 256, "batch_size": 16},
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of model and batch [small]")
    parser.add_argument("--model_type", choices=["nanogpt", "nanollama"], default="nanogpt")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--steps", type=int, default=100, help="of each run [100]")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Milliseconds a step of each side, one figure a round."""
    sides = {"bare PyTorch loop": bare_loop, "ours": our_loop}
    figures = {name: [] for name in sides}
    recipe = make_recipe(arguments, folder)
    for number in range(arguments.rounds):
        for name, side in sides.items():
            recipe.run.name = f"{side.__name__}-{number}"
            with contextlib.redirect_stdout(io.StringIO()):
                figures[name].append(side(recipe))
    yield f"{arguments.shape} {arguments.model_type}, ms a step", figures


def make_recipe(arguments: argparse.Namespace, folder: Path) -> Recipe:
    """A run on random characters with a boundary at its very end only."""
    shape = dict(SHAPES[arguments.shape])
    folder.mkdir(exist_ok=True)
    text = folder / "random.txt"
    text.write_text("".join(random.Random(0).choices(string.ascii_letters + string.digits + " \n", k=300_000)))
    values = {
        "run": {"output_dir": str(folder)},
        "data": {"path": "text", "data_files": str(text), "block_size": shape.pop("block_size")},
        "tokenizer": {"train": {"kind": "char"}},
        "training": {
            "max_steps": arguments.steps,
            "macro_batch": arguments.steps,
            "batch_size": shape.pop("batch_size"),
            "mixed_precision": arguments.mixed_precision,
        },
        "evaluation": {"max_batches": 1},
        "tracking": {"log_every": arguments.steps},
        "model": {"model_type": arguments.model_type, **shape},
    }
    return parse_recipe(values, "benchmark")


def our_loop(recipe: Recipe) -> float:
    """Milliseconds a step of `train`, as its metrics say."""
    train(recipe)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    speed = next(line["tokens_per_second"] for line in reversed(lines) if "tokens_per_second" in line)
    return 1000 * recipe.training.batch_size * recipe.data.block_size / speed


def bare_loop(recipe: Recipe) -> float:
    """Milliseconds a step of the shortest loop that does the same work on batches that are there already."""
    run = build_run(recipe, Start(None, False))
    model = build_model(recipe.model, run.data.tokenizer, run.data.splits["train"], recipe.run.seed).train()
    (optimizer,) = build_optimizers(recipe.optimizer, model)
    batches = [run.loader.batch(step).micro_batches[0] for step in range(1, recipe.training.max_steps + 1)]
    half = recipe.training.mixed_precision == "bf16"
    for step, batch in enumerate(batches):
        if step == 1:
            started = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            logits = model(batch["input_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    return 1000 * (time.perf_counter() - started) / (len(batches) - 1)
