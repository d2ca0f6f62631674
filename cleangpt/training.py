"""The loop: a recipe in, a trained model out.

    each step         batch ──> micro-steps ──> one update ──> a line of metrics when it is due
    at a boundary     evaluate on the validation split ──> keep the best ──> checkpoint ──> stop early?
    at the end        final/, and for arithmetic the accuracy on the test split

`run.py` builds the parts, `step.py` is what happens inside a step; each other part lives in the module of its name.
"""

import errno
import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from . import schedules
from .card import write_card
from .checkpoint import newest_checkpoint, take_snapshot, write_checkpoint, write_model
from .errors import Stopped, UserError
from .evaluation import MOST_PROBLEMS, continue_texts, evaluate, final_samples
from .interruption import Interruption
from .models.build import resolve_block_size
from .monitoring import copy_weights, update_ratio, weight_norms
from .outputs import find_start, hold_folder
from .recipe import ARITHMETIC, Recipe
from .run import Run, build_run
from .step import accumulate, seed_dropout, step_seed, update


def train(recipe: Recipe) -> Path:
    """Trains the model of a recipe, going on where the run's folder left off.

    Returns:
        The path of `final`, a `from_pretrained` folder.

    Raises:
        UserError: for what the user has to mend: data, checkpoint, output folder, number of processes, a full disk.
        Stopped: when a signal asked for it, or training diverged.
    """
    resolve_block_size(recipe)
    with hold_folder(recipe), Interruption() as interruption:
        start = find_start(recipe)
        if start.finished:
            if os.environ.get("RANK", "0") == "0":
                print(f"{recipe.folder} is finished already")
            return recipe.folder / "final"
        run = build_run(recipe, start)
        interruption.patient = True
        try:
            return train_run(run, interruption)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES):
                raise
            message = f"{recipe.folder} cannot be written to: {error.strerror}; the same command goes on from the last "
            raise UserError(("run.output_dir", f"{message}checkpoint once it can")) from error


def train_run(run: Run, interruption: Interruption) -> Path:
    """The loop itself; arguments and result as of `train`."""
    recipe, progress, accelerator = run.recipe, run.progress, run.accelerator
    limit = recipe.training.max_grad_norm
    while True:
        if progress.boundary != progress.step and is_boundary(run):
            boundary(run)
        if progress.step == run.max_steps or progress.stopped_early:
            return finish(run)
        step = progress.step + 1
        batch = run.loader.batch(step)  # a pure function of seed and step
        values = schedules.at(recipe.schedule, recipe.optimizer, step, run.max_steps)
        seed_dropout(step_seed(recipe.run.seed, step, accelerator.process_index), accelerator.device)
        loss = accumulate(accelerator, run.model, batch)  # exact over all targets, one synchronisation
        before = copy_weights(run.model) if run.tracker.is_due(step) else None
        # Rate and weight decay set, clipped, stepped, zeroed; left out where loss or gradient are not finite.
        grad_norm, updated, stop = update(
            accelerator, run.model, run.optimizers, values, limit, loss, interruption.requested
        )
        progress.step, progress.tokens = step, progress.tokens + batch.num_targets
        progress.skipped = 0 if updated else progress.skipped + 1
        ratio = update_ratio(before, run.model) if before else None
        run.tracker.log_step(progress, loss, grad_norm, ratio, values)  # decides itself when it is due
        if not updated:
            skipped(run, loss, grad_norm)
        if stop:
            stopped(run)


def is_boundary(run: Run) -> bool:
    """Whether a macro-batch ends with the step just done; step 0 counts, to be evaluated."""
    return run.progress.step % run.recipe.training.macro_batch == 0 or run.progress.step == run.max_steps


def boundary(run: Run) -> None:
    """The end of a macro-batch. Each part happens when it is due: evaluation, best model, checkpoint, push."""
    recipe, progress, folder = run.recipe, run.progress, run.recipe.folder
    macro_batch, last = -(-progress.step // recipe.training.macro_batch), progress.step == run.max_steps
    progress.metrics, progress.boundary, better = {}, progress.step, False
    if macro_batch % recipe.evaluation.every == 0 or last:
        progress.metrics = evaluate_validation(run)
    if progress.step == 0:
        return
    if progress.metrics:
        better = progress.update_best(recipe.checkpoint.metric, recipe.training.early_stopping)
    due = macro_batch % recipe.checkpoint.every == 0 or last or progress.stopped_early
    save(run, folder / "best" if better else None, due)
    if recipe.hub.push and (better if recipe.hub.every is None else macro_batch % recipe.hub.every == 0):
        run.saver.submit(run.publisher.push, folder / "best", f"Best model, pushed at step {progress.step}")


def save(run: Run, folder: Path | None, checkpoint: bool, samples: list[str] | None = None) -> None:
    """Copies the state of the run, and leaves it to the background to write a model's folder, a checkpoint, or both.

    `samples` of the final model make its card the run's report.
    """
    if folder is None and not checkpoint:
        return
    run.saver.wait()
    run.progress.elapsed_s = run.tracker.elapsed_s
    snapshot = take_snapshot(run.accelerator, run.model, run.optimizers)
    model, progress = run.accelerator.unwrap_model(run.model), replace(run.progress)
    if folder is not None:
        card = partial(write_card, run=replace(run, progress=progress), samples=samples)
        run.saver.submit(write_model, folder, model, snapshot, run.data.tokenizer, card)
    if checkpoint:
        recipe, tokenizer = run.recipe, run.data.tokenizer
        arguments = (recipe.folder, model, snapshot, tokenizer, progress, recipe.to_yaml(), recipe.checkpoint)
        run.saver.submit(write_checkpoint, *arguments)


def skipped(run: Run, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
    """Tells of an update that was left out, and stops the run when there were too many in a row."""
    progress, most = run.progress, run.recipe.training.max_skipped
    figures = f"loss {run.accelerator.reduce(loss, 'sum').item()}, gradient norm {float(grad_norm)}"
    run.tracker.say(f"step {progress.step}: {figures}; the update was left out ({progress.skipped} in a row)")
    if progress.skipped <= most:
        return
    run.saver.wait()
    samples = run.loader.indices(progress.step)
    shown = ", ".join(map(str, samples[:20])) + (f" and {len(samples) - 20} more" if len(samples) > 20 else "")
    last = f"{newest_checkpoint(run.recipe.folder) or 'none'} is the last good checkpoint"
    run.publisher.close(run.tracker.say, wait=False)
    raise Stopped(1, f"diverged at step {progress.step}, samples {shown}: {figures}; {last}, see training.max_skipped")


def stopped(run: Run) -> None:
    """Saves after a signal and ends the run."""
    save(run, None, checkpoint=True)
    run.saver.wait()
    run.accelerator.wait_for_everyone()
    run.publisher.close(run.tracker.say, wait=False)
    run.tracker.close()
    raise Stopped(143, f"by a signal after step {run.progress.step}, saved; the same command goes on from there")


def evaluate_validation(run: Run) -> dict[str, float]:
    """Measures the validation split and lets the model continue the recipe's prompts; logs and shows both."""
    recipe, section, progress = run.recipe, run.recipe.evaluation, run.progress
    num_rows = section.num_problems if recipe.data.path in ARITHMETIC else None
    split = run.data.splits["validation"]
    figures = evaluate(run.accelerator, run.model, split, section.batch_size, section.max_batches, num_rows)
    metrics = {f"eval/{name}": value for name, value in figures.items()}
    watched = run.loader.coverage(progress.step) | weight_norms(run.model)
    run.tracker.log_evaluation(progress, metrics, watched)
    if section.prompts:
        model = run.accelerator.unwrap_model(run.model)
        texts = continue_texts(
            model, run.data.tokenizer, section.prompts, recipe.run.seed, 100, do_sample=True, top_k=50
        )
        run.tracker.log_samples(progress, texts)
    return metrics


def finish(run: Run) -> Path:
    """Writes `final`, shows what the model can do and how to load it."""
    recipe, data, say, final = run.recipe, run.data, run.tracker.say, run.recipe.folder / "final"
    model = run.accelerator.unwrap_model(run.model)
    if "test" in data.splits:
        split = data.splits["test"]
        graded = min(len(split), MOST_PROBLEMS) if recipe.data.path in ARITHMETIC else len(split)
        figures = evaluate(run.accelerator, run.model, split, recipe.evaluation.batch_size, num_rows=graded)
        run.progress.metrics = run.progress.metrics | {f"test/{name}": value for name, value in figures.items()}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        say(f"test split, {graded:,} sequences: {shown}")
    samples = final_samples(model, data, recipe)
    if recipe.data.path in ARITHMETIC:
        order = ", last digit first" if recipe.data.reverse_answer else ""
        say(f"held-out problems with the model's answers{order}:\n  " + samples[0].replace("\n", "\n  "))
    save(run, final, False, samples)
    run.saver.wait()
    run.accelerator.wait_for_everyone()
    run.tracker.log_picture(run.progress, "curves", final / "curves.png")
    run.publisher.push(final, f"Final model, step {run.progress.step}")
    say(f"The model is in {final}. To load it:")
    say(f'  import cleangpt; model = transformers.AutoModelForCausalLM.from_pretrained("{final}")')
    run.publisher.close(say)
    run.tracker.close()
    return final
