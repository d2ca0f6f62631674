"""Optimizers: who decays, who goes to Muon, and that a step does what it says."""

import pytest
import torch
from torch import nn

from cleangpt import NanoGPTConfig, NanoGPTForCausalLM, NanoLlamaConfig, NanoLlamaForCausalLM
from cleangpt.recipe.keys import Optimizer
from cleangpt.training.muon import Muon
from cleangpt.training.optim import apply_updates, build_optimizers, set_hyperparameters

TINY = {"vocab_size": 20, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
GPT = NanoGPTForCausalLM(NanoGPTConfig(**TINY, max_position_embeddings=8, tie_word_embeddings=False))
LLAMA = NanoLlamaForCausalLM(NanoLlamaConfig(**TINY, use_qk_norm=True))


@pytest.mark.parametrize("model", [GPT, LLAMA], ids=["nanogpt", "nanollama"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_has_one_optimizer(model, name):
    optimizers = build_optimizers(Optimizer(name=name), model)
    held = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(weight) for weight in model.parameters())


def test_matrices_decay_and_vectors_do_not():
    (optimizer,) = build_optimizers(Optimizer(weight_decay=0.1), GPT)
    decay, rest = optimizer.param_groups
    assert all(weight.ndim >= 2 for weight in decay["params"])
    assert all(weight.ndim < 2 for weight in rest["params"])
    assert (decay["weight_decay"], rest["weight_decay"]) == (0.1, 0.0)


def test_muon_takes_hidden_matrices_only():
    muon, _ = build_optimizers(Optimizer(name="muon"), GPT)
    held = {id(weight) for group in muon.param_groups for weight in group["params"]}
    hidden = {id(weight) for name, weight in GPT.named_parameters() if ".h." in name and weight.ndim == 2}
    assert held == hidden


def test_muon_is_torchs():
    """Three steps, of matrices of two shapes."""
    torch.manual_seed(0)
    start = [torch.randn(24, 16), torch.randn(16, 16), torch.randn(24, 16)]
    ours, theirs = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    mine = Muon([{"params": ours}], lr=0.1, weight_decay=0.5, momentum=0.95)
    other = torch.optim.Muon(theirs, lr=0.1, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for one, same in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            same.grad = one.grad.clone()
        mine.step()
        other.step()
    for one, same, begin in zip(ours, theirs, start, strict=True):
        assert (one - same).norm() < 0.01 * (same - begin).norm()


def test_momentum_is_how_long_a_gradient_lasts():
    (group, *_), _ = (one.param_groups for one in build_optimizers(Optimizer(name="muon", momentum=0.8), GPT))
    assert group["momentum"] == 0.8
    weight = nn.Parameter(torch.zeros(8, 8))
    muon = Muon([{"params": [weight]}], lr=0.1, weight_decay=0.0, momentum=0.8)
    for gradient in (torch.eye(8), torch.zeros(8, 8)):
        weight.grad = gradient
        muon.step()
    assert torch.allclose(muon.state[weight]["momentum_buffer"], 0.8 * 0.2 * torch.eye(8))


def test_matrices_stacked_in_a_weight_move_each_by_itself():
    model = NanoGPTForCausalLM(GPT.config)
    optimizers = build_optimizers(Optimizer(name="muon", lr=1.0, weight_decay=0.0), model)
    weight = model.transformer.h[0].attn.c_attn.weight
    before = weight.detach().clone()
    model(ids := torch.arange(16).view(2, 8), labels=ids).loss.backward()
    weight.grad[:16] *= 1e3  # of the queries
    apply_updates(optimizers, torch.tensor(True))
    sizes = [float((before - weight.detach())[part : part + 16].norm()) for part in (0, 16, 32)]
    assert max(sizes) < 1.3 * min(sizes)


def test_muon_takes_the_same_step_where_bf16_is_emulated(monkeypatch):
    """Orthogonalized in float32 there: another rounding, and nothing else."""
    torch.manual_seed(0)
    start, gradient, steps = torch.randn(24, 16), torch.randn(24, 16), []
    for native in (True, False):
        monkeypatch.setattr("cleangpt.training.muon.has_native_bf16", lambda device, native=native: native)
        weight = nn.Parameter(start.clone())
        weight.grad = gradient.clone()
        muon = Muon([{"params": [weight]}], lr=1.0, weight_decay=0.0, momentum=0.95)
        apply_updates([muon], torch.tensor(True))
        steps.append(start - weight.detach())
        assert torch.allclose(muon.state[weight]["momentum_buffer"], 0.05 * gradient)
    one, other = steps
    assert 0 < (one - other).norm() < 0.02 * one.norm()


def test_rate_and_decay_of_a_step_are_set_where_they_apply():
    optimizers = build_optimizers(Optimizer(name="muon"), GPT)
    set_hyperparameters(optimizers, lr=0.5, weight_decay=0.25)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    assert {group["lr"] for group in groups} == {0.5}
    assert [group["weight_decay"] for group in groups] == [0.25, 0.25, 0.25, 0.0]  # stacked, other, outer, vectors


def test_an_update_moves_weights_and_clears_gradients():
    model = NanoGPTForCausalLM(GPT.config)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    optimizers = build_optimizers(Optimizer(name="muon", lr=0.1), model)
    ids = torch.arange(16).view(2, 8)
    model(ids, labels=ids).loss.backward()
    apply_updates(optimizers, torch.tensor(True))
    for name, weight in model.named_parameters():
        assert weight.grad is None
        if "c_attn.bias" not in name:  # the keys' part of it has no influence on attention
            assert not torch.equal(weight, before[name]), name


def test_a_gradient_that_is_not_finite_moves_neither_weights_nor_state():
    """In the first step, which makes the state, and in a later one."""
    model = NanoGPTForCausalLM(GPT.config)
    optimizers = build_optimizers(Optimizer(name="muon", lr=0.1), model)
    ids = torch.arange(16).view(2, 8)

    def everything() -> list[torch.Tensor]:
        state = [value for optimizer in optimizers for entry in optimizer.state.values() for value in entry.values()]
        return [tensor.clone() for tensor in [*model.parameters(), *state]]

    for finite in (False, True, False):
        before = everything()
        model(ids, labels=ids).loss.backward()
        if not finite:
            for weight in model.parameters():
                weight.grad.view(-1)[0] = float("nan")
        apply_updates(optimizers, torch.tensor(finite))
        pairs = zip(everything(), before, strict=False)  # the first step adds state
        assert all(torch.equal(one, other) for one, other in pairs) == (not finite)
    assert all(tensor.isfinite().all() for tensor in everything())
