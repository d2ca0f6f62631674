"""The loop: a recipe in, a trained model out.

    each step         batch ──> micro-steps ──> one update ──> a line of metrics when it is due
    at a boundary     evaluate on the validation split ──> keep the best ──> checkpoint ──> stop early?
    at the end        final/, and for arithmetic the accuracy on the test split

`setup.py` builds the parts, `step.py` is what happens inside a step, `boundary.py` what happens between macro-batches.
`data/loader.py` decides the order of samples, `optim.py` sets rate and weight decay, and `files.py` verifies the bytes
of the checkpoint that `run_folder.py` finds.
"""

import errno
import itertools
import math
import shlex
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import PartialState

from ..errors import Stopped, UserError
from ..hardware import seed_device
from ..models.statistics import copy_weights, histograms, update_ratio
from ..recipe import schedules
from ..recipe.keys import Recipe
from .boundary import end_macro_batch, finish, save
from .checkpoint import newest_checkpoint
from .launch import join_processes, on_main
from .noise import add_step, noise_scale
from .run import TrainingRun
from .run_folder import hold_folder
from .seeds import describe_spread, one_per_seed
from .setup import build_run, find_run
from .signals import StopSignals
from .step import accumulate, gradient_histograms, step_seed, update


def train(recipe: Recipe) -> Path:
    """Trains the model of a recipe, once or with each of its `run.seeds`, resuming the runs that their folders hold.

    Returns:
        The path of `final`, a `from_pretrained` folder; of several runs the last one's.

    Raises:
        UserError: for a mistake in the recipe, data, checkpoint, output folder or number of processes; for a full disk.
        Stopped: after a signal, or if training diverged.
    """
    if recipe.run.seeds is None:
        return train_run(recipe)
    runs = one_per_seed(recipe)
    finals = [train_run(run) for run in runs]
    if PartialState().is_main_process:
        print(describe_spread([run.folder for run in runs]))
    return finals[-1]


def train_run(recipe: Recipe) -> Path:
    """`train` for one run."""
    with StopSignals() as signals:
        join_processes()
        with hold_folder(recipe.folder):
            recipe, data, start = find_run(recipe)
            if start.finished:
                if PartialState().is_main_process:
                    print(f"{recipe.folder} is finished already")
                return recipe.folder / "final"
            run = build_run(recipe, data, start)
            signals.patient = True
            try:
                return run_steps(run, signals)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
                    raise
                message = f"{recipe.folder} cannot be written to: {error.strerror}; once it can, the same command "
                raise UserError(("run.output_dir", f"{message}resumes from the last checkpoint")) from error


def run_steps(run: TrainingRun, signals: StopSignals) -> Path:
    """The loop itself; results and errors as in `train`."""
    recipe, progress, accelerator = run.recipe, run.progress, run.accelerator
    while True:
        at_end = progress.step == run.max_steps
        at_boundary = progress.step % recipe.training.macro_batch == 0 or at_end  # step 0 is one, to be evaluated
        if at_boundary and progress.boundary != progress.step:
            end_macro_batch(run)
        if at_end or progress.stopped_early:
            return finish(run)
        step = progress.step + 1
        batch = run.loader.batch(step)  # a pure function of seed and step
        values = schedules.at(recipe.schedule, recipe.optimizer, step, run.max_steps)
        seed_device(step_seed(recipe.run.seed, step, accelerator.process_index), accelerator.device)
        loss = accumulate(accelerator, run.model, batch)  # exact over all targets, one synchronisation
        is_due, is_drawn = run.tracker.is_due(step), run.tracker.is_drawn(step)
        gradients = gradient_histograms(run) if is_drawn else {}
        before = copy_weights(run.model) if is_due else None
        run.unread.append(update(run, values, loss))  # clipped, stepped, zeroed; skipped if the gradient is not finite
        if run.average is not None:
            run.average.update(step)
        progress.step, progress.tokens = step, progress.tokens + batch.num_targets
        run.tracker.count_step(batch.num_targets, batch.num_tokens)
        stop = run.stop_vote(signals.received)
        if is_due or stop or step % recipe.training.macro_batch == 0:
            grad_norm = read_steps(run)  # only here does the loop wait for the device
        if before is not None:
            watched = {"grad_norm": grad_norm, "update_ratio": update_ratio(before, run.model)}
            watched |= {"gradient_noise": noise_scale(progress.noise)} if run.noise else {}
            run.tracker.log_step(progress, values, watched)
        if is_drawn:
            run.tracker.log_histograms(step, gradients | histograms(run.model))
        if stop:
            save_and_stop(run, signals.exit_code)


def read_steps(run: TrainingRun) -> float:
    """Reads the figures of the latest steps, reports skipped updates, and returns the last gradient's norm.

    Ends the run with `Stopped` after too many gradients in a row that are not finite.
    """
    progress, figures = run.progress, torch.stack(run.unread)  # (steps, 5)
    run.unread.clear()
    sums = run.accelerator.reduce(figures[:, :2].contiguous(), "sum").tolist()  # over processes
    first = progress.step - len(sums) + 1
    for step, (loss, squares), (_, _, grad_norm, before, after) in zip(itertools.count(first), sums, figures.tolist()):
        progress.losses.append(loss)
        if math.isfinite(grad_norm):
            progress.skipped = 0
            if run.noise:
                parts = squares / (run.accelerator.num_processes * before) ** 2
                progress.noise = add_step(progress.noise, grad_norm**2, parts, *run.loader.shares(step))
            continue
        overflow = math.isfinite(loss) and before > 1 and after < before  # only the scale was too large
        progress.skipped += not overflow
        count = "overflow in fp16" if overflow else f"{progress.skipped} in a row"
        text = f"loss {loss}, gradient norm {grad_norm}"
        run.tracker.say(f"step {step}: {text}; the update was skipped ({count})")
        if progress.skipped > run.recipe.training.max_skipped:
            end_diverged(run, step, text)
    return grad_norm


def end_diverged(run: TrainingRun, step: int, figures: str) -> NoReturn:
    """Ends a run that diverged at `step` with `Stopped`, which says how to branch from the last good checkpoint."""
    recipe = run.recipe
    run.saver.wait()
    samples = run.loader.indices(step)
    shown = ", ".join(map(str, samples[:20])) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
    way_out = "there is no checkpoint; try a lower optimizer.lr"
    if checkpoint := on_main(newest_checkpoint, recipe.folder):
        name, lr = f"{recipe.run.name}-2", f"{recipe.optimizer.lr / 2:g}"
        options = shlex.join([f"--training.resume={checkpoint}", f"--run.name={name}", f"--optimizer.lr={lr}"])
        way_out = f"{checkpoint} is the last good checkpoint; to branch from it with a lower rate, add {options}"
    run.publisher.close(run.tracker.say, wait=False)
    run.tracker.close()
    raise Stopped(1, f"diverged at step {step}, samples {shown}: {figures}; {way_out}")


def save_and_stop(run: TrainingRun, code: int) -> None:
    """Saves a checkpoint and ends the run with `Stopped`, whose exit code is `code`."""
    is_saved = run.recipe.checkpoint.save
    save(run, None, checkpoint=is_saved)
    run.saver.wait()
    run.accelerator.wait_for_everyone()
    run.publisher.close(run.tracker.say, wait=False)
    run.tracker.close()
    saved = "saved; the same command resumes from there" if is_saved else "not saved, as checkpoint.save is false"
    raise Stopped(code, f"by a signal after step {run.progress.step}, {saved}")
