"""Optimizers, and the rate and weight decay of each step."""

import contextlib

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer
from torch.overrides import TorchFunctionMode

from .monitoring import has_native_bf16


def build_optimizers(section, model: nn.Module) -> list[Optimizer]:
    """The optimizers of `recipe.optimizer` for `model`, together responsible for every trainable weight.

    `adamw`: matrices and embeddings decay, vectors (biases, norms) do not, as in nanoGPT. `muon` (Jordan et al., 2024)
    takes the hidden matrices; embeddings, head and vectors stay with AdamW, and its update is scaled to AdamW's size
    (arXiv 2502.16982), so that one rate serves both.
    """
    parameters = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    vectors = [weight for weight in parameters.values() if weight.ndim < 2]
    matrices = [weight for weight in parameters.values() if weight.ndim >= 2]
    optimizers = []
    if section.name == "muon":
        outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
        outer |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
        hidden = [weight for weight in matrices if weight.ndim == 2 and id(weight) not in outer]
        matrices = [weight for weight in matrices if weight.ndim != 2 or id(weight) in outer]
        optimizers.append(
            Muon(hidden, lr=section.lr, weight_decay=section.weight_decay, adjust_lr_fn="match_rms_adamw")
        )
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizers.append(
        AdamW(
            [group for group in groups if group["params"]],
            lr=section.lr,
            betas=section.betas,
            eps=section.eps,
            weight_decay=section.weight_decay,
            fused=True,
        )
    )
    return optimizers


def set_hyperparameters(optimizers: list[Optimizer], lr: float, weight_decay: float) -> None:
    """Sets the rate of every group, and the weight decay of those that decay."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
            if group.setdefault("decays", group["weight_decay"] > 0):
                group["weight_decay"] = weight_decay


class Float32Products(TorchFunctionMode):
    """Lets torch's Muon orthogonalize in float32 rather than bf16, which takes a CPU without it five times as long.

    It is one call there, `update.bfloat16()`; this answers it with a float32 copy.
    """

    def __torch_function__(self, function, types, arguments=(), options=None):
        if function is torch.Tensor.bfloat16:
            return arguments[0].to(torch.float32, copy=True)
        return function(*arguments, **(options or {}))


def apply_updates(optimizers: list[Optimizer]) -> None:
    """One step of each optimizer; gradients are cleared."""
    for optimizer in optimizers:
        is_muon = isinstance(getattr(optimizer, "optimizer", optimizer), Muon)
        emulates = is_muon and not has_native_bf16(optimizer.param_groups[0]["params"][0].device)
        with Float32Products() if emulates else contextlib.nullcontext():
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
