"""The loss of a batch: nats over its targets, without all logits at once where a large vocabulary makes them large."""

import torch
from accelerate import Accelerator, DistributedType
from torch import nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from .data.splits import IGNORED

LARGE = 4096  # words from which on the logits are what fills memory, and parts of them are faster to work on
PART = 512  # rows of logits at once; on 2 cores 256 to 1,024 are equally fast


def sum_nats(accelerator: Accelerator, model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The sum of -ln p(target) over a batch's targets, at least in float32.

    Args:
        model: as prepared by the accelerator. batch: `targets` (rows, time), -100 for none, and the model's inputs.
    """
    inputs = {name: values for name, values in batch.items() if name != "targets"}
    network = getattr(model, "module", model)  # as `unwrap_model` gives it, which takes longer
    sharded = accelerator.distributed_type == DistributedType.FSDP
    if in_parts(network, accelerator.mixed_precision, accelerator.device, sharded):
        return nats_in_parts(model, network.get_output_embeddings().weight, inputs, batch["targets"])
    return nats(model, inputs, batch["targets"])


def in_parts(network: PreTrainedModel, mixed_precision: str, device: torch.device, sharded: bool) -> bool:
    """Whether to make the logits in parts: for a NanoGPT or NanoLlama with a large vocabulary and float32 weights.

    The head's products are then float32 too: on a CPU in bf16 still faster than all logits at once, on a GPU not.
    FSDP shards the head, and other models may do more than multiply by it.
    """
    plain_head = network.config.model_type in ("nanogpt", "nanollama")
    is_float32 = network.dtype == torch.float32 and (mixed_precision == "no" or device.type == "cpu")
    return network.config.vocab_size >= LARGE and plain_head and is_float32 and not sharded


def nats(model: nn.Module, inputs: dict[str, torch.Tensor], targets: torch.Tensor) -> torch.Tensor:
    """The sum over all targets, from all logits."""
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)  # (rows x time, vocab)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def nats_in_parts(
    model: nn.Module, head: torch.Tensor, inputs: dict[str, torch.Tensor], targets: torch.Tensor
) -> torch.Tensor:
    """The same from the last hidden states: logits, loss and gradients are made for some rows at a time.

    Args:
        head: the weight that makes logits of hidden states, (vocab, hidden).
    """
    nothing = targets.new_empty(0)
    outputs = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=nothing)
    hidden = outputs.hidden_states[-1].flatten(0, 1)  # (rows x time, hidden)
    parts = nn.LinearCrossEntropyOptions(batch_chunk_size=PART, chunking_method=None)
    return F.linear_cross_entropy(hidden, head, targets.flatten(), reduction="sum", ignore_index=IGNORED, options=parts)
