"""Checkpoints: everything a run needs to go on, in safetensors and JSON.

    checkpoints/step-00000500/model/                   a `from_pretrained` folder, tokenizer included
                              optimizer.safetensors    state of every optimizer, by the weights' names
                              state.json               what else a run knows, see `Progress`
                              recipe.yaml              the recipe as resolved
                              manifest.json            size and SHA-256 of every other file

A folder is written beside its place, flushed, and renamed when it is whole: it is there completely or not at all.
"""

import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from .errors import UserError

FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole tensors, on the main process only


@dataclasses.dataclass
class Progress:
    """What a run knows besides weights and optimizer."""

    step: int = 0
    """Completed optimizer steps."""
    tokens: int = 0
    """Targets trained on."""
    elapsed_s: float = 0.0
    """Seconds, added up over restarts."""
    metrics: dict = dataclasses.field(default_factory=dict)
    """The latest evaluation."""
    best: float | None = None
    """Best value of `checkpoint.metric` so far."""
    best_step: int | None = None
    """Step of that evaluation."""
    evaluations_without_gain: int = 0
    """Evaluations since then: what early stopping counts."""
    stopped_early: bool = False
    """Whether early stopping ended the run."""

    def update_best(self, metric: str, early_stopping) -> bool:
        """Takes in the latest evaluation and decides whether the run stops early.

        Args:
            metric: `recipe.checkpoint.metric`. early_stopping: `recipe.training.early_stopping`.

        Returns:
            Whether this evaluation is the best so far.
        """
        value = self.metrics[metric]
        gain = float("inf") if self.best is None else (value - self.best) * (1 if metric == "eval/accuracy" else -1)
        self.evaluations_without_gain = 0 if gain > early_stopping.min_delta else self.evaluations_without_gain + 1
        patience = early_stopping.patience
        self.stopped_early = patience is not None and self.evaluations_without_gain >= patience
        if gain > 0:
            self.best, self.best_step = value, self.step
        return gain > 0


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Replaces `folder` by what `fill` writes, with a manifest, whole or not at all."""
    temporary, old = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.old")
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    temporary.mkdir(parents=True)
    fill(temporary)
    files = sorted(path for path in temporary.rglob("*") if path.is_file())
    manifest = {str(file.relative_to(temporary)): _digest(file) for file in files}
    (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1))
    for path in (*files, temporary / "manifest.json", *{file.parent for file in files}):
        _flush(path)
    if folder.exists():
        os.rename(folder, old)
    os.rename(temporary, folder)
    _flush(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _digest(file: Path) -> dict:
    with open(file, "rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is what its manifest says."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        return all(_digest(folder / name) == entry for name, entry in manifest.items())
    except (OSError, ValueError, AttributeError):
        return False


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    return sorted((run_folder / "checkpoints").glob("step-[0-9]*"))


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint that is whole; None when there is no checkpoint.

    Raises:
        UserError: when there are checkpoints and none is whole.
    """
    folders = list_checkpoints(run_folder)
    for folder in reversed(folders):
        if is_whole(folder):
            return folder
    if folders:
        raise UserError(
            (str(run_folder / "checkpoints"), "every checkpoint is damaged, set run.overwrite to start anew")
        )
    return None


def save_model(accelerator: Accelerator, model, tokenizer, folder: Path, write_card: Callable) -> None:
    """Writes a `from_pretrained` folder, into which `write_card` puts its README. All processes call it; the main one
    writes."""
    weights = accelerator.get_state_dict(model)

    def fill(folder: Path):
        accelerator.unwrap_model(model).save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        write_card(folder)

    if accelerator.is_main_process:
        write_folder(folder, fill)
    accelerator.wait_for_everyone()


def save_checkpoint(
    accelerator, run_folder: Path, model, optimizers, tokenizer, progress: Progress, recipe: str
) -> None:
    """Writes `checkpoints/step-N`. All processes call it; `recipe` is its YAML."""
    weights = accelerator.get_state_dict(model)
    optimizer_state = get_optimizer_state_dict(model, _bare(optimizers), options=FULL_STATE).get("state", {})
    scaler = None if accelerator.scaler is None else accelerator.scaler.state_dict()

    def fill(folder: Path):
        accelerator.unwrap_model(model).save_pretrained(folder / "model", state_dict=weights)
        tokenizer.save_pretrained(folder / "model")
        save_file(_flat(optimizer_state), folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps({**dataclasses.asdict(progress), "scaler": scaler}, indent=1))
        (folder / "recipe.yaml").write_text(recipe)

    if accelerator.is_main_process:
        write_folder(run_folder / "checkpoints" / f"step-{progress.step:08d}", fill)
    accelerator.wait_for_everyone()


def load_progress(folder: Path) -> Progress:
    """What a checkpoint says about its run."""
    state = json.loads((folder / "state.json").read_text())
    return Progress(**{field.name: state[field.name] for field in dataclasses.fields(Progress)})


def load_optimizers(accelerator: Accelerator, folder: Path, model, optimizers) -> None:
    """Puts a checkpoint's optimizer state into prepared `optimizers`.

    Raises:
        UserError: when it belongs to another model or optimizer.
    """
    everything = get_optimizer_state_dict(model, _bare(optimizers))
    try:
        saved = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError((str(folder), f"expected optimizer.safetensors: {error}")) from error
    expected = {name: value.shape for name, value in _flat(everything["state"]).items()}
    if expected != {name: value.shape for name, value in saved.items()}:
        raise UserError((str(folder), "holds the optimizer state of another model or optimizer"))
    for weight, entries in everything["state"].items():
        for entry in entries:
            entries[entry] = saved[f"{weight}/{entry}"]
    set_optimizer_state_dict(model, _bare(optimizers), everything, options=StateDictOptions(full_state_dict=True))
    scaler = json.loads((folder / "state.json").read_text())["scaler"]
    if scaler is not None and accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(scaler)


def prune(run_folder: Path, section) -> None:
    """Deletes all checkpoints but the newest `keep_last` and the `keep_best` best of `recipe.checkpoint`."""
    keep_last, keep_best, metric = section.keep_last, section.keep_best, section.metric
    folders = list_checkpoints(run_folder)
    value = {folder: load_progress(folder).metrics.get(metric) for folder in folders} if keep_best else {}
    ranked = sorted(
        (folder for folder in value if value[folder] is not None),
        key=lambda folder: value[folder] * (-1 if metric == "eval/accuracy" else 1),
    )
    for folder in set(folders[:-keep_last]) - set(ranked[:keep_best]):
        trash = folder.with_name(f".{folder.name}.old")  # renamed first: a half-deleted checkpoint has no name
        os.rename(folder, trash)
        shutil.rmtree(trash)


def _flat(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`transformer.wte.weight/exp_avg` to tensor; rates and decays are not state, every step sets them."""
    return {
        f"{weight}/{entry}": value.contiguous() for weight, entries in state.items() for entry, value in entries.items()
    }


def _bare(optimizers) -> list[torch.optim.Optimizer]:
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
