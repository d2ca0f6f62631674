"""The loop of `train.py` beside a bare PyTorch loop, transformers' Trainer, and nanoGPT's `train.py` (`--nanogpt DIR`).

All train the same shape on the same text with batches of the same size in one precision; nanoGPT has its own.
"""

import argparse
import contextlib
import io
import json
import random
import string
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
from torch.nn import functional as F

from cleangpt import train
from cleangpt.hardware import peak_flops
from cleangpt.models.build import build_model
from cleangpt.models.statistics import flops_per_token
from cleangpt.recipe.keys import Recipe
from cleangpt.recipe.reading import parse_recipe
from cleangpt.training.optim import build_optimizers
from cleangpt.training.run_folder import Start
from cleangpt.training.setup import build_run, load_data, resolve

from . import peers

# Shapes that nanoGPT's README names: its laptop command and its "baby GPT" (with a batch that a laptop bears); and one
# whose vocabulary is large.
SHAPES = {
    "small": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4, "block_size": 64, "batch_size": 12},
    "baby": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 6, "block_size": 256, "batch_size": 16},
    "words": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "block_size": 512,
        "batch_size": 8,
        "vocab_size": 32_000,
    },
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="small", help="of model and batch [small]")
    parser.add_argument("--model_type", choices=["nanogpt", "nanollama"], default="nanogpt")
    parser.add_argument("--mixed_precision", choices=["no", "bf16"], default="no")
    parser.add_argument("--compile", action="store_true", help="compile our blocks; its time is not counted")
    parser.add_argument("--steps", type=int, default=100, help="of each run [100]")
    parser.add_argument("--nanogpt", type=Path, help="a clone of nanoGPT, to measure beside")


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Milliseconds a step of each side, one figure a round; then the share of what the machine can do."""
    sides = {"bare PyTorch loop": bare_loop, "ours": our_loop, "transformers' Trainer": peers.trainer}
    if arguments.nanogpt and arguments.model_type == "nanogpt":
        sides["nanoGPT's train.py, float32 on a CPU"] = lambda recipe: peers.nanogpt(recipe, arguments.nanogpt)
    figures, peak = {name: [] for name in sides}, []
    recipe = make_recipe(arguments, folder)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    dtype = torch.bfloat16 if arguments.mixed_precision == "bf16" else torch.float32
    for number in range(arguments.rounds):
        for name, side in sides.items():
            named = recipe.changed(run={"name": f"{list(sides).index(name)}-{number}"})
            with contextlib.redirect_stdout(io.StringIO()):
                figures[name].append(side(named))
        peak_flops.cache_clear()
        peak.append(peak_flops(device, dtype, torch.get_num_threads()))
    yield f"{arguments.shape} {arguments.model_type} {arguments.mixed_precision}, ms a step", figures
    flops = flops_per_token(a_model(recipe)) * recipe.training.batch_size * recipe.data.block_size
    shares = {
        name: [100 * flops / (ms / 1000 * best) for ms, best in zip(times, peak, strict=True)]
        for name, times in figures.items()
    }
    yield f"share of the measured peak of {dtype}, %", shares
    yield "the peak, GFLOP/s", {str(dtype): [best / 1e9 for best in peak]}
    if device.type == "cpu":
        grown = {}
        for name, side in sides.items():
            if name in ("ours", "transformers' Trainer"):
                named = recipe.changed(run={"name": f"{list(sides).index(name)}-memory"})
                with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                    grown[name] = [pool.submit(memory, side, named).result()]
        yield "resident memory at its peak, MB more than before training", grown


def memory(side: Callable[[Recipe], float], recipe: Recipe) -> float:
    """Megabytes that training adds at most to a process, counted from when its data are there."""
    torch.randn(64, 64) @ torch.randn(64, 64)
    load_data(recipe)
    before = resident("VmRSS")
    with contextlib.redirect_stdout(io.StringIO()):
        side(recipe)
    return resident("VmHWM") - before


def resident(key: str) -> float:
    """Megabytes of this process: `VmRSS` now, `VmHWM` at its peak."""
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) / 1024


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
            "compile": getattr(arguments, "compile", False),
        },
        "evaluation": {"max_batches": 1},
        "tracking": {"log_every": arguments.steps},
        "model": {"model_type": arguments.model_type, **shape},
    }
    if arguments.model_type == "nanogpt":
        values["model"]["bias"] = False  # as nanoGPT's
    return parse_recipe(values, "benchmark")


def a_model(recipe: Recipe):
    """The recipe's model."""
    recipe, data = load_data(recipe)
    return build_model(recipe.model, data.tokenizer, data.splits["train"], recipe.run.seed)


def our_loop(recipe: Recipe) -> float:
    """Milliseconds a step of `train`, as its metrics say."""
    train(recipe)
    lines = [json.loads(line) for line in (recipe.folder / "metrics.jsonl").read_text().splitlines()]
    speed = next(line["tokens_per_second"] for line in reversed(lines) if "tokens_per_second" in line)
    return 1000 * recipe.training.batch_size * recipe.data.block_size / speed


def bare_loop(recipe: Recipe) -> float:
    """Milliseconds a step of the shortest loop that does the same work on batches that are there already."""
    run = build_run(*resolve(recipe), Start())
    model = a_model(recipe).to(run.accelerator.device).train()
    (optimizer,) = build_optimizers(recipe.optimizer, model)
    batches = [run.loader.batch(step).micro_batches[0] for step in range(1, recipe.training.max_steps + 1)]
    half, device = recipe.training.mixed_precision == "bf16", run.accelerator.device
    for step, batch in enumerate(batches):
        if step == 1:
            started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits = model(batch["input_ids"], use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch["targets"].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
    loss.item()
    return 1000 * (time.perf_counter() - started) / (len(batches) - 1)
