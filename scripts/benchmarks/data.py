"""Building a dataset beside the bare tokenizer, the loader beside one that slices rows, memory, and a warm start."""

import argparse
import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch

from cleangpt.data.arithmetic import ArithmeticSplit
from cleangpt.data.encoding import build_text, describe_split, to_table, write_tables
from cleangpt.data.loader import Loader, Share
from cleangpt.data.packing import TextSplit
from cleangpt.data.tokenization import arithmetic_tokenizer, bpe_tokenizer, character_tokenizer
from cleangpt.recipe import schedules
from cleangpt.recipe.keys import Data, Recipe
from cleangpt.recipe.reading import parse_recipe
from cleangpt.training.run_folder import Start
from cleangpt.training.setup import build_run, load_data, resolve
from cleangpt.training.step import accumulate, update

from . import train as train_benchmark

ROWS = ((64, 256), (32, 1024))  # sequences and tokens of a batch
PROBLEMS = 10_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--text", type=Path, required=True, help="a text file, repeated to the sizes that are needed")
    parser.add_argument("--megabytes", type=int, default=10, help="of text to tokenize in each round [10]")
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=[10, 200], help="megabytes to compare memory at [10 200]"
    )


def measure(arguments: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    text = repeat(arguments.text, arguments.megabytes, folder / "text.txt")
    yield from measure_building(text, arguments.rounds, folder)
    yield from measure_loader(arguments.rounds, folder)
    yield from measure_share(arguments.rounds, folder)
    yield "ten million addition problems, seconds", {"computed in batches of 10,000": [compute_problems()]}
    peaks, starts = {}, {}
    for size in arguments.sizes:
        file = repeat(arguments.text, size, folder / f"{size}.txt")
        peaks[f"build and train, {size} MB of text"] = [peak_memory(file, folder / f"cache-{size}")]
        starts[f"{size} MB of text"] = [warm_start(file, folder / f"cache-{size}")]
        file.unlink()
    yield "resident memory at its peak, MB", peaks
    yield "data work of a run with a warm cache, seconds", starts


def repeat(text: Path, megabytes: int, out: Path) -> Path:
    """A file of so many megabytes: random passages of `text`, each its own, so that it compresses no better."""
    lines, draw, size = text.read_text().splitlines(keepends=True), np.random.default_rng(0), 0
    with open(out, "w") as file:
        while size < megabytes * 1_000_000:
            first = draw.integers(max(1, len(lines) - 400))
            size += file.write("".join(lines[first : first + 400]))
    return out


def in_turn(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """The figures of each side, which take turns."""
    figures = {name: [] for name in sides}
    for _ in range(rounds):
        for name, side in sides.items():
            figures[name].append(side())
    return figures


def seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def measure_building(text: Path, rounds: int, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """MB of text a second: from the file to packed Arrow, and `encode_batch` on the same lines in memory."""
    content = text.read_text()
    lines = content.splitlines(keepends=True)
    section = Data(path="text", data_files=str(text))
    tokenizers = {"BPE": bpe_tokenizer([content[:2_000_000]], 4096), "characters": character_tokenizer(content)}
    for name, tokenizer in tokenizers.items():
        encode = functools.partial(tokenizer.backend_tokenizer.encode_batch, lines, add_special_tokens=False)

        def build(section=section, tokenizer=tokenizer) -> None:
            os.environ["HF_DATASETS_CACHE"] = str(folder / f"cache-{time.perf_counter_ns()}")
            build_text(section, tokenizer)

        several = functools.partial(build, section.model_copy(update={"num_proc": 2}))
        sides = {"encode_batch": encode, "ours, packed on disk": build, "ours, num_proc 2": several}
        speeds = {side: lambda work=work: text.stat().st_size / 1e6 / seconds(work) for side, work in sides.items()}
        yield f"tokenize, {name}, MB of text a second", in_turn(speeds, rounds)


def write_split(folder: Path, ids: np.ndarray, length: int = 200) -> None:
    """A train split of documents of `length` tokens, as `build_text` leaves it."""
    parts = (ids[i : i + 2500 * length] for i in range(0, len(ids), 2500 * length))
    write_tables(
        (to_table(np.split(part, range(length, len(part), length))) for part in parts), folder / "train/data.arrow"
    )
    counts = {"tokens": describe_split(folder / "train", "train"), "documents": -(-len(ids) // length), "bytes": 1}
    (folder / "summary.json").write_text(json.dumps({"train": counts}))


def measure_loader(rounds: int, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Million tokens a second."""
    ids = np.random.default_rng(0).integers(0, 5000, 50_000_000).astype(np.uint16)
    ids.tofile(folder / "train.bin")
    write_split(folder, ids)
    for rows, time_ in ROWS:

        def sliced(rows=rows, time_=time_) -> None:
            """As nanoGPT's get_batch: a new memory map, then two slices for each row."""
            tokens = np.memmap(folder / "train.bin", np.uint16, "r")
            starts = torch.randint(len(tokens) - time_, (rows,))
            for shift in (0, 1):
                torch.stack([torch.from_numpy(tokens[i + shift : i + shift + time_].astype(np.int64)) for i in starts])

        sides = {"a slice a row": lambda sliced=sliced, n=rows * time_: rate(n, lambda step: sliced())}
        for packing in ("windows", "blocks", "documents"):
            split = TextSplit(folder, "train", time_, packing)
            loader = Loader(split, np.full(200, rows), 0, Share(device=torch.device("cpu")))
            sides[f"ours, {packing}"] = lambda batch=loader.batch, n=rows * time_: rate(n, batch)
        yield f"load {rows} x {time_}, million tokens a second", in_turn(sides, rounds)


def rate(tokens: int, batch: Callable[[int], object]) -> float:
    return tokens * 200 / 1e6 / seconds(lambda: [batch(step) for step in range(1, 201)])


def measure_share(rounds: int, folder: Path) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Milliseconds of a batch, and of all the rest of a step."""
    for shape in train_benchmark.SHAPES:
        options = argparse.Namespace(shape=shape, model_type="nanogpt", mixed_precision="no", steps=10_000)
        run = build_run(*resolve(train_benchmark.make_recipe(options, folder / shape)), Start())
        batches = iter(range(1, 10_000))

        def step(run=run, batches=batches) -> None:
            loss = accumulate(run.accelerator, run.model, run.loader.batch(next(batches)))
            update(run, schedules.Values(1e-3, 0.1, 1), loss)[0].item()

        def batch(run=run, batches=batches) -> None:
            run.loader.batch(next(batches))

        sides = {"a step": step, "its batch": batch}
        times = {
            name: lambda work=work: 100 * seconds(lambda: [work() for _ in range(10)]) for name, work in sides.items()
        }
        yield f"{shape}, ms", in_turn(times, rounds)


def compute_problems() -> float:
    split = ArithmeticSplit(Data(path="addition", num_digits=6), "train", 0, arithmetic_tokenizer())
    return seconds(lambda: [split[np.arange(i, i + 10_000)] for i in range(0, PROBLEMS, 10_000)])


def make_recipe(text: Path, folder: Path) -> Recipe:
    return parse_recipe(
        {
            "run": {"output_dir": str(folder), "overwrite": True},
            "data": {"path": "text", "data_files": str(text), "block_size": 256},
            "tokenizer": {"train": {"kind": "bpe", "vocab_size": 4096}},
            "model": {"model_type": "nanogpt", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
            "training": {"max_steps": 200, "batch_size": 16, "macro_batch": 200},
            "evaluation": {"batch_size": 8, "max_batches": 20},
            "checkpoint": {"keep_last": 1},
        },
        "memory",
    )


def peak_memory(text: Path, cache: Path) -> float:
    """Of a process of its own that builds and trains, file pages mapped included."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    command = [sys.executable, "-m", "benchmarks.data", str(text), str(cache / "outputs")]
    return float(
        subprocess.run(
            command, cwd=Path(__file__).parent.parent, env=environment, check=True, stdout=subprocess.PIPE, text=True
        ).stdout.split()[-1]
    )


def warm_start(text: Path, cache: Path) -> float:
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    return seconds(lambda: load_data(make_recipe(text, cache)))


if __name__ == "__main__":
    from cleangpt import train

    train(make_recipe(Path(sys.argv[1]), Path(sys.argv[2])))
    print(train_benchmark.resident("VmHWM"))  # `getrusage` counts what the parent had when it forked
