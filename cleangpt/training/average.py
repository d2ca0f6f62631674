"""An exponential moving average of the weights, evaluated beside them (Polyak and Juditsky, 1992).

average <- decay * average + (1 - decay) * weights        after each step; the first one takes the weights alone
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor


class Average:
    """The average of a model's weights, sharded as they are."""

    def __init__(self, network: nn.Module, decay: float, saved: nn.Module | None = None) -> None:
        """`saved` has the average so far, on every process; without it, the weights as they are begin it."""
        self.decay, self.live = decay, dict(network.named_parameters())
        self.weights = {name: weight.detach().clone() for name, weight in self.live.items()}
        for name, value in saved.named_parameters() if saved is not None else ():
            average, whole = self.weights[name], value.detach()
            if isinstance(average, DTensor):
                whole = distribute_tensor(whole, average.device_mesh, average.placements, src_data_rank=None)
            average.copy_(whole)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights after `step`."""
        share = 1.0 if step == 1 else 1 - self.decay
        torch._foreach_lerp_([*self.weights.values()], [*self.live.values()], share)

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """For a while, the model has the average in place of its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, weight in self.live.items():
            kept = weight.clone()
            weight.copy_(self.weights[name])
            self.weights[name].copy_(kept)
