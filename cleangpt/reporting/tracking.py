"""Metrics: `metrics.jsonl`, the progress bar and the trackers, from one place that knows when each is due."""

import json
import logging
import math
import os
import re
import secrets
import struct
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from tqdm import tqdm

from ..files import write_file
from ..hardware import peak_flops, peak_memory
from ..recipe.keys import Recipe, flatten
from ..recipe.schedules import Values
from .progress import Progress

logger = logging.getLogger(__name__)
Holds = Callable[[int, str], bool]  # whether a line of this step with a metric of this name is there already


class Tracker:
    """Writes the metrics of one run, which is as far as `progress`, and whose model has `token_flops`.

    Every process has one; only the main process writes.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, progress: Progress, token_flops: int):
        self.accelerator, self.file, step = accelerator, recipe.folder / "metrics.jsonl", progress.step
        self.log_every, self.max_steps = recipe.tracking.log_every, recipe.training.max_steps
        self.draws_every = recipe.training.macro_batch if recipe.tracking.histograms else None
        self.began = time.perf_counter() - progress.elapsed_s
        self.since: float | None = None  # when the step ended since which speed is measured
        self.num_targets = self.num_tokens = 0  # since then
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        peak = torch.tensor(peak_flops(accelerator.device, half, torch.get_num_threads()), device=accelerator.device)
        self.peak_tokens = accelerator.reduce(peak, "sum").item() / token_flops  # per second
        started = self.file.exists()
        lines = _cut_after(self.file, step) if accelerator.is_main_process else []
        flushed = lines if any((recipe.folder / recipe.tracking.project).glob("events.*")) else ()  # each at once
        self.holds: dict[str, Holds] = {"metrics.jsonl": _in_lines(lines), "tensorboard": _in_lines(flushed)}
        if recipe.tracking.trackers:
            values = flatten(recipe.to_dict()).items()
            config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in values}
            options = _tracker_options(recipe, step, started) if accelerator.is_main_process else {}
            accelerator.init_trackers(recipe.tracking.project, config, options)
        self.trackers = accelerator.trackers if accelerator.is_main_process else []
        for tracker in self.trackers:
            if tracker.name == "wandb":  # all curves over our step, so that a resumed run continues them
                tracker.tracker.define_metric("step")
                tracker.tracker.define_metric("*", step_metric="step")
                self.holds["wandb"] = _in_wandb(tracker.tracker, recipe.folder / "wandb")
            elif tracker.name == "trackio":
                self.holds["trackio"] = _in_trackio(tracker.tracker, lines)
            for line in lines:  # those that a kill kept from the tracker
                self._log(tracker, {name: math.nan if value is None else value for name, value in line.items()})
        hidden = None if accelerator.is_main_process else True  # None: where there is no terminal
        self.bar = tqdm(total=self.max_steps, initial=step, unit="step", desc=recipe.run.name, disable=hidden)

    @property
    def elapsed_s(self) -> float:
        """Seconds of the run, those before restarts included."""
        return time.perf_counter() - self.began

    def is_due(self, step: int) -> bool:
        """Whether `step` gets a line of training metrics."""
        return step == 1 or step % self.log_every == 0 or step == self.max_steps

    def is_drawn(self, step: int) -> bool:
        """Whether `step` gets histograms: if the recipe asks for them, the last one before a boundary."""
        return self.draws_every is not None and (step % self.draws_every == 0 or step == self.max_steps)

    def count_step(self, num_targets: int, num_tokens: int) -> None:
        """Counts a step of `num_targets`, among `num_tokens` that are computed, over all processes."""
        self.bar.update()
        if self.since is None:
            self.since = time.perf_counter()
        else:
            self.num_targets, self.num_tokens = self.num_targets + num_targets, self.num_tokens + num_tokens

    def log_step(self, progress: Progress, values: Values, watched: dict[str, float]) -> None:
        """Logs the latest step, with other figures of it that are `watched`."""
        loss = math.fsum(progress.losses) / len(progress.losses)
        metrics = {"train/loss": loss, **values._asdict(), **watched}
        progress.logged, progress.losses = metrics, []
        shown, speeds, now = {"loss": f"{loss:.3f}", "lr": f"{values.lr:.1e}"}, {}, time.perf_counter()
        if self.since is not None and self.num_targets:
            seconds = now - self.since
            speed, share = self.num_targets / seconds, self.num_tokens / seconds / self.peak_tokens
            speeds = {"tokens_per_second": speed, "mfu": share}
            shown |= {"tok/s": f"{speed:,.0f}", "mfu": f"{share:.0%}"}
        self.since, self.num_targets, self.num_tokens = now, 0, 0
        self.write(progress, metrics | speeds)
        shown["memory"] = f"{peak_memory(self.accelerator.device) / 1e9:.2f} GB"
        self.bar.set_postfix(shown)
        if self.bar.disable:
            text = "  ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {progress.step}/{self.max_steps}  {text}")

    def log_evaluation(self, progress: Progress, metrics: dict[str, float], watched: dict[str, float]) -> None:
        """Logs an evaluation and other metrics of the boundary; the time since the last step is no training."""
        self.since, self.num_targets, self.num_tokens = None, 0, 0
        self.write(progress, {**metrics, **watched})
        shown = "  ".join(f"{name.removeprefix('eval/')} {metrics[name]:.4f}" for name in metrics if "eval" in name)
        self.say(f"step {progress.step}/{self.max_steps}  validation: {shown}")

    def write(self, progress: Progress, metrics: dict[str, float]) -> None:
        """Writes one line of `metrics.jsonl`, and the same to the trackers under the run's own step."""
        step, tokens = progress.step, progress.tokens
        line = {"step": step, "tokens": tokens, "elapsed_s": round(self.elapsed_s, 3), **metrics}
        if self.accelerator.is_main_process and not self.holds["metrics.jsonl"](step, next(iter(metrics))):
            finite = {name: value if math.isfinite(value) else None for name, value in line.items()}
            with open(self.file, "a") as file:
                file.write(json.dumps(finite) + "\n")
        for tracker in self.trackers:
            self._log(tracker, line)

    def log_samples(self, step: int, samples: list[str]) -> None:
        """Prints texts that the model wrote, and gives them to the trackers."""
        for text in samples:
            self.say(f"--- a sample\n{text}\n---")
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                indented = {f"sample/{i}": textwrap.indent(text, "    ") for i, text in enumerate(samples)}
                tracker.log(indented, step=step)  # Markdown leaves indented text alone
            else:
                from pandas import DataFrame

                table = DataFrame({"step": step, "text": samples})
                self._log(tracker, {"step": step, "samples": import_module(tracker.name).Table(dataframe=table)})

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Gives a PNG file to the trackers."""
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                from matplotlib.image import imread

                tracker.log_images({name: imread(path)[None, :, :, :3]}, step=step, dataformats="NHWC")
            else:
                self._log(tracker, {"step": step, name: import_module(tracker.name).Image(str(path))})

    def log_histograms(self, step: int, histograms: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
        """Gives histograms, each counts (bins,) and edges (bins + 1,), to the trackers."""
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                for name, (counts, edges) in histograms.items():
                    middle, n = (edges[1:] + edges[:-1]) / 2, counts.sum()
                    sums = n, counts @ middle, counts @ middle**2
                    limits = edges[1:].tolist(), counts.tolist()
                    tracker.tracker.add_histogram_raw(name, edges[0], edges[-1], *sums, *limits, step)
                tracker.tracker.flush()
            else:
                draw = import_module(tracker.name).Histogram
                drawn = {name: draw(np_histogram=histogram) for name, histogram in histograms.items()}
                self._log(tracker, {"step": step, **drawn})

    def say(self, text: str) -> None:
        """Prints above the progress bar, once for all processes."""
        if self.accelerator.is_main_process:
            self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """Ends the bar and the trackers."""
        self.bar.close()
        if self.accelerator.trackers:
            self.accelerator.end_training()

    def _log(self, tracker: GeneralTracker, line: dict[str, Any]) -> None:
        """Gives a line with its `step` to a tracker, unless it is there already."""
        step, name = line["step"], next(name for name in line if name not in ("step", "tokens", "elapsed_s"))
        if self.holds[tracker.name](step, name):
            return
        if tracker.name == "wandb":
            tracker.log(line)  # not under wandb's own step, below which it drops values: `define_metric` finds ours
        else:  # trackio reserves the key
            tracker.log({k: v for k, v in line.items() if tracker.name != "trackio" or k != "step"}, step=step)


def _cut_after(file: Path, step: int) -> list[dict[str, Any]]:
    """Drops the lines after `step`, which a resumed run writes again, and any incomplete one; returns the others."""
    if not file.exists():
        return []
    found = re.findall(r'^(\{"step": (\d+), .*\})$', file.read_text(errors="replace"), re.MULTILINE)
    lines = [line for line, number in found if step and int(number) <= step]
    write_file(file, "".join(f"{line}\n" for line in lines))
    return [json.loads(line) for line in lines]


def _tracker_options(recipe: Recipe, step: int, started: bool) -> dict[str, dict[str, Any]]:
    """What each tracker needs to name the run, and, if it was `started` before, to go on after `step`."""
    tracking, file = recipe.tracking, recipe.folder / "wandb" / "id"
    named = {"name": tracking.name or recipe.run.name, "group": tracking.group}
    options: dict[str, dict[str, Any]] = {
        "tensorboard": {"purge_step": step + 1 if step else 0},  # hides the steps that are taken again
        "trackio": {**named, "resume": "allow" if started else "never"},
    }
    if "wandb" in tracking.trackers:
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4))
        place = {"id": file.read_text(), "dir": str(recipe.folder), "resume": "allow"}
        options["wandb"] = {**named, **place, "tags": list(tracking.tags)}
        options["wandb"]["mode"] = os.environ.get("WANDB_MODE") or ("online" if _is_logged_in() else "offline")
    return options


def _is_logged_in() -> bool:
    """Whether wandb is reachable with an account; otherwise it would ask for one, or end the run."""
    import wandb

    try:
        return wandb.login(prompt=False)
    except wandb.errors.Error as error:
        logger.warning(f"wandb writes offline, `wandb sync` uploads it later: {error}")
        return False


def _in_lines(lines: Iterable[Mapping[str, Any]]) -> Holds:
    """What `lines` hold, each with its `step`."""
    held = {(line["step"], name) for line in lines for name in line}
    return lambda step, name: (step, name) in held


def _in_wandb(run: Any, folder: Path) -> Holds:
    """What a wandb run holds: offline what its files in `folder` say, online all up to the server's latest step."""
    if run.offline:
        return _in_lines(line for file in folder.glob(f"*run-*/run-{run.id}.wandb") for line in _wandb_lines(file))
    last = run.summary.get("step", -1)  # the server gets lines in order; of this step, surely the first
    return lambda step, name: step < last or (step == last and name == "train/loss")


def _in_trackio(run: Any, lines: Iterable[Mapping[str, Any]]) -> Holds:
    """What trackio's database on this machine holds of a run; `lines` if its data go to another machine."""
    from trackio import context_vars
    from trackio.sqlite_storage import SQLiteStorage

    is_here = context_vars.current_server.get() is None
    return _in_lines(SQLiteStorage.get_logs(run.project, run.name, run_id=run.id) if is_here else lines)


def _wandb_lines(file: Path) -> Iterator[dict[str, Any]]:
    """Step and names of each line in a file of wandb, which a kill may have cut anywhere.

    The format is that of LevelDB's log after a header of 7 bytes: blocks of 32 KB, with records cut at their ends.
    """
    record_type = import_module("wandb.proto.wandb_internal_pb2").Record
    content, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(content):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)  # kind: 1 whole, 2 first, 3 middle, 4 last
        parts, place = parts + content[place + 7 : place + 7 + length], place + 7 + length
        if kind in (1, 4) and place <= len(content):
            record, parts = record_type.FromString(parts), b""
            items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
            if "step" in items:
                yield {**items, "step": int(items["step"])}
