"""Loss and task accuracy over a split, on any number of processes, and what a model writes."""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..data.arithmetic import ArithmeticSplit
from ..data.loader import to_device, to_host
from ..data.packing import TextSplit
from ..data.prepare import PreparedData
from ..data.splits import IGNORED, Split
from ..models.loss import sum_nats
from ..recipe.keys import Recipe
from .metrics.perplexity.perplexity import from_sums

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
        longest, where generation stops by itself.
    """
    rows = min(len(split), num_rows or len(split), (max_batches or len(split)) * batch_size)
    return evaluate_rows(accelerator, model, split, batch_size, rows)[0]


def evaluate_rows(
    accelerator: Accelerator, model: nn.Module, split: Split, batch_size: int, num_rows: int
) -> tuple[dict[str, float], np.ndarray]:
    """`evaluate` on the first `num_rows` rows, and which of those that this process saw are wrong, int (wrong,)."""
    starts = range(0, num_rows, batch_size)
    sums, wrong = [], []
    with inference(model):
        # Every process makes the same number of passes, as sharded models require; one without rows counts nothing.
        for first in range(0, len(starts), accelerator.num_processes):
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
    total = torch.stack(sums).cpu().double().sum(0)
    total = total if accelerator.device.type == "mps" else total.to(accelerator.device)  # mps has no float64
    nats, num_targets, num_right, num_seen = accelerator.reduce(total, "sum").tolist()

    num_bytes = split.num_bytes * num_targets / split.num_targets if isinstance(split, TextSplit) else None
    figures = from_sums(nats, num_targets, num_bytes)
    del figures["bits_per_token"]  # the loss in another unit
    if isinstance(split, ArithmeticSplit):
        figures["accuracy"] = num_right / num_seen
    places = [np.empty(0, int)] + [start + mask.nonzero().flatten().cpu().numpy() for start, mask in wrong]
    return figures, np.concatenate(places)


@contextlib.contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Without gradients and dropout; the model's mode is restored."""
    was_training = model.training
    try:
        model.eval()
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


def continue_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], seed: int, max_new_tokens: int
) -> list[str]:
    """Each prompt with a sampled continuation, of fewer tokens if the model runs out of positions.

    Prompts are shorter than these; an unknown character is read as `<unk>`. The global random state stays as it is.
    """
    texts = []
    with inference(model), torch.random.fork_rng():
        for prompt in prompts:
            torch.manual_seed(seed)
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
            room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
            length = {"max_new_tokens": min(max_new_tokens, room), "max_length": None}
            output = model.generate(**inputs, **length, do_sample=True, top_k=50)  # type: ignore[operator]
            texts += tokenizer.batch_decode(output, skip_special_tokens=True)
    return texts


def solve(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    split: ArithmeticSplit,
    indices: np.ndarray,
    batch_size: int = 1000,
) -> list[tuple[str, str, str]]:
    """(question, the model's answer, the right answer) of problems, with digits in the order in which they are written.

    Generation is greedy, in batches with a cache, up to the end token or the width of the longest right answer.
    """
    problems = split.texts(indices)
    answers = [""] * len(problems)
    lengths = np.array([len(question) for question, _ in problems])
    options = {"max_new_tokens": split.answer_width, "max_length": None, "do_sample": False}
    options |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.eos_token_id}
    with inference(model):
        for length in np.unique(lengths):  # questions of one length need no padding
            same = np.flatnonzero(lengths == length)
            for batch in np.split(same, range(batch_size, len(same), batch_size)):
                inputs = tokenizer([problems[i][0] for i in batch], return_tensors="pt", add_special_tokens=False)
                output = model.generate(**inputs.to(model.device), **options)  # type: ignore[operator]
                written = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
                for i, text in zip(batch, written, strict=True):
                    answers[i] = text.split(tokenizer.eos_token)[0]
    return [(question, answer, right) for (question, right), answer in zip(problems, answers, strict=True)]


def final_samples(model: PreTrainedModel, data: PreparedData, recipe: Recipe) -> list[str]:
    """What a model can do, the same for the same weights: continued prompts, or one text of held-out problems."""
    split = data.splits.get("test", data.splits["validation"])
    if not isinstance(split, ArithmeticSplit):
        prompts = recipe.evaluation.prompts or ([data.example] if data.example else [])
        return continue_texts(model, data.tokenizer, prompts, recipe.run.seed, 200)
    solved = solve(model, data.tokenizer, split, np.arange(min(5, len(split))))
    return ["\n".join(q + answer + (f"   (right: {right})" if answer != right else "") for q, answer, right in solved)]
