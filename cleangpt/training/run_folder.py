"""The run's folder: who uses it, where a run in it starts, and what may differ from the recipe saved there.

empty, or run.overwrite                  a new run, or a branch of the checkpoint that `training.resume` names
holds a run                              resumed from its newest whole checkpoint, or from the one named
holds a run that differs in mathematics  refused, with each key that differs
"""

import contextlib
import dataclasses
import os
import platform
import re
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml
from accelerate import PartialState
from filelock import FileLock, Timeout

from ..errors import UserError
from ..files import clear_leftovers, is_whole, remove_at_once, write_file
from ..recipe.keys import Branch, Recipe, flatten
from ..recipe.reading import parse_recipe
from ..recipe.schedules import is_flat, sequences_per_step
from ..recipe.values import ReadOnly
from .checkpoint import list_checkpoints, newest_checkpoint, step_of
from .launch import on_main

PLACE = ("run.name", "run.output_dir", "run.overwrite", "training.resume", "branched_from")
# Beginnings of keys that do not change the mathematics: they may differ when a run resumes.
FREE = (
    *PLACE,
    *("training.micro_batch_size", "training.max_skipped", "training.early_stopping", "training.compile"),
    *("data.data_files", "data.num_proc", "evaluation.", "checkpoint.", "tracking.", "hub."),
)


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts."""

    checkpoint: Path | None = None  # the one to resume or branch from; None for a new run
    saved: Recipe | None = None  # the recipe in the run's folder, if it holds a run
    parent: Path | None = None  # the checkpoint of another run that this run branches from
    source: Recipe | None = None  # the recipe of that other run, if this one has no folder yet
    finished: bool = False  # whether there is nothing left to do


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keeps other runs on this machine out of the run's folder, or raises a UserError; the main process acts for all.

    The lock is the system's and ends with the process, however it ends.
    """
    lock, owner = folder.with_name(f".{folder.name}.lock"), folder.with_name(f".{folder.name}.owner")
    held, makes_parent = FileLock(lock, blocking=False), not folder.parent.exists()

    def acquire() -> None:
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

    on_main(acquire)
    try:
        yield
    finally:
        if PartialState().is_main_process:
            owner.unlink(missing_ok=True)
            lock.unlink(missing_ok=True)  # whoever waits for it sees that it is gone
            held.release()
            if makes_parent:
                with contextlib.suppress(OSError):
                    folder.parent.rmdir()  # if empty: a refused run leaves nothing behind


def find_start(recipe: Recipe) -> Start:
    """Where the run of a recipe starts. It restores what a kill left half-renamed, and changes nothing else on disk.

    Raises:
        UserError: if the folder is not a run's, `training.resume` forbids resuming, or its checkpoint is not whole.
    """
    folder, resume = recipe.folder, recipe.training.resume
    _require_run_folder(folder)
    saved = None
    if (folder / "recipe.yaml").is_file() and not recipe.run.overwrite:
        clear_leftovers(folder)
        clear_leftovers(folder / "checkpoints")
        saved = read_recipe(folder / "recipe.yaml")
    named = None if resume in ("auto", "never") else Path(resume)
    if named is not None and (step_of(named) is None or not is_whole(named)):
        raise UserError(("training.resume", f"expected auto, never or a whole checkpoint's folder, got {resume!r}"))
    if named is not None and named.resolve().parents[1] == folder.resolve():
        if saved is None:
            raise UserError(("run.overwrite", f"would delete the checkpoint of training.resume, {resume!r}"))
        return Start(named, saved)
    newest = newest_checkpoint(folder) if saved else None
    if resume == "never" and newest is not None:
        raise UserError(("training.resume", f"never, but {folder} holds a run; set run.overwrite to delete it"))
    branch = (saved or recipe).branched_from
    parent = named or (Path(branch.checkpoint) if branch else None)
    if newest is None and parent is not None and not is_whole(parent):
        raise UserError(("branched_from.checkpoint", f"expected a whole checkpoint's folder, got {str(parent)!r}"))
    source = read_recipe(parent / "recipe.yaml") if parent is not None and saved is None else None
    return Start(newest or parent, saved, parent, source)


def settle(recipe: Recipe, start: Start) -> tuple[Recipe, Start]:
    """Compares a resolved recipe with the one that its run, or the run it branches from, was trained with.

    Returns:
        The recipe, with `branched_from` if it is a branch; and the start, which knows whether the run is finished.

    Raises:
        UserError: naming each key that differs and may not.
    """
    step = step_of(start.checkpoint) if start.checkpoint else None
    if step is not None and (recipe.training.max_steps or 0) < step:
        message = f"expected at least {step}, the step of {start.checkpoint}, got {recipe.training.max_steps}"
        raise UserError(("training.max_steps", message))
    if start.saved is not None:
        refuse_changes(start.saved, recipe, start.parent)
        is_done = (recipe.folder / "final" / "config.json").exists()
        old, new = start.saved.training, recipe.training
        is_same = (old.max_steps, old.early_stopping) == (new.max_steps, new.early_stopping)
        recipe = recipe.model_copy(update={"branched_from": start.saved.branched_from})
        named = recipe.training.resume != "auto" and start.parent is None
        return recipe, dataclasses.replace(start, finished=is_done and is_same and not named)
    if start.parent is None or start.source is None or step is None:
        return recipe, start
    changes = {key: list(pair) for key, pair in differences(start.source, recipe, PLACE).items()}
    same_data = not any(key.startswith("data.") and not key.startswith(FREE) for key in changes)
    drawn = int(sequences_per_step(start.source)[:step].sum()) if same_data else 0
    branch = Branch(checkpoint=str(start.parent), step=step, sequences=drawn, changes=ReadOnly(changes))
    return recipe.model_copy(update={"branched_from": branch}), start


def refuse_changes(saved: Recipe, recipe: Recipe, parent: Path | None) -> None:
    """Refuses to resume a run whose `saved` recipe differs in mathematics, naming each key, or has another `parent`."""
    schedule = recipe.schedule
    any_length = all(is_flat(each) for each in (schedule.lr, schedule.weight_decay, schedule.accumulation))
    found = differences(saved, recipe, (*FREE, "training.max_steps") if any_length else FREE)
    if any(key.startswith(("data.", "tokenizer.")) and key != "data.fingerprint" for key in found):
        found.pop("data.fingerprint", None)  # follows from them
    # A name for the variant, such as `adder-lr0.002`, from the first change that is short.
    parts = [re.sub(r"[^\w.-]", "", f"{key.rsplit('.')[-1]}{new}") for key, (_, new) in found.items()]
    name = f"--run.name={recipe.run.name}-{next((part for part in parts if len(part) < 30), 'variant')}"
    way_out = (
        f"change it back, give the variant a name, {name} (training.resume=CHECKPOINT branches), or set run.overwrite"
    )
    problems = []
    for key, (old, new) in found.items():
        what = "the text, its tokenizer or its splits changed: " if key == "data.fingerprint" else ""
        problems.append((key, f"{what}{recipe.folder} was trained with {old!r}, got {new!r}; {way_out}"))
    if problems:
        raise UserError(*problems)
    branch = Path(saved.branched_from.checkpoint).resolve() if saved.branched_from else None
    if parent is not None and branch != parent.resolve():
        message = f"{recipe.folder} holds a run that did not branch from {parent}, choose another run.name"
        raise UserError(("training.resume", message))


def differences(one: Recipe, other: Recipe, free: tuple[str, ...]) -> dict[str, tuple[Any, Any]]:
    """The keys in which two recipes differ, those that start with one of `free` aside, with both values."""
    old, new = flatten(one.to_dict()), flatten(other.to_dict())
    keys = [key for key in sorted(old.keys() | new.keys()) if not key.startswith(free)]
    return {key: (old.get(key), new.get(key)) for key in keys if old.get(key) != new.get(key)}


def read_recipe(path: Path) -> Recipe:
    """The resolved recipe in a file that a run wrote, or a UserError if it is not one."""
    try:
        return parse_recipe(yaml.safe_load(path.read_text()), default_name=path.parent.name, check=False)
    except (OSError, ValueError, AttributeError, TypeError, yaml.YAMLError, UserError) as error:
        raise UserError((str(path), f"expected a recipe that a run wrote: {error}")) from error


def open_folder(recipe: Recipe, step: int) -> None:
    """Prepares the run's folder for the steps after `step`; the main process calls it.

    It writes `recipe.yaml`, and deletes `final` and later checkpoints of a run that had gone further. A folder that
    cannot be written to is a UserError.
    """
    try:
        if recipe.run.overwrite:
            remove_at_once(recipe.folder)
        recipe.folder.mkdir(parents=True, exist_ok=True)
        later = [folder for folder in list_checkpoints(recipe.folder) if (step_of(folder) or 0) > step]
        for folder in (recipe.folder / "final", *later):
            remove_at_once(folder)
        # Training the written recipe resumes this run: it does not delete it or rewind it.
        written = recipe.changed(run={"overwrite": False}, training={"resume": "auto"})
        write_file(recipe.folder / "recipe.yaml", written.to_yaml())
    except OSError as error:
        raise UserError(("run.output_dir", f"{recipe.folder} cannot be written to: {error.strerror}")) from error


def _require_run_folder(folder: Path) -> None:
    expected = "expected a run's folder or none, but"
    if folder.exists() and not folder.is_dir():
        raise UserError(("run.name", f"{expected} {folder} is a file"))
    # What a run that was killed at its very start leaves is hidden.
    if any(folder.glob("[!.]*")) and not (folder / "recipe.yaml").is_file():
        raise UserError(("run.name", f"{expected} {folder} holds other files"))
    for name in ("", "recipe.yaml", "metrics.jsonl", "checkpoints", "best", "final"):
        if (path := folder / name).is_symlink():
            raise UserError(("run.name", f"{expected} {path} is a link to {path.readlink()}"))
