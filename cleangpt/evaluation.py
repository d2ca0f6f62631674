"""Loss and task accuracy over a split, on any number of processes, and what a model answers."""

import numpy as np
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from .data.loader import to_device, to_host
from .data.splits import IGNORED
from .loss import sum_nats
from .metrics.perplexity.perplexity import from_sums

MOST_PROBLEMS = 200_000  # of an arithmetic split, which may hold 10^24, that are graded where nobody says how many


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
        bytes of the text (for a part of it, of its share); `accuracy` for arithmetic, the fraction of problems in which
        each token of the answer is the likeliest after the right ones before it. Greedy generation writes just these
        answers right: as long as every token is right, both see the same prefix. The end counts where an answer is
        shorter than the longest one, as generation stops there by itself.
    """
    return evaluate_rows(accelerator, model, split, batch_size, max_batches, num_rows)[0]


@torch.no_grad()
def evaluate_rows(
    accelerator: Accelerator, model, split, batch_size: int, max_batches: int | None = None, num_rows: int | None = None
) -> tuple[dict[str, float], np.ndarray]:
    """As `evaluate`; also returns which of this process's rows had a token that was not the likeliest, int (wrong,)."""
    rows = min(len(split), num_rows or len(split), (max_batches or len(split)) * batch_size)
    is_text = hasattr(split, "num_bytes")
    starts = range(0, rows, batch_size)
    was_training = model.training
    model.eval()
    sums, wrong = [], []
    # Every process makes the same number of passes, as sharded models need; one without rows counts nothing.
    for first in range(0, len(starts), accelerator.num_processes):
        mine = first + accelerator.process_index
        start = starts[mine] if mine < len(starts) else 0
        batch = to_host(split[np.arange(start, min(start + batch_size, rows))], accelerator.device)
        batch = to_device(batch, accelerator.device)
        targets = batch["targets"]
        if is_text:
            nats, right = sum_nats(accelerator, model, batch), torch.ones(len(targets), dtype=torch.bool)
        else:
            nats, right = check_answers(model, batch, split.answer_width)
        counts = [nats, (targets != IGNORED).sum(), right.sum(), torch.tensor(len(right))]
        sums.append(torch.stack([count.to(accelerator.device) for count in counts]) * (mine < len(starts)))
        if mine < len(starts):
            wrong.append((start, ~right))
    model.train(was_training)
    total = (
        torch.stack(sums).cpu().double().sum(0).to(accelerator.device if accelerator.device.type != "mps" else "cpu")
    )
    nats, num_targets, num_right, num_seen = accelerator.reduce(total, "sum").tolist()

    figures = from_sums(nats, num_targets, split.num_bytes * num_targets / split.num_targets if is_text else None)
    del figures["bits_per_token"]  # the loss in another unit
    if not is_text:
        figures["accuracy"] = num_right / num_seen
    places = [np.empty(0, int)] + [start + mask.nonzero().flatten().cpu().numpy() for start, mask in wrong]
    return figures, np.concatenate(places)


def check_answers(model, batch: dict[str, torch.Tensor], answer_width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of nats over the targets; and of each row, whether every token is the likeliest, bool (rows,).

    Args:
        answer_width: tokens that generation would write; what comes after them does not matter.
    """
    inputs = {name: values for name, values in batch.items() if name != "targets"}
    targets = batch["targets"]  # (rows, time)
    logits = model(**inputs, use_cache=False).logits.float()  # (rows, time, vocab)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="sum")
    is_target = targets != IGNORED
    matters = is_target & (is_target.cumsum(-1) <= answer_width)
    return nats, ((logits.argmax(-1) == targets) | ~matters).all(-1)


@torch.no_grad()
def continue_texts(model, tokenizer, prompts: list[str], seed: int, max_new_tokens: int, **sampling) -> list[str]:
    """Each prompt with what the model writes after it; the global random state is left alone.

    Args:
        prompts: shorter than the model's positions; what the tokenizer does not know is `<unk>`.
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
            length = {"max_new_tokens": min(max_new_tokens, room), "max_length": None}
            output = model.generate(**inputs, **length, **sampling)
            texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    model.train(was_training)
    return texts


@torch.no_grad()
def solve(model, tokenizer, split, indices: np.ndarray, batch_size: int = 1000) -> list[tuple[str, str, str]]:
    """Lets the model answer problems of an arithmetic split, greedily: batched, with a cache.

    An answer goes to the end token, or to the width of the longest right one.

    Returns:
        (question, the model's answer, the right answer) as text, in the order the model writes it.
    """
    was_training = model.training
    model.eval()
    problems = split.texts(indices)
    answers = [""] * len(problems)
    lengths = np.array([len(question) for question, _ in problems])
    for length in np.unique(lengths):  # nothing to pad
        same = np.flatnonzero(lengths == length)
        for batch in np.split(same, range(batch_size, len(same), batch_size)):
            inputs = tokenizer([problems[i][0] for i in batch], return_tensors="pt", add_special_tokens=False)
            output = model.generate(
                **inputs.to(model.device),
                max_new_tokens=split.answer_width,
                max_length=None,
                do_sample=False,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
            for i, text in zip(batch, tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :]), strict=True):
                answers[i] = text.split(tokenizer.eos_token)[0]
    model.train(was_training)
    return [(question, answer, right) for (question, right), answer in zip(problems, answers, strict=True)]


def final_samples(model, data, recipe) -> list[str]:
    """Texts that show what a trained model can do, the same for the same weights.

    Args:
        data: see `data/prepare.py`. recipe: as resolved.

    Returns:
        For text each prompt with its continuation, nothing where there is no room for one; for arithmetic one text, a
        held-out problem a line.
    """
    if not hasattr(data.splits["validation"], "answer_width"):
        prompts = recipe.evaluation.prompts or ([data.example] if data.example else [])
        return continue_texts(model, data.tokenizer, prompts, recipe.run.seed, 200, do_sample=True, top_k=50)
    split = data.splits.get("test", data.splits["validation"])
    solved = solve(model, data.tokenizer, split, np.arange(min(5, len(split))))
    return ["\n".join(q + answer + (f"   (right: {right})" if answer != right else "") for q, answer, right in solved)]
