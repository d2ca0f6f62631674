"""What the machine can do, and what one watches in a run besides its losses: speed, how far weights move, their size.

Everything is computed when a line of metrics is due, and never in between.
"""

import functools
import resource
import sys
import time

import torch
from torch import nn


def has_native_bf16(device: torch.device) -> bool:
    """Whether products of bf16 are faster than those of float32; a CPU without them emulates them, very slowly."""
    if device.type != "cpu":
        return True
    capability = torch.cpu.get_capabilities()
    return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("bf16"))


def flops_per_token(model) -> int:
    """Floating-point operations of training on one token, forward and backward, without recomputation.

    6 for each weight in a matrix product, and 12 x layers x width x context for attention (PaLM, arXiv 2204.02311,
    appendix B). Causal attention is counted in full, as everybody does.

    Args:
        model: a transformers model, its context counted as long as its positions.
    """
    config = model.config
    products = model.num_parameters(exclude_embeddings=True)
    if config.tie_word_embeddings:
        products += config.vocab_size * config.hidden_size  # the head, which is an embedding by name
    attention = 12 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
    return 6 * products + attention


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """Floating-point operations a second of a square matrix product, measured on `device`.

    Products grow until one takes a while, so that a type that the hardware only emulates does not hold up a run.

    Args:
        num_threads: of this process's CPU part; a measurement for another number is another one.
    """
    best, slowest, size = 0.0, 0.0, 256
    while slowest < 0.02 and size <= 8192:
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(3):
            started = time.perf_counter()
            (one @ other)[0, 0].item()  # waits for the device
            seconds = time.perf_counter() - started
            best, slowest = max(best, 2 * size**3 / seconds), seconds
        size *= 2
    return best


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's memory, the most that was allocated; of a CPU process, the most that was resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


def copy_weights(model: nn.Module) -> list[torch.Tensor]:
    """Every weight, of a sharded one this process's part, as it is now."""
    return [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]


@torch.no_grad()
def update_ratio(before: list[torch.Tensor], model: nn.Module) -> float:
    """Length of the last update over the length of the weights, both as one vector; 1e-3 is usual.

    Args:
        before: `copy_weights` before the update.
    """
    after = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    return _length(torch._foreach_sub(after, before)) / _length(before)


@torch.no_grad()
def weight_norms(model: nn.Module) -> dict[str, float]:
    """`weight_norm/` and a layer's name, `transformer.h.0` say, to the length of its weights as one vector.

    Layers are what stands in the model's list of blocks; weights elsewhere stand for themselves.
    """
    groups: dict[str, list[torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        parts = name.removeprefix("module.").split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        groups.setdefault(".".join(parts[: number + 1]), []).append(weight.detach())
    return {f"weight_norm/{name}": _length(weights) for name, weights in groups.items()}


def _length(tensors: list[torch.Tensor]) -> float:
    """Length of all as one vector; all processes call it, since those of sharded ones add up their parts."""
    norms = torch._foreach_norm(tensors)
    return torch.stack([norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]).norm().item()
