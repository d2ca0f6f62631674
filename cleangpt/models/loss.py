"""The summed loss of a batch, in parts where all logits of a large vocabulary at once would fill the memory."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, masking_utils

from ..data.splits import IGNORED

LARGE_VOCABULARY = 4096  # from here on the logits fill the memory, and parts of them are faster
ROWS_PER_PART = 512  # 256 to 1,024 are equally fast on 2 cores


def sum_nats(accelerator: Accelerator, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The sum of -ln p(target) over a batch's `targets` (rows, time), -100 for none, in float32 or wider."""
    inputs = {name: values for name, values in batch.items() if name != "targets"}
    network: Any = getattr(model, "module", model)  # `unwrap_model` is slower
    is_sharded = accelerator.distributed_type == DistributedType.FSDP
    with packing_known("position_ids" in inputs):
        if in_parts(network, accelerator.mixed_precision, accelerator.device, is_sharded):
            return nats_in_parts(model, network.get_output_embeddings().weight, inputs, batch["targets"])
        return nats(model, inputs, batch["targets"])


@contextlib.contextmanager
def packing_known(packed: bool) -> Iterator[None]:
    """Tells transformers whether rows hold several documents, which it finds out by waiting for the device.

    It has no option for that, so its function is replaced for a while; the document of each token follows from
    positions that do not rise by one.
    """
    find = masking_utils.find_packed_sequence_indices

    def documents(position_ids: Tensor) -> Tensor | None:
        if not packed:
            return None
        return (position_ids.diff(prepend=position_ids[:, :1] - 1) != 1).cumsum(-1)  # (rows, time)

    masking_utils.find_packed_sequence_indices = documents
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = find


def in_parts(network: PreTrainedModel, mixed_precision: str, device: torch.device, sharded: bool) -> bool:
    """Whether to make the logits in parts: for a NanoGPT or NanoLlama with a large vocabulary and float32 weights.

    The head's products are then float32, which on a CPU in bf16 is still faster than all logits at once, on a GPU not.
    FSDP shards the head, and other models may do more than multiply by it.
    """
    has_plain_head = network.config.model_type in ("nanogpt", "nanollama")
    is_float32 = network.dtype == torch.float32 and (mixed_precision == "no" or device.type == "cpu")
    return network.config.vocab_size >= LARGE_VOCABULARY and has_plain_head and is_float32 and not sharded


def nats(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """The sum over all targets, from all logits at once."""
    logits = model(**inputs, use_cache=False).logits.flatten(0, 1)  # (rows x time, vocab)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(logits, targets.flatten(), ignore_index=IGNORED, reduction="sum")


def nats_in_parts(model: nn.Module, head: Tensor, inputs: dict[str, Tensor], targets: Tensor) -> Tensor:
    """The same from the last hidden states and the weight `head` (vocab, hidden), some rows of logits at a time."""
    outputs = model(**inputs, use_cache=False, output_hidden_states=True, logits_to_keep=targets.new_empty(0))  # none
    hidden = outputs.hidden_states[-1].flatten(0, 1)  # (rows x time, hidden)
    parts = nn.LinearCrossEntropyOptions(batch_chunk_size=ROWS_PER_PART, chunking_method=None)
    return F.linear_cross_entropy(hidden, head, targets.flatten(), reduction="sum", ignore_index=IGNORED, options=parts)
