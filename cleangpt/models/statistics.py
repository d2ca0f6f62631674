"""Figures of a model other than its loss: FLOPs, size of its updates, norms and histograms of its weights."""

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel


def flops_per_token(model: PreTrainedModel) -> int:
    """Floating-point operations of training on one token, forward and backward, in sequences of full length.

    6 per weight in a matrix product, 12 x layers x width x context for attention, causal or not; none for recomputation
    (PaLM, arXiv 2204.02311, appendix B). Of a mixture's experts those count that a token goes through.
    """
    config = model.config
    products = model.num_parameters(exclude_embeddings=True)
    if config.tie_word_embeddings:
        products += config.vocab_size * config.hidden_size  # the head, an embedding by name
    names = [name for name in ("num_local_experts", "num_experts", "n_routed_experts") if getattr(config, name, None)]
    if names and getattr(config, "num_experts_per_tok", None):
        experts = sum(weight.numel() for name, weight in model.named_parameters() if ".experts." in name)
        products -= experts - experts * config.num_experts_per_tok // getattr(config, names[0])
    attention = 12 * config.num_hidden_layers * config.hidden_size * config.max_position_embeddings
    return 6 * products + attention


def copy_weights(model: nn.Module) -> list[torch.Tensor]:
    """A copy of each trained weight, or of this process's shard of it."""
    return [weight.detach().clone() for weight in model.parameters() if weight.requires_grad]


@torch.no_grad()
def update_ratio(before: list[torch.Tensor], model: nn.Module) -> float:
    """Norm of the update since `copy_weights` made `before`, over the norm of `before`; usually about 1e-3."""
    after = [weight.detach() for weight in model.parameters() if weight.requires_grad]
    return _norm(list(torch._foreach_sub(after, before))) / _norm(before)


@torch.no_grad()
def weight_norms(model: nn.Module) -> dict[str, float]:
    """`weight_norm/` and the name of a block (`transformer.h.0`) or of a module outside the blocks, to its norm."""
    return {f"weight_norm/{name}": _norm(weights) for name, weights in _by_block(model).items()}


@torch.no_grad()
def histograms(model: nn.Module, gradient_scale: float | None = None) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """`weights/` or `gradients/` and the name of a block, to counts (64,) of its finite values and edges (65,).

    Every process has to call it: each block is gathered in its turn.

    Args:
        gradient_scale: None for the weights, else what to divide their gradients by.
    """
    kind, found = "weights" if gradient_scale is None else "gradients", {}
    for name, weights in _by_block(model).items():
        tensors = [weight if gradient_scale is None else weight.grad for weight in weights]
        whole = [each.full_tensor() if hasattr(each, "full_tensor") else each for each in tensors if each is not None]
        values = (
            torch.cat([each.flatten().float() for each in whole]) / (gradient_scale or 1) if whole else torch.empty(0)
        )
        values = values[values.isfinite()]
        if values.numel():
            low, high = values.min().item(), values.max().item()
            bins = ((values - low) * (64 / ((high - low) or 1))).long().clamp_(max=63)
            counts = torch.bincount(bins, minlength=64).cpu().numpy()
            found[f"{kind}/{name}"] = counts, np.linspace(low, high if high > low else low + 1, 65)
    return found


def _by_block(model: nn.Module) -> dict[str, list[torch.Tensor]]:
    """The weights of each block (`transformer.h.0`) and of each module outside the blocks."""
    groups: dict[str, list[torch.Tensor]] = {}
    for name, weight in model.named_parameters():
        parts = name.removeprefix("module.").split(".")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), len(parts) - 2)
        groups.setdefault(".".join(parts[: number + 1]), []).append(weight)
    return groups


def _norm(tensors: list[torch.Tensor]) -> float:
    """Norm of all tensors as one vector, shards of other processes included: every process has to call it."""
    norms = torch._foreach_norm(tensors)
    return torch.stack([norm.full_tensor() if hasattr(norm, "full_tensor") else norm for norm in norms]).norm().item()
