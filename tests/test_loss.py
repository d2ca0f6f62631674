"""With a large vocabulary, the loss in parts is the plain loss."""

import json
import statistics

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch.nn import functional as F

from cleangpt import (
    NanoGPTConfig,
    NanoGPTForCausalLM,
    NanoLlamaConfig,
    NanoLlamaForCausalLM,
    load_recipe,
    train,
)
from cleangpt.models import loss

SHAPE = {"vocab_size": 5000, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SHAPE |= {"max_position_embeddings": 400}


@pytest.fixture(params=["nanogpt", "nanollama"])
def model(request):
    torch.manual_seed(0)
    if request.param == "nanogpt":
        return NanoGPTForCausalLM(NanoGPTConfig(**SHAPE))
    return NanoLlamaForCausalLM(NanoLlamaConfig(intermediate_size=32, tie_word_embeddings=False, **SHAPE))


@pytest.fixture
def batch():
    ids = torch.randint(5000, (3, 401))
    targets = ids[:, 1:].clone()
    targets[1, 100:] = -100
    return {"input_ids": ids[:, :-1], "targets": targets}


def test_large_vocabulary_has_the_plain_loss_and_gradients(model, batch):
    part = loss.sum_nats(Accelerator(cpu=True), model, batch)
    part.backward()
    gradients = [weight.grad.clone() for weight in model.parameters()]
    model.zero_grad()
    logits = model(batch["input_ids"], use_cache=False).logits
    plain = F.cross_entropy(logits.flatten(0, 1), batch["targets"].flatten(), reduction="sum")
    plain.backward()
    assert part.item() == pytest.approx(plain.item(), rel=1e-6)
    for gradient, weight in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-4, atol=1e-5 * weight.grad.abs().max().item())


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_large_vocabulary_makes_no_logits(model, batch, precision):
    made = []
    model.lm_head.register_forward_hook(lambda module, inputs, output: made.append(output.numel()))
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision=precision)
    value = loss.sum_nats(accelerator, accelerator.prepare(model), batch)
    assert made == [0]
    assert value.dtype == torch.float32


def test_large_vocabulary_trains_as_the_plain_loss(tiny_text, tmp_path, monkeypatch):
    losses = {}
    for least in (1, 10**9):
        monkeypatch.setattr(loss, "LARGE_VOCABULARY", least)
        final = train(
            load_recipe(tiny_text, ["--training.max_steps=50", "--tracking.log_every=1", f"--run.name=a{least}"])
        )
        lines = (final.parent / "metrics.jsonl").read_text().splitlines()
        losses[least] = [json.loads(line)["train/loss"] for line in lines if "train/loss" in line]
    assert len(losses[1]) == 50
    assert losses[1] == pytest.approx(losses[10**9], rel=1e-5)


@pytest.mark.soak
@pytest.mark.parametrize("model", [["--model.model_type=nanogpt"], ["--model.model_type=nanollama"]])
def test_bf16_ends_within_the_spread_of_seeds(tiny_text, model):
    shape = ["--data.block_size=64", "--model.hidden_size=32", "--model.num_hidden_layers=2"]
    length = ["--training.max_steps=300", "--training.macro_batch=300", "--tracking.log_every=300"]
    ends = {"no": [], "bf16": []}
    for seed in range(5):
        for precision, losses in ends.items():
            options = [f"--run.seed={seed}", f"--run.name={precision}{seed}", f"--training.mixed_precision={precision}"]
            final = train(load_recipe(tiny_text, [*model, *shape, *length, *options]))
            lines = (final.parent / "metrics.jsonl").read_text().splitlines()
            losses.append(json.loads(lines[-1])["eval/loss"])
    assert abs(statistics.mean(ends["bf16"]) - statistics.mean(ends["no"])) < statistics.stdev(ends["no"])
