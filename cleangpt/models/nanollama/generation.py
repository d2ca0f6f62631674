"""Writing text faster; the same file in the folder of each model, since a saved model brings its own code."""

from typing import Any

import torch
from torch import nn
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.generation import GenerationConfig, GenerationMixin

ROOM = 64  # tokens, for which a cache makes room at once
BIG = 300_000  # multiplications: below that, oneDNN takes longer to start than it gains
ONEDNN_LINEAR = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._linear_pointwise


class Linear(nn.Linear):
    """`nn.Linear`, evaluated in float32 on a CPU by oneDNN; torch takes MKL, which needs up to twice as long on AMD."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        weight, bias = self.weight, self.bias
        if (
            not (self.training or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"))
            and states.numel() * self.out_features > BIG
            and (states.is_cpu and states.dtype is torch.float32 and weight.dtype is torch.float32)
            and type(weight) is nn.Parameter  # neither quantised nor distributed
            and (ONEDNN_LINEAR and not torch.compiler.is_compiling())
        ):
            return ONEDNN_LINEAR(states, weight, bias, "none", [], "")
        return nn.functional.linear(states, weight, bias)


class RoomyLayer(DynamicLayer):
    """Keys and values of the past, with room for tokens to come: `DynamicLayer` copies all of it for each new token."""

    rooms: list[torch.Tensor] | None = None  # for keys and values, each (batch, heads, past and room, head_dim)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        past, time = self.get_seq_length(), key_states.shape[-2]
        if torch.is_grad_enabled():  # written in place, a gradient would miss what was there
            return super().update(key_states, value_states)
        if self.has_room(past + time):
            for room, states in zip(self.rooms, (key_states, value_states), strict=True):
                room.narrow(-2, past, time).copy_(states)
        else:
            longer = super().update(key_states, value_states)
            self.rooms = [nn.functional.pad(states, (0, 0, 0, ROOM)) for states in longer]
        self.keys, self.values = (room.narrow(-2, 0, past + time) for room in self.rooms)
        return self.keys, self.values

    def has_room(self, length: int) -> bool:
        """Whether the past still lies at the start of `rooms` (beam search moves it, say), and `length` tokens fit."""
        if not (self.rooms and self.is_initialized):
            return False
        room = self.rooms[0]
        same = self.keys.data_ptr() == room.data_ptr() and self.keys.shape[0] == room.shape[0]
        return same and length <= room.shape[-2] and room.is_inference() == torch.is_inference_mode_enabled()


class RoomyGenerationMixin(GenerationMixin):
    """`generate` with a cache of `RoomyLayer`s wherever transformers takes its own `DynamicCache`."""

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if type(cache) is DynamicCache and not cache.get_seq_length():
            cache.layers = [RoomyLayer() for _ in range(self.config.num_hidden_layers)]
