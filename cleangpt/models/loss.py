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
from ..errors import UserError
from ..hardware import default_device

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


def check_documents(network: PreTrainedModel, length: int, rows: int) -> None:
    """Refuses a model in which a document sees the one packed before it in sequences of `length` tokens.

    Found out by changing it, as training packs it, in `rows` rows: `flash_attention_2` tells documents apart in one row
    only. A leak is about as large as the effect without packing, and rounding (a mixture's experts see other tokens)
    far smaller.
    """
    attention, size, half = network.config._attn_implementation or "", network.config.vocab_size, min(8, length // 2)
    if half == 0:
        return
    is_flash = "flash" in attention  # whose kernels want a GPU and 16 bits
    if is_flash:
        network.to(default_device())  # type: ignore[arg-type]
    ids = torch.arange(2 * half, device=network.device).repeat(rows, 1)  # (rows, 2 x half)
    is_first, positions = ids < half, ids % half

    def effect(**packing: Tensor) -> float:
        """The largest change of a logit of the second half when the first one changes."""
        with packing_known("position_ids" in packing):
            one, other = (
                network(input_ids=(ids + is_first * shift) % size, use_cache=False, **packing).logits[:, half:].float()
                for shift in (0, 1)
            )
        return float((one - other).abs().max())

    was_training = network.training
    network.eval()
    with torch.no_grad(), torch.autocast(network.device.type, torch.bfloat16, enabled=is_flash):
        leak, whole = effect(position_ids=positions), effect()
    network.train(was_training)
    if leak > whole / 100:
        name = f"{network.config.model_type} with {attention or 'its own'} attention"
        raise UserError(("data.packing", f"expected windows or blocks, got documents: they see each other in {name}"))


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
