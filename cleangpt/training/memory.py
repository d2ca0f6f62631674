"""The memory of a step: counted on fake tensors, and what that leaves `training.micro_batch_size: auto`.

A fake tensor has a shape and no content: steps on fake tensors compute nothing, yet every allocation is tracked.
"""

import math
import os
from dataclasses import dataclass

import torch
from accelerate.utils import parse_flag_from_env
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..data.prepare import PreparedData
from ..hardware import default_device, free_memory
from ..models.build import config_for
from ..models.loss import in_parts, nats, nats_in_parts
from ..recipe.keys import Recipe
from .optim import apply_updates, build_optimizers

CPU = torch.device("cpu")
# A CPU process grows by 1 to 1.6 times the peak, measured at 12 shapes: glibc's heap keeps holes between its tensors.
CPU_GROWTH = 1.6
MARGIN = 1.1  # what a GPU's allocator and libraries take besides


@dataclass(frozen=True)
class Memory:
    """Bytes in one process. The parts do not add up to the peaks: gradients appear as activations are freed."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """What the forward pass keeps for the backward pass, logits included."""
    peak: int
    """The most in use at once in a step."""
    evaluation_peak: int
    """The most in use at once in an evaluation."""


def simulate(
    recipe: Recipe, data: PreparedData, micro_batch: int, micro_steps: int, num_processes: int
) -> tuple[PreTrainedModel, Memory, Memory]:
    """Trains and evaluates on fake tensors, with `micro_steps` micro-steps of `micro_batch` sequences in a step.

    Returns:
        The model, memory under DDP, and memory under FSDP.
    """
    length, validation = data.splits["train"].sequence_length, data.splits["validation"]
    config, attention = config_for(recipe.model, data.tokenizer, length), recipe.model.get("attn_implementation")
    step, evaluation = MemTracker(), MemTracker()
    with FakeTensorMode():
        with step:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
            optimizers = build_optimizers(recipe.optimizer, model)
            for _ in range(2):  # only the second step finds optimizer state
                for _ in range(min(micro_steps, 2)):  # only the second micro-step finds gradients
                    step.reset_mod_stats()
                    loss = fake_loss(recipe, model.train(), micro_batch, length)
                    forward = step.get_tracker_snapshot()[CPU]
                    loss.backward()
                apply_updates(optimizers, torch.tensor(True))
        evaluation.track_external(model, *optimizers)
        with evaluation, torch.no_grad():
            rows = min(recipe.evaluation.batch_size, len(validation))
            fake_loss(recipe, model.eval(), rows, validation.sequence_length)
    weights, state, activations = (forward[kind] for kind in ("Parameter", "Optstate", "Activation"))
    peak, evaluation_peak = (tracker.get_tracker_snapshot("peak")[CPU]["Total"] for tracker in (step, evaluation))
    average = 0 if recipe.training.ema is None else weights
    peak, evaluation_peak = peak + average, evaluation_peak + average
    if num_processes > 1 and micro_steps == 1:
        peak += weights  # the buckets in which processes average gradients stay allocated
    if default_device() == CPU:
        peak += weights + average + state  # the copy from which a checkpoint is written while training continues
    ddp = Memory(weights, weights, state, activations, peak, evaluation_peak)
    if num_processes == 1:
        return model, ddp, ddp
    gathered, shard, state_shard = gathered_bytes(model), weights // num_processes, state // num_processes
    spared = (weights - shard) + (average - average // num_processes) + (state - state_shard)
    evaluation_peak += gathered - spared
    peak += gathered - spared - (weights - shard)  # and of gradients
    return model, ddp, Memory(shard, shard, state_shard, activations + gathered, peak, evaluation_peak)


def fake_loss(recipe: Recipe, model: PreTrainedModel, rows: int, length: int) -> torch.Tensor:
    """The loss of a batch (rows, length) in the precision of the run, within `FakeTensorMode`."""
    precision, ids = recipe.training.mixed_precision, torch.zeros(rows, length, dtype=torch.int64)
    with torch.autocast("cpu", torch.float16 if precision == "fp16" else torch.bfloat16, enabled=precision != "no"):
        if in_parts(model, precision, default_device(), sharded=False):
            return nats_in_parts(model, model.get_output_embeddings().weight, {"input_ids": ids}, ids)
        return nats(model, {"input_ids": ids}, ids)


def gathered_bytes(model: PreTrainedModel) -> int:
    """Bytes of weights that FSDP gathers for use: those outside the blocks, and two blocks, the next one in advance."""
    blocks = [module for module in model.modules() if type(module).__name__ in (model._no_split_modules or ())]
    sizes = [sum(weight.nbytes for weight in block.parameters()) for block in blocks] or [0]
    return sum(weight.nbytes for weight in model.parameters()) - sum(sizes) + 2 * max(sizes)


def choose_micro_batch(recipe: Recipe, data: PreparedData, num_processes: int, saved: Recipe | None = None) -> Recipe:
    """A resolved recipe with a number in place of `training.micro_batch_size: auto`.

    It is the run's own where `saved` has one, else the whole share of a process, halved until a step fits into the
    memory that is free in this machine or in this process's device.
    """
    if recipe.training.micro_batch_size != "auto":
        return recipe
    rows = math.ceil(recipe.training.batch_size / num_processes)
    if saved is not None and saved.training.micro_batch_size != "auto":
        return recipe.changed(training={"micro_batch_size": saved.training.micro_batch_size})
    on_cpu, is_sharded = default_device() == CPU, parse_flag_from_env("ACCELERATE_USE_FSDP")
    room = free_memory(default_device())
    room /= CPU_GROWTH * int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if on_cpu else MARGIN
    while rows > 1:
        _, ddp, fsdp = simulate(recipe, data, rows, 2, num_processes)
        if (fsdp if is_sharded else ddp).peak <= room:
            break
        rows = math.ceil(rows / 2)
    return recipe.changed(training={"micro_batch_size": rows})
