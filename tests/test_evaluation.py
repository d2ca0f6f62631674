"""Evaluation: the loss is a sum written by hand, for any batch size; accuracy is what generation achieves."""

import itertools
import math

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional as F

from cleangpt import NanoGPTConfig, NanoGPTForCausalLM, load_recipe, train
from cleangpt.data.prepare import PreparedData
from cleangpt.evaluation.evaluate import evaluate
from cleangpt.evaluation.writing import continue_texts, solve, write
from cleangpt.training.setup import load_data


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


def model_for(data: PreparedData, **options) -> NanoGPTForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 32}
    config = NanoGPTConfig(vocab_size=len(data.tokenizer), initializer_range=0.3, pad_token_id=0, **shape, **options)
    return NanoGPTForCausalLM(config).eval()


def test_loss_is_the_mean_over_all_targets(tiny_text, accelerator):
    _, data = load_data(load_recipe(tiny_text))
    model, split = model_for(data), data.splits["validation"]
    tokens = torch.from_numpy(np.concatenate([*split.stream]).astype(np.int64))
    total = 0.0
    for start in range(0, len(tokens) - 1, 16):
        window = tokens[start : start + 17]
        total += F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum").item()
    metrics = evaluate(accelerator, model, split, batch_size=3)
    assert metrics["loss"] == pytest.approx(total / (len(tokens) - 1), rel=1e-6)
    assert metrics["perplexity"] == pytest.approx(math.exp(metrics["loss"]))
    text = data.tokenizer.decode(tokens)
    assert metrics["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-6)


@pytest.mark.parametrize("packing", ["blocks", "documents"])
def test_documents_are_measured_alone(tiny_text, stories_file, accelerator, packing):
    """With `documents` the loss is that of each document alone, and bits per byte are over the same bytes of text."""
    options = ["--data.path=json", f"--data.data_files={stories_file}", "--data.block_size=32"]
    _, data = load_data(load_recipe(tiny_text, [*options, f"--data.packing={packing}"]))
    model, split = model_for(data), data.splits["validation"]
    total = count = 0
    tokens = np.concatenate([*split.stream]).astype(np.int64)
    for start in range(0, len(tokens) - 1, 32):
        window = torch.from_numpy(tokens[start : start + 33])
        ends = (
            (window[:-1] == data.tokenizer.eos_token_id).nonzero().flatten().tolist() if packing == "documents" else []
        )
        for begin, end in itertools.pairwise([0, *(place + 1 for place in ends), len(window)]):
            document = window[begin:end]
            if len(document) > 1:
                logits = model(document[None, :-1]).logits[0]
                total += F.cross_entropy(logits, document[1:], reduction="sum").item()
                count += len(document) - 1
    metrics = evaluate(accelerator, model, split, batch_size=3)
    assert count == split.num_targets
    assert metrics["loss"] == pytest.approx(total / count, rel=1e-5)
    text = data.tokenizer.decode(tokens, skip_special_tokens=True)
    assert metrics["bits_per_byte"] == pytest.approx(total / math.log(2) / len(text.encode()), rel=1e-5)


def test_the_batch_size_changes_nothing(tiny_text, accelerator):
    _, data = load_data(load_recipe(tiny_text))
    model = model_for(data)
    losses = [evaluate(accelerator, model, data.splits["validation"], size)["loss"] for size in (1, 2, 7, 1000)]
    assert max(losses) - min(losses) < 1e-6


def test_a_part_of_a_split_is_its_beginning(tiny_text, accelerator):
    _, data = load_data(load_recipe(tiny_text))
    model, split = model_for(data), data.splits["validation"]
    part = evaluate(accelerator, model, split, 2, max_batches=2)
    assert part == pytest.approx(evaluate(accelerator, model, split, 4, num_rows=4), rel=1e-6)
    assert part["loss"] != evaluate(accelerator, model, split, 2)["loss"]


@pytest.mark.parametrize("zero_pad", ["true", "false"])
def test_accuracy_is_the_fraction_of_problems_that_generation_solves(tiny_adder, accelerator, zero_pad):
    options = ["--training.max_steps=150", "--optimizer.lr=0.01", f"--data.zero_pad={zero_pad}"]
    final = train(recipe := load_recipe(tiny_adder, options))
    model = NanoGPTForCausalLM.from_pretrained(final).eval()
    _, data = load_data(recipe)
    split = data.splits["train"]
    solved = [answer == right for _, answer, right in solve(model, data.tokenizer, split, np.arange(len(split)))]
    accuracy = evaluate(accelerator, model, split, 16)["accuracy"]
    assert 0 < accuracy < 1
    assert accuracy == pytest.approx(np.mean(solved))


def test_batched_answers_are_those_of_one_problem_at_a_time(tiny_adder):
    _, data = load_data(load_recipe(tiny_adder, ["--data.num_digits=2", "--data.zero_pad=false"]))
    model, split = model_for(data), data.splits["test"]
    indices = np.arange(40)
    alone = [solve(model, data.tokenizer, split, indices[i : i + 1])[0] for i in indices]
    assert len({len(question) for question, _, _ in alone}) > 1
    assert solve(model, data.tokenizer, split, indices, batch_size=7) == alone
    for question, answer, _ in alone[:5]:
        ids = data.tokenizer(question, return_tensors="pt")["input_ids"]
        for _ in range(split.answer_width):  # no cache, no batch
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
        written = data.tokenizer.decode(ids[0]).removeprefix(question)
        assert written.split(data.tokenizer.eos_token)[0] == answer


def test_samples_come_from_their_own_seed_and_disturb_no_other(tiny_text):
    _, data = load_data(load_recipe(tiny_text))
    model = model_for(data)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    one, other = (continue_texts(model, data.tokenizer, ["The"], 1, 10) for _ in range(2))
    assert one == other and one[0].startswith("The")
    assert torch.equal(torch.rand(1), expected)


def test_writing_goes_on_when_the_positions_are_full(tiny_text):
    """Each window is the last half of the positions, and greedy text is what the model finds likeliest in it."""
    _, data = load_data(load_recipe(tiny_text))
    model, ids = model_for(data), torch.tensor([[3, 1, 4, 1, 5]])
    model.generation_config.eos_token_id = None
    written = write(model, ids, 100, do_sample=False)[0]
    assert len(written) == 105
    expected, window = ids, ids
    while expected.shape[1] < 105:
        window = window if window.shape[1] <= 32 else expected[:, -16:]
        token = model(window, use_cache=False).logits[:, -1:].argmax(-1)
        expected, window = torch.cat([expected, token], 1), torch.cat([window, token], 1)
    assert torch.equal(written, expected[0])


def test_writing_ends_at_the_end_token(tiny_text):
    _, data = load_data(load_recipe(tiny_text))
    model, ids = model_for(data), torch.tensor([[3, 1, 4, 1, 5]])
    model.generation_config.eos_token_id = None
    written = write(model, ids, 60, do_sample=False)[0].tolist()
    model.generation_config.eos_token_id = written[40]
    end = written.index(written[40], 5)
    assert write(model, ids, 60, do_sample=False)[0].tolist() == written[: end + 1]


def test_a_prompt_may_be_longer_than_the_positions(tiny_text):
    _, data = load_data(load_recipe(tiny_text))
    model = model_for(data)
    prompt = "The quick brown fox jumps over the lazy dog. "
    (text,) = continue_texts(model, data.tokenizer, [prompt], 1, 40)
    assert text.startswith(prompt) and len(text) > len(prompt)


def test_samples_leave_the_random_state_as_it_is_and_other_gpus_alone(tiny_text, monkeypatch):
    _, data = load_data(load_recipe(tiny_text))
    model = model_for(data)

    def touched(*device):
        raise AssertionError(device)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    for name in ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, touched)
    before = torch.get_rng_state()
    (text,) = continue_texts(model, data.tokenizer, ["The fox"], 1, 5)
    assert len(text) > len("The fox")
    assert torch.equal(torch.get_rng_state(), before)
