"""The run's folder: whose it is, and from where a run in it goes on."""

import contextlib
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import yaml
from filelock import FileLock, Timeout

from .checkpoint import list_checkpoints, newest_checkpoint
from .errors import UserError
from .files import is_whole, remove_at_once, write_file
from .schedules import is_flat

MAY_CHANGE = ("run.name", "run.output_dir", "run.overwrite", "training.resume", "training.micro_batch_size")
MAY_CHANGE_SECTIONS = ("tracking.", "hub.", "evaluation.")


@dataclass
class Start:
    """Where a run starts."""

    checkpoint: Path | None
    """The checkpoint to go on from; None for a new run."""
    finished: bool
    """Whether there is nothing left to do."""


@contextlib.contextmanager
def hold_folder(recipe) -> Iterator[None]:
    """Keeps the run's folder from other runs on this machine; the main process does it for all.

    The lock is the system's and ends with the process, however it ends.

    Raises:
        UserError: when another run has it, or its place cannot be written to.
    """
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    folder = recipe.folder
    makes_parent = not folder.parent.exists()
    lock, owner = folder.with_name(f".{folder.name}.lock"), folder.with_name(f".{folder.name}.owner")
    held = FileLock(lock, blocking=False)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        held.acquire()
        owner.write_text(f"process {os.getpid()} on {platform.node()} since {datetime.now():%Y-%m-%d %H:%M:%S}")
    except Timeout as error:
        who = owner.read_text() if owner.is_file() else "another run"
        message = f"{folder} is being trained by {who}; choose another run.name or stop it"
        raise UserError(("run.name", message)) from error
    except OSError as error:
        raise UserError(("run.output_dir", f"{folder.parent} cannot be written to: {error.strerror}")) from error
    try:
        yield
    finally:
        owner.unlink(missing_ok=True)
        lock.unlink(missing_ok=True)  # whoever waits for it sees that it is gone
        held.release()
        if makes_parent:
            with contextlib.suppress(OSError):
                folder.parent.rmdir()  # where it is empty: a run that was refused leaves nothing


def find_start(recipe) -> Start:
    """Where the run of `recipe` starts, without changing anything on disk.

    Raises:
        UserError: when the folder is not this recipe's, is no run's folder, or `training.resume` forbids to go on.
    """
    folder, resume = recipe.folder, recipe.training.resume
    _require_own(folder)
    if recipe.run.overwrite:
        return Start(None, False)
    holds_run = _holds_files(folder)
    if holds_run:
        refuse_changes(folder / "recipe.yaml", recipe)
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        if not is_whole(checkpoint):
            raise UserError(("training.resume", f"expected auto, never or a whole checkpoint's folder, got {resume!r}"))
        refuse_changes(checkpoint / "recipe.yaml", recipe)
        return Start(checkpoint, False)
    if not holds_run:
        return Start(None, False)
    checkpoint = newest_checkpoint(folder)
    if resume == "never" and checkpoint is not None:
        raise UserError(("training.resume", f"never, but {folder} holds a run; set run.overwrite to delete it"))
    longer = _read_recipe(folder / "recipe.yaml").get("training.max_steps") != recipe.training.max_steps
    return Start(checkpoint, (folder / "final" / "config.json").exists() and not longer)


def _require_own(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(("run.name", f"expected a folder of a run or none, but {folder} is a file"))
    if _holds_files(folder) and not (folder / "recipe.yaml").is_file():
        raise UserError(("run.name", f"expected a folder of a run or none, but {folder} holds other files"))
    ours = [folder, *(folder / name for name in ("recipe.yaml", "metrics.jsonl", "checkpoints", "best", "final"))]
    for path in ours:
        if path.is_symlink():
            raise UserError(("run.name", f"expected a folder of a run, but {path} is a link to {os.readlink(path)}"))


def _holds_files(folder: Path) -> bool:
    """Whether there is more in a folder than what a run that was killed at its very start leaves."""
    return folder.exists() and (not folder.is_dir() or any(not path.name.startswith(".") for path in folder.iterdir()))


def refuse_changes(saved_file: Path, recipe) -> None:
    """Refuses to go on with a recipe that differs from the saved one in more than a resumed run may change.

    Raises:
        UserError: naming each key that differs.
    """
    saved = _read_recipe(saved_file)
    given = _dotted(recipe.to_dict())
    problems = []
    for key in sorted(saved.keys() | given.keys()):
        old, new = saved.get(key), given.get(key)
        if old == new or key in MAY_CHANGE or key.startswith(MAY_CHANGE_SECTIONS):
            continue
        if key == "training.mixed_precision" and new == "auto":
            recipe.training.mixed_precision = old  # chosen once
            continue
        if key == "model.attn_implementation" and new is None:
            recipe.model["attn_implementation"] = old  # chosen once
            continue
        if key == "data.fingerprint" and new is None:
            recipe.data.fingerprint = old  # compared once the data is there
            continue
        if key == "training.max_steps" and old and new and new > old:
            schedules = (recipe.schedule.lr, recipe.schedule.weight_decay, recipe.schedule.accumulation)
            if all(is_flat(schedule) for schedule in schedules):
                continue
        problems.append((key, f"{saved_file.parent} was trained with {old!r}, got {new!r}; change it back, choose "
                         "another run.name, or set run.overwrite"))  # fmt: skip
    if problems:
        raise UserError(*problems)


def _read_recipe(path: Path) -> dict:
    """The dotted keys of a recipe that a run wrote, and their values."""
    try:
        return _dotted(yaml.safe_load(path.read_text()))
    except (OSError, ValueError, AttributeError, yaml.YAMLError) as error:
        raise UserError((str(path), f"is no recipe that a run wrote: {error}")) from error


def open_folder(recipe, step: int) -> None:
    """Makes the run's folder ready to go on after `step`. The main process calls it once all have a `Start`.

    What a run left there that went further is deleted, so that nothing is taken for this run's: `final` and later
    checkpoints. `recipe.yaml` is written.

    Raises:
        UserError: when it cannot be written to.
    """
    try:
        if recipe.run.overwrite:
            remove_at_once(recipe.folder)
        recipe.folder.mkdir(parents=True, exist_ok=True)
        later = [folder for folder in list_checkpoints(recipe.folder) if int(folder.name.removeprefix("step-")) > step]
        for folder in (recipe.folder / "final", *later):
            remove_at_once(folder)
        # Training the written recipe again goes on with this run, rather than deleting it or starting where it did.
        run, training = replace(recipe.run, overwrite=False), replace(recipe.training, resume="auto")
        write_file(recipe.folder / "recipe.yaml", replace(recipe, run=run, training=training).to_yaml())
    except OSError as error:
        raise UserError(("run.output_dir", f"{recipe.folder} cannot be written to: {error.strerror}")) from error


def _dotted(values: dict, prefix: str = "") -> dict:
    flat = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _dotted(value, f"{prefix}{key}.")
        elif value is not None:
            flat[f"{prefix}{key}"] = value
    return flat
