"""The loop: a recipe in, a trained model out.

    each step         batch ──> micro-steps ──> one update ──> a line of metrics when it is due
    at a boundary     evaluate on the validation split ──> keep the best ──> checkpoint ──> stop early?
    at the end        final/, and for arithmetic the accuracy on the test split

`setup.py` builds the parts, `step.py` is what happens inside a step, `boundary.py` what happens between macro-batches.
`data/loader.py` decides the order of samples, `optim.py` sets rate and weight decay, and `files.py` verifies the bytes
of the checkpoint that `run_folder.py` finds.
"""

import errno
import shlex
from pathlib import Path

import torch
from accelerate import PartialState

from ..errors import Stopped, UserError
from ..models.statistics import copy_weights, update_ratio
from ..recipe import schedules
from ..recipe.keys import Recipe
from .boundary import end_macro_batch, finish, save
from .checkpoint import newest_checkpoint
from .launch import join_processes, on_main
from .run import TrainingRun
from .run_folder import hold_folder
from .setup import build_run, find_run
from .signals import StopSignals
from .step import accumulate, seed_dropout, step_seed, update


def train(recipe: Recipe) -> Path:
    """Trains the model of a recipe, resuming the run that its folder holds.

    Returns:
        The path of `final`, a `from_pretrained` folder.

    Raises:
        UserError: for a mistake in the recipe, data, checkpoint, output folder or number of processes; for a full disk.
        Stopped: after a signal, or if training diverged.
    """
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
        seed_dropout(step_seed(recipe.run.seed, step, accelerator.process_index), accelerator.device)
        loss = accumulate(accelerator, run.model, batch)  # exact over all targets, one synchronisation
        before = copy_weights(run.model) if run.tracker.is_due(step) else None
        # Rate and weight decay set, clipped, stepped, zeroed; skipped if loss or gradient are not finite.
        grad_norm, skipped, stop = update(run, values, loss, signals.received)
        progress.step, progress.tokens = step, progress.tokens + batch.num_targets
        progress.skipped = progress.skipped + (skipped == "not finite") if skipped else 0
        ratio = update_ratio(before, run.model) if before else None
        progress.logged = run.tracker.log_step(step, progress.tokens, loss, grad_norm, values, ratio) or progress.logged
        if skipped:
            report_skipped_update(run, skipped, loss, grad_norm)
        if stop:
            save_and_stop(run)


def report_skipped_update(run: TrainingRun, why: str, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
    """Reports a skipped update, and ends the run with `Stopped` after too many in a row that were not finite."""
    progress, recipe = run.progress, run.recipe
    figures = f"loss {run.accelerator.reduce(loss, 'sum').item()}, gradient norm {float(grad_norm)}"
    count = "overflow in fp16" if why == "overflow" else f"{progress.skipped} in a row"
    run.tracker.say(f"step {progress.step}: {figures}; the update was skipped ({count})")
    if why == "overflow" or progress.skipped <= recipe.training.max_skipped:
        return
    run.saver.wait()
    samples = run.loader.indices(progress.step)
    shown = ", ".join(map(str, samples[:20])) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
    way_out = "there is no checkpoint; try a lower optimizer.lr"
    if checkpoint := on_main(newest_checkpoint, recipe.folder):
        name, lr = f"{recipe.run.name}-2", f"{recipe.optimizer.lr / 2:g}"
        options = shlex.join([f"--training.resume={checkpoint}", f"--run.name={name}", f"--optimizer.lr={lr}"])
        way_out = f"{checkpoint} is the last good checkpoint; to branch from it with a lower rate, add {options}"
    run.publisher.close(run.tracker.say, wait=False)
    run.tracker.close()
    raise Stopped(1, f"diverged at step {progress.step}, samples {shown}: {figures}; {way_out}")


def save_and_stop(run: TrainingRun) -> None:
    """Saves a checkpoint and ends the run with `Stopped`."""
    save(run, None, checkpoint=True)
    run.saver.wait()
    run.accelerator.wait_for_everyone()
    run.publisher.close(run.tracker.say, wait=False)
    run.tracker.close()
    raise Stopped(143, f"by a signal after step {run.progress.step}, saved; the same command resumes from there")
