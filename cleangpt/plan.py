"""What a recipe would cost, before it runs: parameters, tokens, FLOPs, memory, disk, time, and what looks wrong.

    recipe ──> data ──> model without weights ──> two steps on tensors without content ──> memory
                                                  ten steps on this machine            ──> time

A step on tensors that have a shape and no content allocates and computes nothing, yet every operation is seen.
"""

import contextlib
import io
import math
import tempfile
import time
import weakref
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib
import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, PreTrainedModel

from . import schedules
from .data.prepare import PreparedData, prepare_data
from .data.splits import IGNORED
from .evaluation import MOST_PROBLEMS, evaluate
from .launch import choose_precision
from .loss import in_parts, nats, nats_in_parts
from .models.build import choose_attention, config_for, load_config
from .monitoring import flops_per_token
from .optim import apply_updates, build_optimizers
from .outputs import Start
from .recipe import ARITHMETIC, Recipe, Schedules
from .run import build_run
from .step import accumulate, update

# On a CPU a step takes more than its tensors: the allocator leaves holes among them, and bf16 products have copies of
# their own. Measured with glibc at six shapes: 1.3 to 1.46 times, in bf16 1.45 to 1.8 (on a CPU without native bf16).
CPU_SPREAD = {"no": 1.38, "bf16": 1.6}


@dataclass
class Memory:
    """Bytes in one process. They are not all there at once: gradients come while activations go."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the backward pass needs, the logits included, and what lives only for a moment."""
    peak: int
    """The most that is there at once in a step."""


@dataclass
class Plan:
    """What a recipe would cost."""

    parameters: int
    """Weights, tied ones counted once."""
    max_steps: int
    sequences: int
    """Drawn over the whole run."""
    tokens: int
    """Targets trained on."""
    epochs: float
    """Passes over the train split."""
    batches: tuple[int, int]
    """Sequences in the first and in the last step, over all processes."""
    micro_batch: int
    """Sequences in one forward pass of one process."""
    flops: float
    """Of all training steps, see `flops_per_token`."""
    ddp: Memory
    """With a copy of the model in each process."""
    fsdp: Memory
    """With weights, gradients and optimizer sharded among the processes."""
    evaluation_peak: int
    """Bytes at most in an evaluation, DDP."""
    disk: int
    """Bytes of the run's folder at its fullest: the checkpoints kept and the one being written, `best` and `final`."""
    warnings: list[str]
    """What looks wrong."""


def make_plan(recipe: Recipe, num_processes: int = 1) -> Plan:
    """Builds the data that is not in the cache yet, and neither a model nor anything in the run's folder.

    Raises:
        UserError: as training would, for data or a model that cannot be had.
    """
    data = prepare_data(recipe)
    split, training = data.splits["train"], recipe.training
    max_steps = steps_of(recipe, split)
    batches = training.batch_size * np.array([values.accumulation for values in values_of(recipe, max_steps)])
    share = math.ceil(batches.max() / num_processes)
    micro_batch = min(training.micro_batch_size or share, share)
    sample = split[np.arange(min(len(split), 1000))]["targets"]
    sequences, targets_per_row = int(batches.sum()), split.targets_per_row or (sample != IGNORED).sum(1).mean()

    micro_steps = math.ceil(share / micro_batch)
    model, ddp, fsdp, evaluation_peak = one_step(recipe, data, micro_batch, micro_steps, num_processes)
    parameters, epochs = model.num_parameters(), sequences / split.num_sequences
    weights, keep = 4 * parameters, recipe.checkpoint.keep_last + recipe.checkpoint.keep_best
    return Plan(
        parameters=parameters,
        max_steps=max_steps,
        sequences=sequences,
        tokens=round(sequences * targets_per_row),
        epochs=epochs,
        batches=(int(batches[0]), int(batches[-1])),
        micro_batch=micro_batch,
        flops=float(flops_per_token(model)) * sequences * split.sequence_length,
        ddp=ddp,
        fsdp=fsdp,
        evaluation_peak=evaluation_peak,
        disk=(keep + 1) * (weights + ddp.optimizer) + 2 * weights,
        warnings=find_warnings(recipe, data, model, epochs),
    )


def steps_of(recipe: Recipe, split) -> int:
    """The steps of the run, also where the recipe gives epochs."""
    training = recipe.training
    if training.max_steps is not None:
        return training.max_steps
    sequences = training.max_epochs * split.num_sequences
    return schedules.steps_for(sequences, training.batch_size, recipe.schedule, recipe.optimizer)


def values_of(recipe: Recipe, max_steps: int) -> list[schedules.Values]:
    """What the schedules say for each step."""
    return [schedules.at(recipe.schedule, recipe.optimizer, step, max_steps) for step in range(1, max_steps + 1)]


def bare_model(recipe: Recipe, data: PreparedData) -> PreTrainedModel:
    """The recipe's model; within `FakeTensorMode`, without content."""
    length = data.splits["train"].sequence_length
    config = config_for(recipe.model, data.tokenizer, length)
    attention = choose_attention(recipe.model, length, _precision(recipe), _device())
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)


class Allocations(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, for as long as they live: `now`, and at most, `peak`."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.living = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(output):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in self.living:
                storage = tensor.untyped_storage()
                self.living.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        return output

    def _freed(self, storage: int, size: int):
        self.living.discard(storage)
        self.now -= size


def one_step(
    recipe: Recipe, data: PreparedData, micro_batch: int, micro_steps: int, num_processes: int
) -> tuple[PreTrainedModel, Memory, Memory, int]:
    """The model, memory under DDP and under FSDP, and bytes at most in an evaluation.

    All from steps on tensors without content.

    Args:
        micro_batch: sequences of a micro-step. micro_steps: of the largest step.
    """
    length, validation = data.splits["train"].sequence_length, data.splits["validation"]
    with FakeTensorMode(), Allocations() as allocations:
        model = bare_model(recipe, data).train()
        optimizers = build_optimizers(recipe.optimizer, model)
        for _ in range(2):  # the optimizer has its state from the first one on
            allocations.peak = 0
            for _ in range(min(micro_steps, 2)):  # the second one finds gradients in place
                before = allocations.now
                loss = forward(recipe, model, micro_batch, length)
                activations = allocations.now - before
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.training.max_grad_norm or float("inf"))
            apply_updates(optimizers)
        peak, resting = allocations.peak, allocations.now
        allocations.peak = 0
        with torch.no_grad():
            rows = min(recipe.evaluation.batch_size, len(validation))
            forward(recipe, model.eval(), rows, validation.sequence_length)
        evaluation_peak = allocations.peak
    weights = gradients = sum(weight.nbytes for weight in model.parameters())
    state = sum(
        value.nbytes for optimizer in optimizers for entry in optimizer.state.values() for value in entry.values()
    )
    if num_processes > 1 and micro_steps == 1:
        peak += gradients  # the buckets that processes average stay in place between steps
    spread = CPU_SPREAD[_precision(recipe)] if _device().type == "cpu" else 1
    peak = round(resting + spread * (peak - resting))
    if _device().type == "cpu":
        peak += weights + state  # the copy from which a checkpoint is written while training goes on
    evaluation_peak = round(resting + spread * (evaluation_peak - resting))
    ddp = Memory(weights, gradients, state, activations, peak)

    kept = weights + state + (gradients if max(micro_steps, num_processes) > 1 else 0)
    gathered = _gathered(model) if num_processes > 1 else 0
    fsdp = Memory(
        weights // num_processes,
        gradients // num_processes,
        state // num_processes,
        activations + gathered,
        peak - kept + kept // num_processes + gathered,
    )
    return model, ddp, fsdp, evaluation_peak


def forward(recipe: Recipe, model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """The loss of a batch without content, (rows, length), in the precision of the run."""
    precision = _precision(recipe)
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    ids = torch.zeros(rows, length, dtype=torch.int64)
    with torch.autocast("cpu", dtype, enabled=precision != "no"):
        if in_parts(model, precision, _device(), sharded=False):
            return nats_in_parts(model, model.get_output_embeddings().weight, {"input_ids": ids}, ids)
        return nats(model, {"input_ids": ids}, ids)


def _precision(recipe: Recipe) -> str:
    width = load_config(recipe.model).hidden_size
    return choose_precision(recipe.training.mixed_precision, _device().type == "cpu", width)


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def _gathered(model: PreTrainedModel) -> int:
    """Bytes of weights that FSDP puts together for use: what is in no block, and two blocks, the next one ahead."""
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    sizes = [sum(weight.nbytes for weight in block.parameters()) for block in blocks] or [0]
    return sum(weight.nbytes for weight in model.parameters()) - sum(sizes) + 2 * max(sizes)


def usual_lr(parameters: int) -> float:
    """The peak rate that suits AdamW at a size (arXiv 2001.08361, equation D.1), 1.3e-3 at 1M, 6e-4 at 124M."""
    return max(1e-5, 0.003239 - 0.0001395 * math.log(parameters))


def find_warnings(recipe: Recipe, data: PreparedData, model: PreTrainedModel, epochs: float) -> list[str]:
    """What looks wrong, one line each, with the key that says it."""
    found, config, lr = [], model.config, recipe.optimizer.lr
    if epochs > 40:
        found.append(f"training: {epochs:,.0f} epochs; after 40, more of them teach next to nothing (arXiv 2305.16264)")
    usual = usual_lr(model.num_parameters())
    if lr > 5 * usual or (lr < usual / 10 and "init_from" not in recipe.model):
        found.append(f"optimizer.lr: {lr:.1e} is far from {usual:.1e}, which is usual for this size (arXiv 2001.08361)")
    if recipe.data.path not in ARITHMETIC:
        used, size = count_used(data.splits["train"].tokens, config.vocab_size), config.vocab_size
        if used < size / 2:
            found.append(f"model.vocab_size: the train split uses {used:,} of {size:,} ids")
    heads = getattr(config, "num_attention_heads", None)  # none in a state-space model
    width = getattr(config, "head_dim", None) or (config.hidden_size // heads if heads else 0)
    if width % 8:
        found.append(f"model.num_attention_heads: a head is {width} wide, attention kernels want a multiple of 8")
    return found


def count_used(tokens: np.ndarray, vocab_size: int) -> int:
    """How many different ids there are, read in pieces."""
    seen = np.zeros(vocab_size, bool)
    for start in range(0, len(tokens), 1 << 24):
        seen[tokens[start : start + (1 << 24)]] = True
    return int(seen.sum())


def measure_time(recipe: Recipe, plan: Plan, steps: int = 10, limit_s: float = 60.0) -> float:
    """Seconds that the run would take on this machine in one process, its evaluations included.

    Trains `steps` micro-steps, fewer when `limit_s` is over, and evaluates one batch, in a folder of its own. On a CPU
    a micro-step is cut down to some seconds of work.
    """
    rows, row_flops = plan.micro_batch, plan.flops / plan.sequences
    if not torch.accelerator.is_available():
        rows = min(rows, max(1, int(2e12 / row_flops)))
    with tempfile.TemporaryDirectory() as folder:
        trial = replace(
            recipe,
            run=replace(recipe.run, output_dir=folder, overwrite=False),
            tracking=replace(recipe.tracking, trackers=[]),
            training=replace(recipe.training, max_steps=steps, max_epochs=None, batch_size=rows, micro_batch_size=None),
            schedule=Schedules(),
        )
        with contextlib.redirect_stdout(io.StringIO()):  # what a run says of itself
            run = build_run(trial, Start(None, False))
        step_s = []
        for step in range(1, steps + 1):
            started = time.perf_counter()
            values = schedules.at(trial.schedule, trial.optimizer, step, steps)
            loss = accumulate(run.accelerator, run.model, run.loader.batch(step))
            update(run.accelerator, run.model, run.optimizers, values, trial.training.max_grad_norm, loss, False)
            step_s.append(time.perf_counter() - started)
            if len(step_s) > 1 and sum(step_s) > limit_s:
                break
        row_s = float(np.median(step_s[1:])) / rows
        started, validation = time.perf_counter(), run.data.splits["validation"]
        evaluate(run.accelerator, run.model, validation, recipe.evaluation.batch_size, max_batches=1)
        batch_s = time.perf_counter() - started
        run.tracker.close()
    section = recipe.evaluation
    problems = min(len(validation), section.num_problems or len(validation))
    batches = min(math.ceil(problems / section.batch_size), section.max_batches or math.inf)
    boundaries = math.ceil(plan.max_steps / recipe.training.macro_batch)
    evaluations = 1 + math.ceil(boundaries / section.every)
    test = len(run.data.splits.get("test", ()))
    graded = min(test, MOST_PROBLEMS) if recipe.data.path in ARITHMETIC else test
    return plan.sequences * row_s + (evaluations * batches + math.ceil(graded / section.batch_size)) * batch_s


def draw_schedules(recipe: Recipe, max_steps: int, path: Path) -> None:
    """Learning rate, weight decay and sequences of each step, one below the other, as a PNG file."""
    matplotlib.use("Agg")
    from matplotlib import pyplot

    values = values_of(recipe, max_steps)
    curves = {
        "learning rate": [value.lr for value in values],
        "weight decay": [value.weight_decay for value in values],
        "sequences in a step": [value.accumulation * recipe.training.batch_size for value in values],
    }
    figure, rows = pyplot.subplots(len(curves), sharex=True, figsize=(6, 6), layout="constrained")
    for axes, (name, curve) in zip(rows, curves.items(), strict=True):
        axes.plot(range(1, max_steps + 1), curve)
        axes.set_ylim(0, 1.1 * max(*curve, 1e-12))
        axes.set_title(name, loc="left", fontsize=10)
        axes.grid(alpha=0.3)
    rows[-1].set_xlabel("step")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
