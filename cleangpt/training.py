"""The loop: a recipe in, a trained model out.

    each step         batch ──> micro-steps ──> one update ──> a line of metrics when it is due
    at a boundary     evaluate on the validation split ──> keep the best ──> checkpoint ──> stop early?
    at the end        final/, and for arithmetic the accuracy on the test split

`run.py` builds the parts; each of them lives in the module of its name.
"""

import contextlib
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from torch import nn
from torch.nn import functional as F

from . import schedules
from .card import model_card
from .checkpoint import prune, save_checkpoint, save_model
from .data.loader import Batch
from .data.splits import IGNORED
from .evaluation import MOST_PROBLEMS, continue_texts, evaluate, solve
from .hub import push_folder
from .models.build import resolve_block_size
from .optim import apply_updates, set_hyperparameters
from .outputs import find_start
from .recipe import ARITHMETIC, Recipe
from .run import Run, build_run


def train(recipe: Recipe) -> Path:
    """Trains the model of a recipe, going on where the run's folder left off.

    Returns:
        The path of `final`, a `from_pretrained` folder.

    Raises:
        UserError: for what the user has to mend: data, checkpoint, output folder, number of processes.
    """
    resolve_block_size(recipe)
    start = find_start(recipe)
    if start.finished:
        PartialState(cpu=not torch.accelerator.is_available()).print(f"{recipe.folder} is finished already")
        return recipe.folder / "final"
    run = build_run(recipe, start)
    progress = run.progress

    if progress.step == 0:
        evaluate_validation(run)
    while progress.step < run.max_steps and not progress.stopped_early:
        step = progress.step + 1
        batch = run.loader.batch(step)  # a pure function of seed and step
        values = schedules.at(recipe.schedule, recipe.optimizer, step, run.max_steps)
        seed_dropout(step_seed(recipe.run.seed, step, run.accelerator.process_index), run.accelerator.device)
        loss = accumulate(run.accelerator, run.model, batch)  # exact over all targets, one synchronisation
        grad_norm = update(run, values)  # rate and weight decay set, clipped, stepped, zeroed
        progress.step, progress.tokens = step, progress.tokens + batch.num_targets
        run.tracker.log_step(progress, loss, grad_norm, values)  # decides itself when it is due
        if step % recipe.training.macro_batch == 0 or step == run.max_steps:
            boundary(run)
    return finish(run)


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of all randomness in one step of one process, so that a resumed run draws the same."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0])


def seed_dropout(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and `device` alone: to seek every other kind costs half a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def accumulate(accelerator: Accelerator, model: nn.Module, batch: Batch) -> torch.Tensor:
    """Adds up the gradient of the mean loss over all targets of a step, however they are split.

    Returns:
        This process's part of that mean loss, in nats; the parts of all processes add up to it.
    """
    total = torch.zeros((), device=accelerator.device)
    for i, micro_batch in enumerate(batch.micro_batches):
        last = i == len(batch.micro_batches) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            targets = micro_batch.pop("targets")  # (rows, time)
            logits = model(**micro_batch, use_cache=False).logits  # (rows, time, vocab)
            nats = F.cross_entropy(
                logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="sum"
            )
            loss = nats / batch.num_targets
            accelerator.backward(loss * accelerator.num_processes)  # processes average their gradients: undone here
        total += loss.detach()
    return total


def update(run: Run, values: schedules.Values) -> torch.Tensor:
    """One optimizer step at this step's rate and weight decay; returns the gradient's norm before clipping."""
    set_hyperparameters(run.optimizers, values.lr, values.weight_decay)
    limit = run.recipe.training.max_grad_norm or float("inf")
    grad_norm = run.accelerator.clip_grad_norm_(run.model.parameters(), limit)
    apply_updates(run.optimizers)
    return grad_norm


def boundary(run: Run) -> None:
    """The end of a macro-batch. Each part happens when it is due: evaluation, best model, checkpoint, push."""
    recipe, progress, folder = run.recipe, run.progress, run.recipe.folder
    macro_batch, last = -(-progress.step // recipe.training.macro_batch), progress.step == run.max_steps
    progress.metrics, better = {}, False
    if macro_batch % recipe.evaluation.every == 0 or last:
        progress.metrics = evaluate_validation(run)
        better = progress.update_best(recipe.checkpoint.metric, recipe.training.early_stopping)
    progress.elapsed_s = run.tracker.elapsed_s
    if better:
        save(run, folder / "best", progress.metrics)
    if macro_batch % recipe.checkpoint.every == 0 or last or progress.stopped_early:
        tokenizer = run.data.tokenizer
        save_checkpoint(run.accelerator, folder, run.model, run.optimizers, tokenizer, progress, recipe.to_yaml())
        if run.accelerator.is_main_process:
            prune(folder, recipe.checkpoint)
    if recipe.hub.push and (better if recipe.hub.every is None else macro_batch % recipe.hub.every == 0):
        push_folder(
            run.accelerator, folder / "best", recipe.hub, recipe.run.name, f"Best model of step {progress.step}"
        )


def evaluate_validation(run: Run) -> dict[str, float]:
    """Measures the validation split and lets the model continue the recipe's prompts; logs and shows both."""
    recipe, section, progress = run.recipe, run.recipe.evaluation, run.progress
    num_rows = section.num_problems if recipe.data.path in ARITHMETIC else None
    split = run.data.splits["validation"]
    figures = evaluate(run.accelerator, run.model, split, section.batch_size, section.max_batches, num_rows)
    metrics = {f"eval/{name}": value for name, value in figures.items()}
    run.tracker.log_evaluation(progress, metrics, run.loader.coverage(progress.step))
    if section.prompts:
        model = run.accelerator.unwrap_model(run.model)
        texts = continue_texts(
            model, run.data.tokenizer, section.prompts, recipe.run.seed, 100, do_sample=True, top_k=50
        )
        for text in texts:
            run.tracker.say(f"--- a sample\n{text}\n---")
        if run.accelerator.trackers:
            run.accelerator.log({f"sample/{i}": text for i, text in enumerate(texts)}, step=progress.step)
    return metrics


def save(run: Run, folder: Path, metrics: dict[str, float]) -> None:
    """Writes a `from_pretrained` folder with its card."""
    parameters = run.accelerator.unwrap_model(run.model).num_parameters()
    card = model_card(run.recipe, str(folder), parameters, run.progress, metrics, run.data.example)
    save_model(run.accelerator, run.model, run.data.tokenizer, folder, card)


def finish(run: Run) -> Path:
    """Writes `final`, shows what the model can do and how to load it."""
    recipe, data, say, final = run.recipe, run.data, run.tracker.say, run.recipe.folder / "final"
    metrics = dict(run.progress.metrics)
    if "test" in data.splits:
        split = data.splits["test"]
        graded = min(len(split), MOST_PROBLEMS) if recipe.data.path in ARITHMETIC else len(split)
        figures = evaluate(run.accelerator, run.model, split, recipe.evaluation.batch_size, num_rows=graded)
        metrics |= {f"test/{name}": value for name, value in figures.items()}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        say(f"test split, {graded:,} sequences: {shown}")
    if recipe.data.path in ARITHMETIC:
        order = ", last digit first" if recipe.data.reverse_answer else ""
        say(f"held-out problems with the model's answers{order}:")
        split = data.splits.get("test", data.splits["validation"])
        for question, answer, right in solve(
            run.accelerator.unwrap_model(run.model), data.tokenizer, split, np.arange(5)
        ):
            say(f"  {question}{answer}" + ("" if answer == right else f"   (right: {right})"))
    save(run, final, metrics)
    if recipe.hub.push:
        push_folder(run.accelerator, final, recipe.hub, recipe.run.name, "Final model")
    say(f"The model is in {final}. To load it:")
    say(f'  import cleangpt; model = transformers.AutoModelForCausalLM.from_pretrained("{final}")')
    run.tracker.close()
    return final
