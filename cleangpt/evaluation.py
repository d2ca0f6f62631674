"""Loss and task accuracy over a split, on any number of processes, and what a model answers."""

import math

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from .data.loader import to_device, to_host
from .data.splits import IGNORED


@torch.no_grad()
def evaluate(
    accelerator: Accelerator, model, split, batch_size: int, max_batches: int | None = None, num_rows: int | None = None
) -> dict[str, float]:
    """Measures a model on a whole split, or on its beginning.

    All processes call it. The figures do not depend on the batch size or the number of processes.

    Args:
        model: as prepared by the accelerator. split: see `data/splits.py`.
        batch_size: rows of one forward pass. max_batches, num_rows: where to stop; None goes through the whole split.

    Returns:
        `loss`, mean nats a target; `perplexity`, its exponential; `bits_per_byte` for text, nats / ln 2 over the UTF-8
        bytes of the text (for a part of it, of its share); `accuracy` for arithmetic, the fraction of problems whose
        whole answer, its end included, is the likeliest token at each place. That is what greedy generation writes:
        as long as every token is right, both see the same prefix.
    """
    rows = min(len(split), num_rows or len(split), (max_batches or len(split)) * batch_size)
    starts = range(0, rows, batch_size)
    was_training = model.training
    model.eval()
    sums = []
    # Every process makes the same number of passes, as sharded models need; one without rows counts nothing.
    for first in range(0, len(starts), accelerator.num_processes):
        mine = first + accelerator.process_index
        start = starts[mine] if mine < len(starts) else 0
        batch = to_host(split[np.arange(start, min(start + batch_size, rows))], accelerator.device)
        batch = to_device(batch, accelerator.device)
        targets = batch.pop("targets")
        logits = model(**batch, use_cache=False).logits  # (rows, time, vocab)
        losses = F.cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORED, reduction="none"
        )
        right = ((logits.argmax(-1) == targets) | (targets == IGNORED)).all(-1)
        counts = torch.stack(
            [losses.sum(), (targets != IGNORED).sum(), right.sum(), torch.tensor(len(right)).to(right.device)]
        )
        sums.append(counts * (mine < len(starts)))
    model.train(was_training)
    total = (
        torch.stack(sums).cpu().double().sum(0).to(accelerator.device if accelerator.device.type != "mps" else "cpu")
    )
    nats, num_targets, right, rows = accelerator.reduce(total, "sum").tolist()

    loss = nats / num_targets
    metrics = {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}
    if hasattr(split, "num_bytes"):
        metrics["bits_per_byte"] = loss / math.log(2) * split.num_targets / split.num_bytes
    else:
        metrics["accuracy"] = right / rows
    return metrics


@torch.no_grad()
def continue_texts(model, tokenizer, prompts: list[str], seed: int, max_new_tokens: int, **sampling) -> list[str]:
    """Each prompt with what the model writes after it; the global random state is left alone.

    Args:
        max_new_tokens: fewer where the model has no position left. sampling: options of `generate`.
    """
    was_training = model.training
    model.eval()
    texts = []
    with torch.random.fork_rng():
        for prompt in prompts:
            torch.manual_seed(seed)
            inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=False).to(model.device)
            room = model.config.max_position_embeddings - inputs["input_ids"].shape[1]
            length = {"max_new_tokens": max(1, min(max_new_tokens, room)), "max_length": None}
            output = model.generate(**inputs, **length, **sampling)
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    model.train(was_training)
    return texts


@torch.no_grad()
def solve(model, tokenizer, split, indices: np.ndarray) -> list[tuple[str, str, str]]:
    """Lets the model answer problems of an arithmetic split, greedily.

    Returns:
        (question, the model's answer, the right answer) as text, in the order the model writes it.
    """
    solved = []
    for question, answer in split.texts(indices):
        text = continue_texts(model, tokenizer, [question], 0, split.answer_width, do_sample=False)[0]
        solved.append((question, text.removeprefix(question), answer))
    return solved


def final_samples(model, data, recipe) -> list[str]:
    """Texts that show what a trained model can do, the same for the same weights.

    Args:
        data: see `data/prepare.py`. recipe: as resolved.

    Returns:
        For text each prompt with its continuation; for arithmetic one text, a held-out problem a line.
    """
    if not hasattr(data.splits["validation"], "answer_width"):
        prompts = recipe.evaluation.prompts or [data.example]
        return continue_texts(model, data.tokenizer, prompts, recipe.run.seed, 200, do_sample=True, top_k=50)
    split = data.splits.get("test", data.splits["validation"])
    solved = solve(model, data.tokenizer, split, np.arange(min(5, len(split))))
    return ["\n".join(q + answer + (f"   (right: {right})" if answer != right else "") for q, answer, right in solved)]
