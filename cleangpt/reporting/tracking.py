"""Metrics: `metrics.jsonl`, the progress bar and the trackers, from one place that knows when each is due."""

import json
import logging
import math
import os
import re
import secrets
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import pandas
import torch
from accelerate import Accelerator
from accelerate.tracking import GeneralTracker
from matplotlib.image import imread
from tqdm import tqdm

from ..files import write_file
from ..hardware import peak_flops, peak_memory
from ..recipe.keys import Recipe, flatten
from ..recipe.schedules import Values

logger = logging.getLogger(__name__)


class Tracker:
    """Writes the metrics of one run, which has done `step` steps in `elapsed_s`, and whose model has `token_flops`.

    Every process has one; only the main process writes.
    """

    def __init__(self, accelerator: Accelerator, recipe: Recipe, step: int, elapsed_s: float, token_flops: int):
        self.accelerator, self.file = accelerator, recipe.folder / "metrics.jsonl"
        self.log_every, self.max_steps = recipe.tracking.log_every, recipe.training.max_steps
        self.began = time.perf_counter() - elapsed_s
        self.since: float | None = None  # when the step ended since which speed is measured
        self.num_targets = self.num_tokens = 0  # since then
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        peak = torch.tensor(peak_flops(accelerator.device, half, torch.get_num_threads()), device=accelerator.device)
        self.peak_tokens = accelerator.reduce(peak, "sum").item() / token_flops  # per second
        if accelerator.is_main_process:
            _cut_after(self.file, step)
        if recipe.tracking.trackers:
            values = flatten(recipe.to_dict()).items()
            config = {key: value if isinstance(value, int | float | str) else str(value) for key, value in values}
            options = _tracker_options(recipe, step) if accelerator.is_main_process else {}
            accelerator.init_trackers(recipe.tracking.project, config, options)
        self.trackers = accelerator.trackers if accelerator.is_main_process else []
        for tracker in self.trackers:
            if tracker.name == "wandb":  # all curves over our step, so that a resumed run continues them
                tracker.tracker.define_metric("step")
                tracker.tracker.define_metric("*", step_metric="step")
        hidden = not (accelerator.is_main_process and sys.stderr.isatty())
        self.bar = tqdm(total=self.max_steps, initial=step, unit="step", desc=recipe.run.name, disable=hidden)

    @property
    def elapsed_s(self) -> float:
        """Seconds of the run, those before restarts included."""
        return time.perf_counter() - self.began

    def is_due(self, step: int) -> bool:
        """Whether `step` gets a line of training metrics."""
        return step == 1 or step % self.log_every == 0 or step == self.max_steps

    def count_step(self, num_targets: int, num_tokens: int) -> None:
        """Counts a step of `num_targets`, among `num_tokens` that are computed, over all processes."""
        self.bar.update()
        if self.since is None:
            self.since = time.perf_counter()
        else:
            self.num_targets, self.num_tokens = self.num_targets + num_targets, self.num_tokens + num_tokens

    def log_step(
        self, step: int, tokens: int, losses: Sequence[float], grad_norm: float, values: Values, ratio: float
    ) -> dict[str, float]:
        """Logs a step and returns its metrics, without speeds.

        Args:
            tokens: targets of the run so far.
            losses: of each step since the last line.
            grad_norm: before clipping.
            ratio: `update_ratio`.
        """
        loss = math.fsum(losses) / len(losses)
        metrics = {"train/loss": loss, **values._asdict(), "grad_norm": grad_norm, "update_ratio": ratio}
        shown, speeds, now = {"loss": f"{loss:.3f}", "lr": f"{values.lr:.1e}"}, {}, time.perf_counter()
        if self.since is not None and self.num_targets:
            seconds = now - self.since
            speed, share = self.num_targets / seconds, self.num_tokens / seconds / self.peak_tokens
            speeds = {"tokens_per_second": speed, "mfu": share}
            shown |= {"tok/s": f"{speed:,.0f}", "mfu": f"{share:.0%}"}
        self.since, self.num_targets, self.num_tokens = now, 0, 0
        self.write(step, tokens, metrics | speeds)
        shown["memory"] = f"{peak_memory(self.accelerator.device) / 1e9:.2f} GB"
        self.bar.set_postfix(shown)
        if self.bar.disable:
            self.say(f"step {step}/{self.max_steps}  " + "  ".join(f"{name} {value}" for name, value in shown.items()))
        return metrics

    def log_evaluation(self, step: int, tokens: int, metrics: dict[str, float], watched: dict[str, float]) -> None:
        """Logs an evaluation and other metrics of the boundary; the time since the last step is no training."""
        self.since, self.num_targets, self.num_tokens = None, 0, 0
        self.write(step, tokens, {**metrics, **watched})
        shown = "  ".join(f"{name.removeprefix('eval/')} {metrics[name]:.4f}" for name in metrics if "eval" in name)
        self.say(f"step {step}/{self.max_steps}  validation: {shown}")

    def write(self, step: int, tokens: int, metrics: dict[str, float]) -> None:
        """Writes one line of `metrics.jsonl`, and the same to the trackers under the run's own step."""
        values = {"tokens": tokens, "elapsed_s": round(self.elapsed_s, 3), **metrics}
        if self.accelerator.is_main_process:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            with open(self.file, "a") as file:
                file.write(json.dumps({"step": step, **finite}) + "\n")
        for tracker in self.trackers:
            _log(tracker, values, step)

    def log_samples(self, step: int, samples: list[str]) -> None:
        """Prints texts that the model wrote, and gives them to the trackers."""
        for text in samples:
            self.say(f"--- a sample\n{text}\n---")
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                indented = {f"sample/{i}": textwrap.indent(text, "    ") for i, text in enumerate(samples)}
                tracker.log(indented, step=step)  # Markdown leaves indented text alone
            else:
                table = pandas.DataFrame({"step": step, "text": samples})
                _log(tracker, {"samples": import_module(tracker.name).Table(dataframe=table)}, step)

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Gives a PNG file to the trackers."""
        for tracker in self.trackers:
            if tracker.name == "tensorboard":
                tracker.log_images({name: imread(path)[None, :, :, :3]}, step=step, dataformats="NHWC")
            else:
                _log(tracker, {name: import_module(tracker.name).Image(str(path))}, step)

    def say(self, text: str) -> None:
        """Prints above the progress bar, once for all processes."""
        if self.accelerator.is_main_process:
            self.bar.write(text, file=sys.stdout)

    def close(self) -> None:
        """Ends the bar and the trackers."""
        self.bar.close()
        if self.accelerator.trackers:
            self.accelerator.end_training()


def _cut_after(file: Path, step: int) -> None:
    """Drops the lines after `step`, which a resumed run writes again, and any incomplete line."""
    if file.exists():
        lines = re.findall(r'^(\{"step": (\d+), .*\})$', file.read_text(errors="replace"), re.MULTILINE)
        write_file(file, "".join(f"{line}\n" for line, number in lines if step and int(number) <= step))


def _log(tracker: GeneralTracker, values: dict[str, Any], step: int) -> None:
    """Gives values to a tracker under our `step`."""
    key = {} if tracker.name == "trackio" else {"step": step}  # trackio reserves the key
    # Not as wandb's own step, below which it drops values; `define_metric` draws over the key instead.
    tracker.log(key | values, **({} if tracker.name == "wandb" else {"step": step}))


def _tracker_options(recipe: Recipe, step: int) -> dict[str, dict[str, Any]]:
    """What each tracker needs to name the run, and to resume it if `step` is not 0."""
    name, file = recipe.run.name, recipe.folder / "wandb" / "id"
    options: dict[str, dict[str, Any]] = {tracker: {} for tracker in recipe.tracking.trackers}
    if "tensorboard" in options and step:
        options["tensorboard"]["purge_step"] = step + 1  # hides the steps that were not kept
    if "trackio" in options:
        options["trackio"] = {"name": name, "resume": "allow" if step else "never"}
    if "wandb" in options:
        if not step or not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4))
        options["wandb"] = {"id": file.read_text(), "name": name, "dir": str(recipe.folder), "resume": "allow"}
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
