"""Checkpoints: everything a run needs to resume, in safetensors and JSON.

    checkpoints/step-00000500/model/                   a `from_pretrained` folder with its tokenizer
                              average/                 another one, with `training.ema`
                              optimizer.safetensors    state of every optimizer, by weight
                              state.json               what else a run knows, see `Progress`
                              recipe.yaml              the recipe as resolved
                              manifest.json            size and SHA-256 of every other file

`files.py` ensures that such a folder is there completely or not at all.
"""

import contextlib
import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pydantic
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import UserError
from ..files import is_whole, remove_at_once, write_folder
from ..models.build import quiet
from ..recipe.keys import Checkpoint, Recipe
from ..reporting.progress import Progress

Optimizers = Sequence[AcceleratedOptimizer]
Tensors = dict[str, torch.Tensor]


def step_of(folder: Path) -> int | None:
    """The step of a checkpoint's folder: 500 for `step-00000500`, None for any other name."""
    match = re.fullmatch(r"step-(\d+)", folder.name)
    return int(match[1]) if match else None


def list_checkpoints(run_folder: Path) -> list[Path]:
    """The checkpoints of a run, oldest first."""
    folders = [folder for folder in (run_folder / "checkpoints").glob("step-*") if step_of(folder) is not None]
    return sorted((f for f in folders if f.is_dir() and not f.is_symlink()), key=lambda folder: step_of(folder) or 0)


def newest_checkpoint(run_folder: Path) -> Path | None:
    """The newest checkpoint that is whole, None if there is no checkpoint, or a UserError if none is whole."""
    folders = list_checkpoints(run_folder)
    newest = next(filter(is_whole, reversed(folders)), None)
    if folders and newest is None:
        message = "every checkpoint is damaged, set run.overwrite to start again"
        raise UserError((str(run_folder / "checkpoints"), message))
    return newest


def copy_weights(accelerator: Accelerator, model: nn.Module) -> Tensors:
    """Copies a model's weights into the main process's memory; all processes call it."""
    weights = accelerator.get_state_dict(model)
    if not accelerator.is_main_process:
        return {}
    copies: dict[tuple, torch.Tensor] = {}  # by place in memory, so that tied weights stay tied

    def copy(tensor: torch.Tensor) -> torch.Tensor:
        place = (tensor.device, tensor.data_ptr(), tensor.shape)
        if place not in copies:
            copies[place] = tensor.detach().to("cpu", copy=True)
        return copies[place]

    for name, source in getattr(accelerator.unwrap_model(model), "all_tied_weights_keys", {}).items():
        weights[name] = weights[source]  # FSDP gathers each name by itself
    return {name: copy(weight) for name, weight in weights.items()}


def copy_optimizers(accelerator: Accelerator, model: nn.Module, optimizers: Optimizers) -> Tensors:
    """Copies the state of optimizers (`_by_entry`) into the main process's memory; all processes call it."""
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)  # whole tensors, on the main process only
    everything: Any = get_optimizer_state_dict(model, [each.optimizer for each in optimizers], options=full)
    state = everything.get("state", {}) if accelerator.is_main_process else {}
    return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in _by_entry(state).items()}


class Saver:
    """Writes snapshots in the background, in order, in the main process: `wait` for the last before taking the next."""

    def __init__(self, accelerator: Accelerator):
        self.pool = ThreadPoolExecutor(1, "saver") if accelerator.is_main_process else None
        self.pending: list[Future] = []

    def submit(self, write: Callable[..., None], *args: Any) -> None:
        """Calls `write(*args)` after everything submitted before it."""
        if self.pool is not None:
            self.pending.append(self.pool.submit(quiet()(write), *args))

    def wait(self) -> None:
        """Waits until everything is written, and raises the `OSError` of what could not be."""
        while self.pending:
            self.pending.pop(0).result()


def write_checkpoint(
    optimizers: Tensors, models: dict[str, Callable[[Path], None]], progress: Progress, recipe: Recipe
) -> None:
    """Writes `checkpoints/step-N`, `models` by folder, and deletes what `recipe.checkpoint` does not keep."""

    def fill(folder: Path) -> None:
        for name, write_model in models.items():
            write_model(folder / name)
        save_file(optimizers, folder / "optimizer.safetensors")
        (folder / "state.json").write_text(json.dumps(dataclasses.asdict(progress), indent=1))
        (folder / "recipe.yaml").write_text(recipe.to_yaml())

    write_folder(recipe.folder / "checkpoints" / f"step-{progress.step:08d}", fill)
    prune(recipe.folder, recipe.checkpoint)


def load_progress(folder: Path) -> Progress:
    """What a checkpoint says about its run, or a UserError if its `state.json` is not one that a run wrote."""
    try:
        return pydantic.TypeAdapter(Progress).validate_python(json.loads((folder / "state.json").read_text()))
    except (OSError, ValueError) as error:
        raise UserError((str(folder / "state.json"), f"expected the state of a run: {error}")) from error


def load_optimizers(folder: Path, model: nn.Module, optimizers: Optimizers) -> None:
    """Loads a checkpoint's optimizer state, or raises a UserError if it belongs to another model or optimizer."""
    inner = [each.optimizer for each in optimizers]
    everything: Any = get_optimizer_state_dict(model, inner)
    try:
        saved = load_file(folder / "optimizer.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError((str(folder), f"expected optimizer.safetensors: {error}")) from error
    expected = {name: value.shape for name, value in _by_entry(everything["state"]).items()}
    if expected != {name: value.shape for name, value in saved.items()}:
        raise UserError((str(folder), "holds the optimizer state of another model or optimizer"))
    for weight, entries in everything["state"].items():
        for entry, empty in entries.items():
            value = saved[f"{weight}/{entry}"]
            if isinstance(empty, DTensor):  # sharded as the weight is; every process has read the whole
                value = distribute_tensor(value, empty.device_mesh, empty.placements, src_data_rank=None)
            entries[entry] = value
    set_optimizer_state_dict(model, inner, everything)


def prune(run_folder: Path, keep: Checkpoint) -> None:
    """Deletes all checkpoints but the newest `keep_last` and the best `keep_best`."""
    folders = list_checkpoints(run_folder)
    values: dict[Path, float] = {}
    for folder in folders if keep.keep_best else ():
        with contextlib.suppress(UserError, KeyError):  # damaged or without the metric, so not one of the best
            progress = load_progress(folder)
            value = (progress.logged | progress.metrics)[keep.metric]
            if math.isfinite(value) and progress.boundary == progress.step:  # else it is an earlier step's
                values[folder] = value
    ranked = sorted(values, key=lambda folder: values[folder], reverse=keep.metric == "eval/accuracy")
    for folder in set(folders[: -keep.keep_last]) - set(ranked[: keep.keep_best]):
        remove_at_once(folder)


def _by_entry(state: dict[str, Tensors]) -> Tensors:
    """`transformer.wte.weight/exp_avg` to tensor. Rates and decays are not state: every step sets them."""
    return {f"{weight}/{entry}": value for weight, entries in state.items() for entry, value in entries.items()}
