"""Runs in processes of their own that can be killed, and the comparison of what they leave.

The processes are forked from a server that has imported everything, so that one starts in a moment.
"""

import contextlib
import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["cleangpt.training.loop", "cleangpt.recipe.reading", "faults"])

TIMES = ("elapsed_s", "tokens_per_second", "mfu")


def start(target, *arguments) -> multiprocessing.Process:
    """A process that calls `target(*arguments)` and exits with what it returns."""
    process = CONTEXT.Process(target=_call, args=(target, arguments))
    process.start()
    return process


def _call(target, arguments) -> None:
    with open(os.devnull, "w") as sys.stdout, contextlib.redirect_stderr(sys.stdout):
        code = target(*arguments)
    os._exit(code or 0)


def run(recipe: str, overrides: list[str]) -> int:
    """What the command `train.py recipe overrides` does; its exit code."""
    from cleangpt import load_recipe, train
    from cleangpt.errors import exit_code

    return exit_code(lambda: train(load_recipe(recipe, overrides)))


def run_and_fail_at(recipe: str, overrides: list[str], point: int | None, counted: Path | None = None) -> int:
    """`run`, killed at the `point`-th of the moments before and after each write, flush, rename and delete.

    Args:
        point: from 0; None counts the moments and writes their number to `counted`.
    """
    passed = 0

    def moment() -> None:
        nonlocal passed
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)
        passed += 1

    def around(owner, name: str) -> None:
        inner = getattr(owner, name)

        def outer(*arguments, **options):
            moment()
            result = inner(*arguments, **options)
            moment()
            return result

        setattr(owner, name, outer)

    import cleangpt.files
    import cleangpt.training.checkpoint

    for owner, names in (
        (cleangpt.files.os, ("fsync", "rename", "replace")),
        (cleangpt.files.shutil, ("rmtree",)),
        (cleangpt.files.Path, ("write_text", "unlink", "mkdir")),
        (cleangpt.training.checkpoint, ("save_file",)),
    ):
        for name in names:
            around(owner, name)
    code = run(recipe, overrides)
    if counted is not None:
        counted.write_bytes(str(passed).encode())
    return code


def left_behind(folder: Path) -> dict:
    """What must be the same whatever happened to a run: weights, optimizer, state, metrics; and no leftovers.

    Of the checkpoints only the newest: a signal makes one where none would have been.
    """
    older = sorted(folder.glob("checkpoints/step-*"))[:-1]
    paths = [path for path in sorted(folder.rglob("*")) if not any(path.is_relative_to(other) for other in older)]
    exact = {str(path.relative_to(folder)): path.read_bytes() for path in paths if path.suffix == ".safetensors"}
    state = [_without_times(json.loads(path.read_text())) for path in paths if path.name == "state.json"]
    lines = [_without_times(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"weights": exact, "state": state, "metrics": lines, "names": [str(p.relative_to(folder)) for p in paths]}


def _without_times(values: dict) -> dict:
    return {key: value for key, value in values.items() if key not in TIMES}
