"""Optimizers, and the learning rate and weight decay of each step."""

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW, Muon
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from ..hardware import has_native_bf16
from ..models.width import final_norm, hidden_matrices
from ..recipe.keys import Optimizer


def build_optimizers(optimizer: Optimizer, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """The optimizers of `recipe.optimizer`; each trainable weight belongs to one of them.

    With `adamw`, matrices and embeddings decay and vectors (biases, norms) do not, as in nanoGPT. `muon` (Jordan et
    al., 2024) takes the hidden matrices and leaves embeddings, head and vectors to AdamW; its update is scaled to the
    size of AdamW's (arXiv 2502.16982), so that one rate serves both. With `reference_width`, rates are scaled as
    `models/width.py` says.
    """
    rates: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay}
    hidden = {id(weight): weight for weight in hidden_matrices(model) if weight.requires_grad}
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    ratio, scaled = 1.0, {*hidden}
    if optimizer.reference_width is not None:
        ratio = optimizer.reference_width / model.config.hidden_size
        scaled |= {id(weight) for weight in final_norm(model).parameters()}
    optimizers: list[torch.optim.Optimizer] = []
    if optimizer.name == "muon":
        group = {"params": [*hidden.values()], "scale": math.sqrt(ratio)}
        optimizers.append(Muon([group], **rates, adjust_lr_fn="match_rms_adamw"))
        weights = [weight for weight in weights if id(weight) not in hidden]
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for weight in weights:
        scale = ratio if id(weight) in scaled else 1.0
        groups.setdefault((scale, optimizer.weight_decay if weight.ndim >= 2 else 0.0), []).append(weight)
    sections = [{"params": group, "scale": key[0], "weight_decay": key[1]} for key, group in groups.items()]
    return [*optimizers, AdamW(sections, **rates, betas=optimizer.betas, eps=optimizer.eps, fused=True)]


def set_hyperparameters(optimizers: Sequence[torch.optim.Optimizer], lr: float, weight_decay: float) -> None:
    """Sets the rate of every group, and the weight decay of those that decay, by the same amount a step in each."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group["scale"]
            if group.setdefault("decays", group["weight_decay"] > 0):
                group["weight_decay"] = weight_decay / group["scale"]


def apply_updates(optimizers: Sequence[torch.optim.Optimizer], finite: Tensor) -> None:
    """Steps each optimizer if `finite`, a bool on the device that nothing waits for, and clears its gradients.

    It works below accelerate's wrapper, which would unscale the gradients again.
    """
    for wrapped in optimizers:
        optimizer = getattr(wrapped, "optimizer", wrapped)
        if isinstance(optimizer, Muon):
            step_muon(optimizer, finite)
        else:
            optimizer.found_inf = 1.0 - finite.float()  # type: ignore[union-attr]  # fused AdamW skips, as for a scaler
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@torch.no_grad()
def step_muon(optimizer: Muon, finite: Tensor) -> None:
    """Steps if `finite`; since torch's Muon cannot skip, momentum is averaged with itself and weights are put back."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"] if weight.grad is not None]
    for weight in weights:
        momentum = optimizer.state[weight].get("momentum_buffer", torch.zeros_like(weight))
        weight.grad = torch.where(finite, weight.grad, momentum)
    before = [weight.clone() for weight in weights]
    emulated = not has_native_bf16(weights[0].device)
    with Float32Products() if emulated else contextlib.nullcontext():
        optimizer.step()
    for weight, old in zip(weights, before, strict=True):
        weight.copy_(torch.where(finite, weight, old))


class Float32Products(TorchFunctionMode):
    """Makes torch's Muon orthogonalize in float32, five times faster than bf16 on a CPU that emulates it.

    Muon's only use of bf16 is `ortho_grad = grad.bfloat16()`, before its five matrix products. Inside this mode
    `bfloat16()` returns a float32 copy instead.
    """

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is torch.Tensor.bfloat16:
            return args[0].to(torch.float32, copy=True)
        return func(*args, **(kwargs or {}))
