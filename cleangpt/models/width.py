"""How the weights of a wider model begin and move, so that the best learning rate stays (muP, arXiv 2203.03466).

With ratio = `optimizer.reference_width` / `hidden_size`, and heads of one width:

                                        initial weights   rate of AdamW   rate of Muon
hidden matrices                         x sqrt(ratio)     x ratio         x sqrt(ratio)
the norm before the head                x ratio           x ratio
embeddings, head, all other vectors     as they are       as it is

The norm stands for the factor that muP puts on the logits. It is a weight, so the model's function needs no change.
"""

import math

import torch
from torch import nn
from transformers import PreTrainedModel

from ..errors import UserError


def hidden_matrices(model: PreTrainedModel) -> list[nn.Parameter]:
    """The matrices inside the blocks: all but embeddings and head."""
    outer = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    outer |= {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    return [weight for weight in model.parameters() if weight.ndim == 2 and id(weight) not in outer]


def final_norm(model: PreTrainedModel) -> nn.Module:
    """The norm before the head, beside the blocks; a UserError where there is none."""
    norms = [child for child in model.base_model.children() if getattr(getattr(child, "weight", None), "ndim", 0) == 1]
    if not norms:
        raise _no_norm(model)
    return norms[-1]


@torch.no_grad()
def scale_initial(model: PreTrainedModel, reference_width: int) -> None:
    """Scales new weights as the table says; a UserError for a model whose final norm does not begin at 1."""
    ratio, norm = reference_width / model.config.hidden_size, final_norm(model).get_parameter("weight")
    if not bool(norm.eq(1).all()):
        raise _no_norm(model)
    norm.mul_(ratio)
    for weight in hidden_matrices(model):
        weight.mul_(math.sqrt(ratio))


def _no_norm(model: PreTrainedModel) -> UserError:
    message = f"expected null: {type(model).__name__} has no final norm beside its blocks that begins at 1"
    return UserError(("optimizer.reference_width", message))
