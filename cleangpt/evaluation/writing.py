"""What a model writes: continued prompts, answers to problems.

prompt ──> generate until the positions are full ──> its last half ──> generate ──> ...
"""

from collections.abc import Sequence

import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from ..data.arithmetic import ArithmeticSplit
from ..data.prepare import PreparedData
from ..hardware import seed_device
from ..recipe.keys import Recipe
from .evaluate import inference, patient_bar


def write(
    model: PreTrainedModel, ids: Tensor, max_new_tokens: int, streamer: BaseStreamer | None = None, **options: object
) -> Tensor:
    """Continues `ids` (1, time) by `max_new_tokens`, or up to the end token, and returns all of the text's ids.

    A text may be longer than the model's positions: when they are full, writing goes on from their last half. `options`
    are those of `generate`.
    """
    positions, ends = model.config.max_position_embeddings, model.generation_config.eos_token_id
    stream, last = _OneText(streamer) if streamer else None, ids.shape[1] + max_new_tokens
    options |= {"max_length": None, "streamer": stream}
    while (length := ids.shape[1]) < last:
        window = ids if length <= positions else ids[:, -max(1, positions // 2) :]
        room = min(last - length, positions + 1 - window.shape[1])  # the last token is written, not read
        written = model.generate(window, attention_mask=torch.ones_like(window), max_new_tokens=room, **options)  # type: ignore[operator]
        ids = torch.cat([ids, written[:, window.shape[1] :]], dim=1)
        if ids.shape[1] < length + room or ids[0, -1].item() in np.ravel([] if ends is None else ends):
            break
    if streamer:
        streamer.end()
    return ids


class _OneText(BaseStreamer):
    """Passes several calls of `generate` to a streamer as one text: the windows that they start from are known."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer, self.known = streamer, False

    def put(self, value: Tensor) -> None:
        if not self.known:
            self.streamer.put(value)
        self.known = False

    def end(self) -> None:
        self.known = True


def continue_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], seed: int, max_new_tokens: int
) -> list[str]:
    """Each prompt (unknown characters are read as `<unk>`) with a sampled continuation; the random state stays."""
    texts = []
    used = [model.device] if model.device.type == "cuda" else []
    with inference(model), torch.random.fork_rng(used):
        for prompt in prompts:
            seed_device(seed, model.device)
            ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
            output = write(model, ids, max_new_tokens, do_sample=True, top_k=50)
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
    with inference(model), patient_bar(len(problems), "Answering", PartialState().is_main_process) as bar:
        for length in np.unique(lengths):  # questions of one length need no padding
            same = np.flatnonzero(lengths == length)
            for batch in np.split(same, range(batch_size, len(same), batch_size)):
                inputs = tokenizer([problems[i][0] for i in batch], return_tensors="pt", add_special_tokens=False)
                output = model.generate(**inputs.to(model.device), **options)  # type: ignore[operator]
                written = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :])
                for i, text in zip(batch, written, strict=True):
                    answers[i] = text.split(tokenizer.eos_token)[0]
                bar.update(len(batch))
    return [(question, answer, right) for (question, right), answer in zip(problems, answers, strict=True)]


def example(data: PreparedData) -> list[str]:
    """What a model of text continues where the recipe has no prompts."""
    return [data.example] if data.folder and data.example else []


def final_samples(model: PreTrainedModel, data: PreparedData, recipe: Recipe) -> list[str]:
    """What a model can do, the same for the same weights: continued prompts, or one text of held-out problems."""
    split = data.splits.get("test", data.splits["validation"])
    if not isinstance(split, ArithmeticSplit):
        return continue_texts(model, data.tokenizer, data.prompts or example(data), recipe.run.seed, 200)
    solved = solve(model, data.tokenizer, split, np.arange(min(5, len(split))))
    return ["\n".join(q + answer + (f"   (right: {right})" if answer != right else "") for q, answer, right in solved)]
