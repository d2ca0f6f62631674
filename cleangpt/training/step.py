"""One optimizer step: reproducible randomness, a gradient that does not depend on how it is accumulated, one update."""

import contextlib

import numpy as np
import torch
from accelerate import Accelerator
from torch import nn

from ..data.loader import Batch
from ..models.loss import sum_nats
from ..recipe.schedules import Values
from .launch import any_process
from .optim import apply_updates, set_hyperparameters
from .run import TrainingRun


def step_seed(seed: int, step: int, process: int) -> int:
    """The seed of all randomness in one step of one process, so that a resumed run draws the same."""
    return int(np.random.SeedSequence([seed, step, process]).generate_state(1, np.uint64)[0])


def seed_dropout(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and `device` only: looking for every other kind takes half a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def accumulate(accelerator: Accelerator, model: nn.Module, batch: Batch) -> torch.Tensor:
    """Accumulates the gradient of the mean loss over all targets of a step, however they are split.

    Returns:
        This process's part of that mean loss, in nats; the parts of all processes add up to it.
    """
    total = torch.zeros((), device=accelerator.device)
    for i, micro_batch in enumerate(batch.micro_batches, 1):
        with contextlib.nullcontext() if i == len(batch.micro_batches) else accelerator.no_sync(model):
            loss = sum_nats(accelerator, model, micro_batch) / batch.num_targets
            accelerator.backward(loss * accelerator.num_processes)  # undoes the average that processes take
        total = total + loss.detach()
    return total


def update(run: TrainingRun, values: Values, loss: torch.Tensor, stop: bool) -> tuple[torch.Tensor, str, bool]:
    """Updates the weights at this step's rate and weight decay, unless `loss` or gradient are not finite.

    Under a scaler, as fp16 needs one, a gradient that overflows is usual, and the scaler halves its scale. It counts as
    not finite only once the scale has sunk to 1.

    Returns:
        The gradient's norm before clipping; on all processes alike, why the update was skipped ("" if it was made,
        "overflow" or "not finite"), and whether any process was asked to stop.
    """
    accelerator, scaler = run.accelerator, run.accelerator.scaler
    set_hyperparameters(run.optimizers, values.lr, values.weight_decay)
    # Unscales the gradients of all optimizers, once.
    max_norm = run.recipe.training.max_grad_norm or float("inf")
    grad_norm = accelerator.clip_grad_norm_(run.model.parameters(), max_norm)
    bad_loss, bad_gradient = not torch.isfinite(loss), not torch.isfinite(grad_norm)
    bad_loss, bad_gradient, stop = any_process(accelerator, bad_loss, bad_gradient, stop)
    skipped = "not finite" if bad_loss or bad_gradient else ""
    if bad_gradient and not bad_loss and scaler is not None and scaler.get_scale() > 1:
        skipped = "overflow"
    if skipped:
        for optimizer in run.optimizers:
            optimizer.zero_grad(set_to_none=True)
    else:
        apply_updates(run.optimizers)
    if scaler is not None:
        scaler.update()  # once a step, also when the update is skipped: the next one unscales again
    return grad_norm, skipped, stop
