"""Metrics: `metrics.jsonl`, the progress bar and the trackers, from one place that knows when each is due."""

import importlib
import json
import logging
import math
import os
import secrets
import sys
import textwrap
import time
from pathlib import Path

import pandas
import torch
from accelerate import Accelerator
from matplotlib.image import imread
from tqdm import tqdm

from .files import write_file
from .monitoring import peak_flops, peak_memory

logger = logging.getLogger(__name__)


class Tracker:
    """Writes the metrics of one run. Every process has one; only the main process writes.

    Args:
        accelerator: with its trackers. recipe: as resolved.
        progress: where the run starts. max_steps: where it ends. token_flops: `flops_per_token` of the model.
    """

    def __init__(self, accelerator: Accelerator, recipe, progress, max_steps: int, token_flops: int):
        section, config, step = recipe.tracking, recipe.to_dict(), progress.step
        self.accelerator, self.log_every, self.max_steps = accelerator, section.log_every, max_steps
        self.file = recipe.folder / "metrics.jsonl"
        self.began = time.perf_counter() - progress.elapsed_s
        self.last_time, self.last_tokens = None, 0
        half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)
        peak = torch.tensor(peak_flops(accelerator.device, half, torch.get_num_threads()), device=accelerator.device)
        self.most_tokens = accelerator.reduce(peak, "sum").item() / token_flops  # a second, were all peak
        if accelerator.is_main_process:
            _cut_after(self.file, step)
        if section.trackers:
            options = _tracker_options(recipe, step) if accelerator.is_main_process else {}
            accelerator.init_trackers(section.project, _flatten(config), options)
            _use_own_step(accelerator)
        self.bar = tqdm(
            total=max_steps,
            initial=step,
            unit="step",
            desc=config["run"]["name"],
            disable=not accelerator.is_main_process or not sys.stderr.isatty(),
        )

    @property
    def elapsed_s(self) -> float:
        """Seconds of the run, those before restarts included."""
        return time.perf_counter() - self.began

    def is_due(self, step: int) -> bool:
        """Whether `step` gets a line of training metrics."""
        return step == 1 or step % self.log_every == 0 or step == self.max_steps

    def log_step(self, progress, loss: torch.Tensor, grad_norm: torch.Tensor, ratio: float | None, values) -> None:
        """Takes in a finished step; reads it from the device only when a line is due.

        Args:
            progress: with step and tokens. loss: this process's part of the mean loss. grad_norm: before clipping.
            ratio: `update_ratio`, where a line is due. values: `lr`, `weight_decay`, `accumulation` of the step.
        """
        self.bar.update()
        if self.last_time is None:
            self.last_time, self.last_tokens = time.perf_counter(), progress.tokens
        if not self.is_due(progress.step):
            return
        metrics = {
            "train/loss": self.accelerator.reduce(loss, "sum").item(),
            **values._asdict(),
            "grad_norm": float(grad_norm),
            "update_ratio": ratio,
        }
        progress.logged = dict(metrics)
        now = time.perf_counter()
        if progress.tokens > self.last_tokens:
            metrics["tokens_per_second"] = (progress.tokens - self.last_tokens) / (now - self.last_time)
            metrics["mfu"] = metrics["tokens_per_second"] / self.most_tokens
        self.last_time, self.last_tokens = now, progress.tokens
        self.write(progress, metrics)
        shown = {"loss": f"{metrics['train/loss']:.3f}", "lr": f"{values.lr:.1e}"}
        if "tokens_per_second" in metrics:
            shown["tok/s"] = f"{metrics['tokens_per_second']:,.0f}"
            shown["mfu"] = f"{metrics['mfu']:.0%}"
        shown["memory"] = f"{peak_memory(self.accelerator.device) / 1e9:.2f} GB"
        self.bar.set_postfix(shown)
        if self.bar.disable:
            self.say(f"step {progress.step}/{self.max_steps}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))

    def log_evaluation(self, progress, metrics: dict[str, float], watched: dict[str, float]) -> None:
        """Takes in an evaluation and what is watched besides; the time since the last step is no training."""
        self.last_time = None
        self.write(progress, {**metrics, **watched})
        shown = "  ".join(
            f"{name.removeprefix('eval/')} {value:.4f}" for name, value in metrics.items() if "eval" in name
        )
        self.say(f"step {progress.step}/{self.max_steps}  validation: {shown}")

    def write(self, progress, metrics: dict[str, float]) -> None:
        """One line of `metrics.jsonl`, and the same to the trackers under the run's own step."""
        values = {"tokens": progress.tokens, "elapsed_s": round(self.elapsed_s, 3), **metrics}
        if self.accelerator.is_main_process:
            with open(self.file, "a") as file:
                finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
                file.write(json.dumps({"step": progress.step, **finite}) + "\n")
        for tracker in self.accelerator.trackers:
            _log(tracker, values, progress.step)

    def log_samples(self, progress, samples: list[str]) -> None:
        """Shows texts that the model wrote, and gives them to the trackers."""
        for text in samples:
            self.say(f"--- a sample\n{text}\n---")
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "tensorboard":
                for number, text in enumerate(samples):  # indented: Markdown shows it as it is
                    tracker.log({f"sample/{number}": textwrap.indent(text, "    ")}, step=progress.step)
            else:
                table = _package(tracker).Table(dataframe=pandas.DataFrame({"step": progress.step, "text": samples}))
                _log(tracker, {"samples": table}, progress.step)

    def log_picture(self, progress, name: str, path: Path) -> None:
        """Gives a PNG file to the trackers."""
        for tracker in self.accelerator.trackers if self.accelerator.is_main_process else []:
            if tracker.name == "tensorboard":
                tracker.log_images({name: imread(path)[None, :, :, :3]}, step=progress.step, dataformats="NHWC")
            else:
                _log(tracker, {name: _package(tracker).Image(str(path))}, progress.step)

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
    """Drops the lines after `step`, which a resumed run writes anew, and a last line that was cut off."""
    if not file.exists():
        return
    kept = []
    for line in file.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, TypeError, KeyError):
            continue
    write_file(file, "".join(kept) if step else "")


def _flatten(config: dict, prefix: str = "") -> dict:
    """Nested keys as dotted ones, with values that every tracker can store."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (int, float, str, bool)) else str(value)
    return flat


def _log(tracker, values: dict, step: int) -> None:
    """Gives values to a tracker under our `step`."""
    if tracker.name != "trackio":  # which has no room for a value of this name
        values = {"step": step, **values}
    # wandb drops what comes before its own step, and draws everything over the value instead.
    tracker.log(values, **({} if tracker.name == "wandb" else {"step": step}))


def _tracker_options(recipe, step: int) -> dict:
    """What each tracker needs to name the run, and to go on with it where `step` is not 0."""
    options = {name: {} for name in recipe.tracking.trackers}
    if "tensorboard" in options and step:
        options["tensorboard"]["purge_step"] = step + 1  # of the steps that were not kept
    if "trackio" in options:
        options["trackio"] = {"name": recipe.run.name, "resume": "allow" if step else "never"}
    if "wandb" in options:
        import wandb

        file = recipe.folder / "wandb" / "id"
        if not step or not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(secrets.token_hex(4))
        options["wandb"] = {
            "name": recipe.run.name,
            "dir": str(recipe.folder),
            "id": file.read_text(),
            "resume": "allow",
            "mode": os.environ.get("WANDB_MODE") or ("online" if _is_logged_in(wandb) else "offline"),
        }
    return options


def _is_logged_in(wandb) -> bool:
    """Whether wandb can be reached with an account: without it would ask for one, or end the run."""
    try:
        return wandb.login(prompt=False)
    except wandb.errors.Error as error:
        logger.warning(f"wandb writes offline, `wandb sync` sends it later: {error}")
        return False


def _use_own_step(accelerator: Accelerator) -> None:
    """Lets wandb draw everything over our `step`, so that a resumed run continues its curves."""
    for tracker in accelerator.trackers if accelerator.is_main_process else []:
        if tracker.name == "wandb":
            tracker.tracker.define_metric("step")
            tracker.tracker.define_metric("*", step_metric="step")


def _package(tracker):
    """wandb or trackio: the same names for the same things."""
    return importlib.import_module(tracker.name)
