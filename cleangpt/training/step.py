"""One optimizer step: reproducible randomness, a gradient that does not depend on how it is accumulated, one update."""

import contextlib

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..data.loader import Batch
from ..models.loss import sum_nats
from ..models.statistics import histograms
from ..recipe.schedules import Values
from .optim import apply_updates, set_hyperparameters
from .run import TrainingRun


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of all randomness in one step of one process, so that a resumed run draws the same."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0])


def accumulate(accelerator: Accelerator, model: nn.Module, batch: Batch) -> Tensor:
    """Accumulates the gradient of the mean loss over all targets of a step, however they are split.

    Returns:
        This process's part of that mean loss, in nats; the parts of all processes add up to it.
    """
    total = torch.zeros((), device=accelerator.device)
    for i, micro_batch in enumerate(batch.micro_batches, 1):
        with contextlib.nullcontext() if i == len(batch.micro_batches) else accelerator.no_sync(model):
            loss = sum_nats(accelerator, model, micro_batch) / max(1, batch.num_targets)  # a step may have none
            accelerator.backward(loss * accelerator.num_processes)  # undoes the average that processes take
        total = total + loss.detach()
    return total


def gradient_histograms(run: TrainingRun) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`histograms` of the gradients that `accumulate` left, before clipping and without the scale of fp16."""
    scaler = run.accelerator.scaler
    return histograms(run.model, 1.0 if scaler is None else scaler.get_scale())


def update(run: TrainingRun, values: Values, loss: Tensor) -> Tensor:
    """Updates the weights at this step's rate and weight decay, unless the gradient is not finite.

    Nothing waits for the device, and nothing has to be agreed on: processes share the gradient's norm.

    Returns:
        The step's figures on the device, float32 (5,): `loss`, the sum of this process's `SquaredNorms`, the gradient's
        norm before clipping, and the scale of gradients (which fp16 needs) before and after the step.
    """
    accelerator, scaler = run.accelerator, run.accelerator.scaler
    set_hyperparameters(run.optimizers, values.lr, values.weight_decay)
    # Unscales the gradients of all optimizers, once.
    max_norm = run.recipe.training.max_grad_norm or float("inf")
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), max_norm)
    grad_norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
    apply_updates(run.optimizers, grad_norm.isfinite())
    before = after = torch.ones_like(loss)
    if scaler is not None:
        before = scaler.scale(before)
        scaler.update()  # once a step, also when the update is skipped: the next one unscales again
        after = scaler.scale(after)
    squares = torch.zeros_like(loss) + (0.0 if run.noise is None else run.noise.take())
    return torch.stack([loss, squares, grad_norm, before, after])
