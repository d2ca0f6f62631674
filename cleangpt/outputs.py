"""The run's folder: whose it is, and from where a run in it goes on."""

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from .checkpoint import is_whole, newest_checkpoint
from .errors import UserError
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


def find_start(recipe) -> Start:
    """Where the run of `recipe` starts, without changing anything on disk.

    Raises:
        UserError: when the folder is not this recipe's, is no run's folder, or `training.resume` forbids to go on.
    """
    folder, resume = recipe.folder, recipe.training.resume
    if recipe.run.overwrite:
        _require_own(folder)
        return Start(None, False)
    if resume not in ("auto", "never"):
        checkpoint = Path(resume)
        if not is_whole(checkpoint):
            raise UserError(("training.resume", f"expected auto, never or a whole checkpoint's folder, got {resume!r}"))
        refuse_changes(checkpoint / "recipe.yaml", recipe)
        return Start(checkpoint, False)
    if not folder.exists() or not any(folder.iterdir()):
        return Start(None, False)
    _require_own(folder)
    refuse_changes(folder / "recipe.yaml", recipe)
    checkpoint = newest_checkpoint(folder)
    if resume == "never" and checkpoint is not None:
        raise UserError(("training.resume", f"never, but {folder} holds a run; set run.overwrite to delete it"))
    saved = yaml.safe_load((folder / "recipe.yaml").read_text())
    longer = saved["training"]["max_steps"] != recipe.training.max_steps
    return Start(checkpoint, (folder / "final" / "config.json").exists() and not longer)


def _require_own(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "recipe.yaml").is_file():
        raise UserError(("run.name", f"expected a folder of a run or none, but {folder} holds other files"))
    if folder.exists() and not folder.is_dir():
        raise UserError(("run.name", f"expected a folder of a run or none, but {folder} is a file"))


def refuse_changes(saved_file: Path, recipe) -> None:
    """Refuses to go on with a recipe that differs from the saved one in more than a resumed run may change.

    Raises:
        UserError: naming each key that differs.
    """
    saved = _dotted(yaml.safe_load(saved_file.read_text()))
    given = _dotted(recipe.to_dict())
    problems = []
    for key in sorted(saved.keys() | given.keys()):
        old, new = saved.get(key), given.get(key)
        if old == new or key in MAY_CHANGE or key.startswith(MAY_CHANGE_SECTIONS):
            continue
        if key == "training.mixed_precision" and new == "auto":
            recipe.training.mixed_precision = old  # chosen once
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


def open_folder(recipe) -> None:
    """Makes the run's folder and writes `recipe.yaml` into it. The main process calls it once all have a `Start`.

    Raises:
        UserError: when it cannot be written to.
    """
    try:
        if recipe.run.overwrite:
            shutil.rmtree(recipe.folder, ignore_errors=True)
        recipe.folder.mkdir(parents=True, exist_ok=True)
        # Training the written recipe again goes on with this run, rather than deleting it or starting where it did.
        run, training = replace(recipe.run, overwrite=False), replace(recipe.training, resume="auto")
        (recipe.folder / "recipe.yaml").write_text(replace(recipe, run=run, training=training).to_yaml())
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
