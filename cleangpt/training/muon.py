"""Muon (Jordan et al., 2024, https://kellerjordan.github.io/posts/muon): matrices that move by orthogonal steps.

momentum <- m x momentum + (1 - m) x gradient
update   <- the orthogonal matrix nearest to m x momentum + (1 - m) x gradient      (Nesterov's momentum)
weight   <- (1 - lr x decay) weight - lr x 0.2 sqrt(longer side) update             (as large as AdamW's: 2502.16982)
"""

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from ..hardware import has_native_bf16

# Of the polynomial a x + b x^3 + c x^5, whose powers take singular values from 0.01 to 1 near 1 (Jordan's).
A, B, C, STEPS = 3.4445, -4.7750, 2.0315, 5


class Muon(torch.optim.Optimizer):
    """Muon for matrices; a group's `parts` is how many of them lie on top of each other in each of its weights.

    A step with `found_inf` 1, as torch's fused optimizers have it, changes nothing, and nothing waits for the device.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float, weight_decay: float, momentum: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "parts": 1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            alike: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}  # weights of one shape are orthogonalized at once
            for weight in group["params"]:
                if weight.grad is not None:
                    alike.setdefault(weight.shape, []).append((weight, self._advance(weight, group["momentum"])))
            for (rows, columns), pairs in alike.items():
                wholes = [update.full_tensor() if isinstance(update, DTensor) else update for _, update in pairs]
                updates = torch.stack(wholes).unflatten(1, (group["parts"], -1)).flatten(0, 1)
                size = 0.2 * max(rows // group["parts"], columns) ** 0.5
                updates = size * orthogonalize(updates).view(-1, rows, columns)
                for (weight, _), update in zip(pairs, updates, strict=True):
                    if isinstance(weight, DTensor):
                        update = distribute_tensor(update, weight.device_mesh, weight.placements, src_data_rank=None)
                    moved = (1 - group["lr"] * group["weight_decay"]) * weight - group["lr"] * update
                    weight.copy_(self._unless_skipped(moved, weight))

    def _advance(self, weight: Tensor, decay: float) -> Tensor:
        """Takes a weight's gradient into its momentum; the matrix to make orthogonal."""
        state = self.state[weight]
        momentum = state.setdefault("momentum_buffer", torch.zeros_like(weight))
        gradient = self._unless_skipped(weight.grad, momentum)  # momentum averaged with itself stays
        momentum.lerp_(gradient, 1 - decay)
        return gradient.lerp(momentum, decay)

    def _unless_skipped(self, new: Any, old: Tensor) -> Tensor:
        return new if self.found_inf is None else torch.where(self.found_inf == 0, new, old)


def orthogonalize(matrices: Tensor) -> Tensor:
    """Matrices (n, rows, columns) with singular values of 0.7 to 1.2 instead, by Newton and Schulz's iteration.

    In bf16, where that is fast, else in float32.
    """
    x = matrices.bfloat16() if has_native_bf16(matrices.device) else matrices
    is_tall = x.shape[1] > x.shape[2]
    x = x.mT if is_tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(STEPS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=B, alpha=C), x, beta=A)
    return (x.mT if is_tall else x).to(matrices.dtype)
