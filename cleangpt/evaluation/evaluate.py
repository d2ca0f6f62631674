"""Loss and task accuracy over a split, on any number of processes."""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from ..data.arithmetic import ArithmeticSplit
from ..data.loader import to_device, to_host
from ..data.mixture import Mixture
from ..data.packing import TextSplit
from ..data.splits import IGNORED, Split
from ..models.loss import sum_nats

MAX_GRADED = 200_000  # problems of an arithmetic split, which may have 10^24, where no number is given


def evaluate(
    accelerator: Accelerator,
    model: nn.Module,
    split: Split,
    batch_size: int,
    max_batches: int | None = None,
    num_rows: int | None = None,
) -> dict[str, float]:
    """Measures a prepared model on a split, or its first `num_rows` or `max_batches`, counted over all processes.

    All processes call it; the figures depend neither on their number nor on the batch size.

    Returns:
        `loss`, mean nats per target; `perplexity`, its exponential; for text `bits_per_byte`, nats / ln 2 over its
        UTF-8 bytes (pro rata for part of a split); for arithmetic `accuracy`, the fraction of problems in which each
        token of the answer is the likeliest after the right ones before it. Greedy generation solves the same problems,
        since it sees the same prefix up to its first mistake. The end token counts after an answer shorter than the
        longest, where generation stops by itself. For a mixture also `loss/<label>` of each source, `max_batches` of
        each.
    """
    num_rows = num_rows or len(split)
    if not isinstance(split, Mixture):
        rows = min(len(split), num_rows, (max_batches or len(split)) * batch_size)
        return evaluate_rows(accelerator, model, split, batch_size, rows)[0]
    nats, num_targets, num_bytes, losses = 0.0, 0, 0.0, {}
    for label, source in split.sources.items():
        if num_rows < 1:
            break
        rows = min(len(source), num_rows, (max_batches or len(source)) * batch_size)
        num_rows -= len(source)
        losses[f"loss/{label}"] = loss = evaluate_rows(accelerator, model, source, batch_size, rows)[0]["loss"]
        targets = source.count_targets(np.arange(rows))
        nats, num_targets = nats + loss * targets, num_targets + targets
        num_bytes += source.num_bytes * targets / source.num_targets
    return from_sums(nats, num_targets, num_bytes) | losses


def from_sums(nats: float, num_targets: float, num_bytes: float | None = None) -> dict[str, float]:
    """A split's figures from its sums, `bits_per_byte` if `num_bytes` is given; e^700 is near the largest float."""
    loss = nats / num_targets
    figures = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    return figures if num_bytes is None else figures | {"bits_per_byte": nats / math.log(2) / num_bytes}


def evaluate_rows(
    accelerator: Accelerator, model: nn.Module, split: Split, batch_size: int, num_rows: int
) -> tuple[dict[str, float], np.ndarray]:
    """`evaluate` on the first `num_rows` rows, and which of those that this process saw are wrong, int (wrong,)."""
    starts = range(0, num_rows, batch_size)
    sums, wrong = [], []
    # Every process makes the same number of passes, as sharded models require; one without rows counts nothing.
    passes = range(0, len(starts), accelerator.num_processes)
    with inference(model), patient_bar(len(passes), "Evaluating", accelerator.is_main_process) as bar:
        for first in passes:
            mine = first + accelerator.process_index
            start = starts[mine] if mine < len(starts) else 0
            rows = to_host(split[np.arange(start, min(start + batch_size, num_rows))], accelerator.device)
            batch = to_device(rows, accelerator.device)
            if isinstance(split, ArithmeticSplit):
                nats, right = check_answers(model, batch, split.answer_width)
            else:
                nats, right = sum_nats(accelerator, model, batch), torch.ones(len(batch["targets"]), dtype=torch.bool)
            counts = [nats, (batch["targets"] != IGNORED).sum(), right.sum(), torch.tensor(len(right))]
            sums.append(torch.stack([count.to(accelerator.device) for count in counts]) * (mine < len(starts)))
            if mine < len(starts):
                wrong.append((start, ~right))
            if bar.update() and isinstance(split, ArithmeticSplit):
                _, _, num_right, num_seen = torch.stack(sums).sum(0).tolist()
                bar.set_postfix(accuracy=num_right / num_seen)
    total = torch.stack(sums).cpu().double().sum(0)
    total = total if accelerator.device.type == "mps" else total.to(accelerator.device)  # mps has no float64
    nats, num_targets, num_right, num_seen = accelerator.reduce(total, "sum").tolist()

    num_bytes = split.num_bytes * num_targets / split.num_targets if isinstance(split, TextSplit) else None
    figures = from_sums(nats, num_targets, num_bytes)
    if isinstance(split, ArithmeticSplit):
        figures["accuracy"] = num_right / num_seen
    places = [np.empty(0, int)] + [start + mask.nonzero().flatten().cpu().numpy() for start, mask in wrong]
    return figures, np.concatenate(places)


def patient_bar(total: int, title: str, shown: bool) -> tqdm:
    """A progress bar, in a terminal and for work of more than a few seconds; its `update` says whether it was drawn."""
    return tqdm(total=total, desc=title, delay=3, leave=False, disable=None if shown else True)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; the model's mode is restored."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def check_answers(model: nn.Module, batch: dict[str, Tensor], answer_width: int) -> tuple[Tensor, Tensor]:
    """The sum of nats, and whether each row's first `answer_width` targets are the likeliest tokens, bool (rows,)."""
    inputs = {name: values for name, values in batch.items() if name != "targets"}
    targets = batch["targets"]  # (rows, time)
    logits = model(**inputs, use_cache=False).logits.float()  # (rows, time, vocab)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    is_target = targets != IGNORED
    matters = is_target & (is_target.cumsum(-1) <= answer_width)  # generation writes no more
    return nats, ((logits.argmax(-1) == targets) | ~matters).all(-1)
