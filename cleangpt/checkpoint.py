"""Checkpoints: everything a run needs to go on, in safetensors and JSON.

    checkpoints/step-00000500/model/                   a `from_pretrained` folder, tokenizer included
                              optimizer.safetensors    state of every optimizer, by the weights' names
                              state.json               what else a run knows, see `Progress`
                              recipe.yaml              the recipe as resolved
                              manifest.json            size and SHA-256 of every other file

`files.py` sees to it that such a folder is there completely or not at all.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pydantic
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
from .files import is_whole, remove_at_once, write_folder

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
    boundary: int = -1
    """Step of the latest boundary that was gone through; a run stopped before its boundary makes up for it."""
    skipped: int = 0
    """Steps in a row whose update was left out, the latest of them `step`."""
    logged: dict = dataclasses.field(default_factory=dict)
    """The latest training metrics that were logged."""

    def update_best(self, metric: str, early_stopping) -> bool:
        """Takes in the latest evaluation and decides whether the run stops early.

        Args:
            metric: `recipe.checkpoint.metric`. early_stopping: `recipe.training.early_stopping`.

        Returns:
            Whether this evaluation is the best so far.
        """
        value = (self.logged | self.metrics)[metric]
        gain = math.inf if self.best is None else (value - self.best) * (1 if metric == "eval/accuracy" else -1)
        if not math.isfinite(value):
            gain = -math.inf  # never the best, even as the first
        self.evaluations_without_gain = 0 if gain > early_stopping.min_delta else self.evaluations_without_gain + 1
        patience = early_stopping.patience
        self.stopped_early = patience is not None and self.evaluations_without_gain >= patience
        if gain > 0:
            self.best, self.best_step = value, self.step
        return gain > 0


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = (run_folder / "checkpoints").glob("step-" + 8 * "[0-9]" + "*")
    return sorted(folder for folder in folders if folder.is_dir() and not folder.is_symlink())


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


@dataclasses.dataclass
class Snapshot:
    """A copy of what changes from step to step, in the memory of the main process; empty on the others."""

    weights: dict[str, torch.Tensor]
    optimizers: dict[str, dict[str, torch.Tensor]]
    """Weight's name -> entry (`exp_avg`, say) -> tensor."""
    scaler: dict | None


def take_snapshot(accelerator: Accelerator, model, optimizers) -> Snapshot:
    """Copies weights and optimizer state; all processes call it. Training may go on as soon as it returns."""
    weights = accelerator.get_state_dict(model)
    state = get_optimizer_state_dict(model, _bare(optimizers), options=FULL_STATE).get("state", {})
    if not accelerator.is_main_process:
        return Snapshot({}, {}, None)
    copies = {}  # by place in memory: tied weights stay tied

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.shape)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    weights = {name: copy(weight) for name, weight in weights.items()}
    state = {weight: {entry: copy(value) for entry, value in entries.items()} for weight, entries in state.items()}
    return Snapshot(weights, state, None if accelerator.scaler is None else accelerator.scaler.state_dict())


class Saver:
    """Writes snapshots in the background, in order, while training goes on; does nothing but on the main process.

    There is one snapshot at a time: `wait` for the last one before the next is taken.
    """

    def __init__(self, accelerator: Accelerator):
        self.pool = ThreadPoolExecutor(1, "saver") if accelerator.is_main_process else None
        self.pending: list[Future] = []

    def submit(self, write: Callable, *arguments) -> None:
        """Calls `write(*arguments)` once all that was submitted before is written."""
        if self.pool is not None:
            self.pending.append(self.pool.submit(write, *arguments))

    def wait(self) -> None:
        """Until all is written.

        Raises:
            OSError: when something could not be.
        """
        while self.pending:
            self.pending.pop(0).result()


def write_model(folder: Path, model, snapshot: Snapshot, tokenizer, write_card: Callable[[Path], None]) -> None:
    """Writes a `from_pretrained` folder, into which `write_card` puts its README."""

    def fill(folder: Path):
        model.save_pretrained(folder, state_dict=dict(snapshot.weights))
        tokenizer.save_pretrained(folder)
        write_card(folder)

    write_folder(folder, fill)


def write_checkpoint(
    run_folder: Path, model, snapshot: Snapshot, tokenizer, progress: Progress, recipe: str, keep
) -> None:
    """Writes `checkpoints/step-N`, then deletes those that `keep`, `recipe.checkpoint`, says nothing of."""

    def fill(folder: Path):
        model.save_pretrained(folder / "model", state_dict=dict(snapshot.weights))
        tokenizer.save_pretrained(folder / "model")
        save_file(_flat(snapshot.optimizers), folder / "optimizer.safetensors")
        state = {**dataclasses.asdict(progress), "scaler": snapshot.scaler}
        (folder / "state.json").write_text(json.dumps(state, indent=1))
        (folder / "recipe.yaml").write_text(recipe)

    write_folder(run_folder / "checkpoints" / f"step-{progress.step:08d}", fill)
    prune(run_folder, keep)


def load_progress(folder: Path) -> Progress:
    """What a checkpoint says about its run.

    Raises:
        UserError: when it says something else.
    """
    try:
        state = json.loads((folder / "state.json").read_text())
        return pydantic.TypeAdapter(Progress).validate_python({k: v for k, v in state.items() if k != "scaler"})
    except (OSError, ValueError, AttributeError) as error:
        raise UserError((str(folder / "state.json"), f"is no state of a run: {error}")) from error


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
    value = {folder: _value(folder, metric) for folder in folders} if keep_best else {}
    ranked = sorted(
        (folder for folder in value if value[folder] is not None),
        key=lambda folder: value[folder] * (-1 if metric == "eval/accuracy" else 1),
    )
    for folder in set(folders[:-keep_last]) - set(ranked[:keep_best]):
        remove_at_once(folder)


def _value(folder: Path, metric: str) -> float | None:
    try:
        progress = load_progress(folder)
    except UserError:
        return None  # damaged, so none of the best
    return (progress.logged | progress.metrics).get(metric)


def _flat(state: dict[str, dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """`transformer.wte.weight/exp_avg` to tensor; rates and decays are not state, every step sets them."""
    return {
        f"{weight}/{entry}": value.contiguous() for weight, entries in state.items() for entry, value in entries.items()
    }


def _bare(optimizers) -> list[torch.optim.Optimizer]:
    return [getattr(optimizer, "optimizer", optimizer) for optimizer in optimizers]
