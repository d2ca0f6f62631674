"""What a recipe would cost, before it runs: parameters, tokens, FLOPs, memory, disk, time, and what looks wrong.

recipe ──> data ──> two steps on fake tensors  ──> memory
                    ten steps on this machine  ──> time
"""

import contextlib
import io
import itertools
import math
import tempfile
import time
from dataclasses import dataclass

import numpy as np
import pandas
from transformers import PreTrainedModel

from .data.arithmetic import ArithmeticSplit
from .data.mixture import texts_of
from .data.prepare import prepare_data
from .data.splits import Split
from .evaluation.evaluate import MAX_GRADED, evaluate
from .hardware import default_device
from .models.statistics import flops_per_token
from .recipe import schedules
from .recipe.keys import Recipe, Schedules
from .training.launch import join_processes
from .training.memory import CPU, Memory, choose_micro_batch, simulate
from .training.run_folder import Start
from .training.setup import build_run, resolve
from .training.step import accumulate, update


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe would cost."""

    recipe: Recipe  # as resolved
    parameters: int  # weights, tied ones counted once
    sequences: int  # drawn over the whole run
    tokens: int  # targets trained on
    epochs: float  # passes over the train split
    source_epochs: dict[str, float]  # passes over each source of a mixture, by label
    batches: tuple[int, int]  # sequences in the first and in the last step, over all processes
    micro_batch: int  # sequences per forward pass of one process
    flops: float  # of all training steps, see `flops_per_token`
    ddp: Memory  # with a copy of the model in each process
    fsdp: Memory  # with weights, gradients and optimizer state sharded over the processes
    disk: int  # bytes of the run's folder at its fullest: checkpoints kept and being written, `best` and `final`
    warnings: list[str]  # what looks wrong


def make_plan(recipe: Recipe, num_processes: int = 1) -> Plan:
    """Plans a run. Builds the data if it is not in the cache, but no model, and writes nothing to the run's folder.

    Raises:
        UserError: as training would, for data or a model that cannot be had.
    """
    recipe, data = resolve(recipe.model_copy(update={"branched_from": None}))
    recipe = choose_micro_batch(recipe, data, num_processes)
    split, keep = data.splits["train"], recipe.checkpoint.keep_last + recipe.checkpoint.keep_best
    batches = schedules.sequences_per_step(recipe)
    share = math.ceil(batches.max() / num_processes)
    rows = recipe.training.micro_batch_size
    micro_batch = min(rows, share) if isinstance(rows, int) else share
    model, ddp, fsdp = simulate(recipe, data, micro_batch, math.ceil(share / micro_batch), num_processes)
    sequences, parameters = int(batches.sum()), model.num_parameters()
    sample = np.arange(min(len(split), 1000))
    epochs, shares = sequences / split.num_sequences, schedules.source_shares(recipe)
    source_epochs = {}
    if shares is not None:
        pairs = zip(texts_of(split).items(), (batches @ shares).tolist(), strict=True)
        source_epochs = {label: rows / source.num_sequences for (label, source), rows in pairs}
    return Plan(
        recipe=recipe,
        parameters=parameters,
        sequences=sequences,
        tokens=round(sequences * split.count_targets(sample) / len(sample)),
        epochs=epochs,
        source_epochs=source_epochs,
        batches=(int(batches[0]), int(batches[-1])),
        micro_batch=micro_batch,
        flops=float(flops_per_token(model)) * sequences * split.sequence_length,
        ddp=ddp,
        fsdp=fsdp,
        disk=(keep + 1) * (4 * parameters + ddp.optimizer) + 2 * 4 * parameters,
        warnings=find_warnings(recipe, split, model, max([epochs, *source_epochs.values()])),
    )


def usual_lr(parameters: int) -> float:
    """The peak rate that suits AdamW at a size (arXiv 2001.08361, equation D.1): 1.3e-3 at 1M, 6e-4 at 124M."""
    return max(1e-5, 0.003239 - 0.0001395 * math.log(parameters))


def find_warnings(recipe: Recipe, split: Split, model: PreTrainedModel, epochs: float) -> list[str]:
    """What looks wrong with a recipe, its train split and its model, one line each, beginning with the key."""
    config, size, lr = model.config, model.config.vocab_size, recipe.optimizer.lr
    usual = usual_lr(model.num_parameters())
    is_far = lr > 5 * usual or (lr < usual / 10 and "init_from" not in recipe.model)
    streams = itertools.chain(*(text.stream for text in texts_of(split).values()))
    used = len(set().union(*map(pandas.unique, streams))) or size
    heads = getattr(config, "num_attention_heads", None)  # none in a state-space model
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    warnings = {
        f"training: {epochs:,.0f} epochs; after 40, more teach next to nothing (arXiv 2305.16264)": epochs > 40,
        f"optimizer.lr: {lr:.1e} is far from {usual:.1e}, usual at this size (arXiv 2001.08361)": is_far,
        f"model.vocab_size: the train split uses {used:,} of {size:,} ids": used < size / 2,
        f"model.num_attention_heads: heads are {width} wide, attention kernels want a multiple of 8": width % 8 > 0,
    }
    return [warning for warning, applies in warnings.items() if applies]


def measure_time(plan: Plan, steps: int = 10) -> float:
    """Seconds that the run would take on this machine in one process, evaluations included.

    Trains `steps` micro-steps, or fewer in a minute, and evaluates one batch, in a temporary folder. On a CPU a
    micro-step is cut down to a few seconds of work.
    """
    recipe, rows = plan.recipe, plan.micro_batch
    if default_device() == CPU:
        rows = min(rows, max(1, int(2e12 / (plan.flops / plan.sequences))))
    training = {"max_steps": steps, "batch_size": rows, "micro_batch_size": None}
    trial = recipe.changed(
        training=training, tracking={"trackers": ()}, hub={"push": False}, evaluation={"lm_eval": None}
    )
    trial, step_s = trial.model_copy(update={"schedule": Schedules()}), []
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        trial = trial.changed(run={"output_dir": folder})
        join_processes()
        run = build_run(trial, prepare_data(trial), Start())
        for step in range(1, steps + 1):
            started = time.perf_counter()
            values = schedules.at(trial.schedule, trial.optimizer, step, steps)
            loss = accumulate(run.accelerator, run.model, run.loader.batch(step))
            update(run, values, loss)[0].item()  # waits for the device
            step_s.append(time.perf_counter() - started)
            if len(step_s) > 1 and sum(step_s) > 60:
                break
        started, validation = time.perf_counter(), run.data.splits["validation"]
        evaluate(run.accelerator, run.model, validation, recipe.evaluation.batch_size, max_batches=1)
        batch_s = time.perf_counter() - started
        run.tracker.close()
    settings, test = recipe.evaluation, run.data.splits.get("test", ())
    problems = min(len(validation), settings.num_problems or len(validation))
    batches = min(math.ceil(problems / settings.batch_size), settings.max_batches or math.inf)
    boundaries = math.ceil((recipe.training.max_steps or 0) / recipe.training.macro_batch)
    graded = min(len(test), MAX_GRADED) if isinstance(test, ArithmeticSplit) else len(test)
    evaluated = (1 + math.ceil(boundaries / settings.every)) * batches + math.ceil(graded / settings.batch_size)
    return plan.sequences * float(np.median(step_s[1:])) / rows + evaluated * batch_s
