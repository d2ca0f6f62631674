"""Optimizers, and the learning rate and weight decay of each step."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from transformers import PreTrainedModel

from ..models.width import final_norm, hidden_matrices
from ..recipe.keys import Optimizer
from .muon import Muon


def build_optimizers(optimizer: Optimizer, model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """The optimizers of `recipe.optimizer`; each trainable weight belongs to one of them.

    With `adamw`, matrices and embeddings decay and vectors (biases, norms) do not, as in nanoGPT. `muon` (Jordan et
    al., 2024) takes the hidden matrices, those stacked in one weight each by itself, and leaves embeddings, head and
    vectors to AdamW. With `reference_width`, rates are scaled as `models/width.py` says.
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
        parts: dict[int, Any] = {id(one.weight): one.parts for one in model.modules() if hasattr(one, "parts")}
        stacks: dict[int, list[Tensor]] = {}
        for weight in hidden.values():
            stacks.setdefault(parts.get(id(weight), 1), []).append(weight)
        sections = [{"params": stack, "parts": n, "scale": math.sqrt(ratio)} for n, stack in stacks.items()]
        optimizers.append(Muon(sections, **rates, momentum=optimizer.momentum))
        weights = [weight for weight in weights if id(weight) not in hidden]
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for weight in weights:
        scale = ratio if id(weight) in scaled else 1.0
        groups.setdefault((scale, optimizer.weight_decay if weight.ndim >= 2 else 0.0), []).append(weight)
    rest = [{"params": group, "scale": key[0], "weight_decay": key[1]} for key, group in groups.items()]
    return [*optimizers, AdamW(rest, **rates, betas=optimizer.betas, eps=optimizer.eps, fused=True)]


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
        optimizer: Any = getattr(wrapped, "optimizer", wrapped)
        optimizer.found_inf = 1.0 - finite.float()  # AdamW and Muon skip, as for a scaler
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
