"""Models of other widths: scaled by `optimizer.reference_width`, they begin and move as at the reference."""

import pytest
import torch
from faults import left_behind

from cleangpt import (
    NanoGPTConfig,
    NanoGPTForCausalLM,
    NanoLlamaConfig,
    NanoLlamaForCausalLM,
    Stopped,
    UserError,
    load_recipe,
    train,
)
from cleangpt.models.width import scale_initial
from cleangpt.recipe.keys import Optimizer
from cleangpt.training.optim import apply_updates, build_optimizers, set_hyperparameters

WIDTH = "--optimizer.reference_width={}"
MODELS = {"nanogpt": (NanoGPTForCausalLM, NanoGPTConfig), "nanollama": (NanoLlamaForCausalLM, NanoLlamaConfig)}


def sizes_after_ten_steps(kind: str, width: int, optimizer: Optimizer) -> torch.Tensor:
    """Root mean square after each block, and of the logits, of a model that learns to count in ones, twos and threes.

    Heads are 32 wide. The rate is constant from the first step, without a warm-up.
    """
    torch.manual_seed(0)
    made, config = MODELS[kind]
    shape = {"vocab_size": 64, "max_position_embeddings": 32, "num_hidden_layers": 2}
    model = made(config(hidden_size=width, num_attention_heads=width // 32, **shape))
    if optimizer.reference_width is not None:
        scale_initial(model, optimizer.reference_width)
    optimizers = build_optimizers(optimizer, model)
    set_hyperparameters(optimizers, optimizer.lr, optimizer.weight_decay)
    for _ in range(10):
        model(ids := counts(), labels=ids).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        apply_updates(optimizers, torch.tensor(True))
    with torch.no_grad():
        outputs = model.eval()(counts(), output_hidden_states=True)
    return torch.stack([values.square().mean().sqrt() for values in (*outputs.hidden_states[1:-1], outputs.logits)])


def counts() -> torch.Tensor:
    """Ids (16, 32) that go up by one, two or three."""
    start, stride = torch.randint(64, (16, 1)), torch.randint(1, 4, (16, 1))
    return (start + stride * torch.arange(32)) % 64


@pytest.mark.parametrize(("name", "lr"), [("adamw", 3e-3), ("muon", 5e-3)])
@pytest.mark.parametrize("kind", MODELS)
def test_activations_after_ten_steps_do_not_depend_on_the_width(kind, name, lr):
    """The coordinate check of arXiv 2203.03466, section D.1."""
    narrow, wide = (
        sizes_after_ten_steps(kind, width, Optimizer(name=name, lr=lr, reference_width=64)) for width in (64, 512)
    )
    assert (wide / narrow - 1).abs().max() < 0.2
    unscaled = sizes_after_ten_steps(kind, 512, Optimizer(name=name, lr=lr))
    assert (unscaled / narrow - 1).abs().max() > 1


def test_each_step_decays_every_matrix_by_the_same_share():
    model = NanoLlamaForCausalLM(NanoLlamaConfig(vocab_size=20, hidden_size=64, num_hidden_layers=1))
    for name in ("adamw", "muon"):
        optimizers = build_optimizers(Optimizer(name=name, weight_decay=0.1, reference_width=16), model)
        set_hyperparameters(optimizers, 0.01, 0.2)
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        assert {round(group["lr"] * group["weight_decay"], 9) for group in groups} == {0.0, 0.002}
        assert min(group["lr"] for group in groups) == 0.0025


def test_at_the_reference_width_nothing_changes(tiny_text):
    plain, same = (train(load_recipe(tiny_text, options)) for options in ([], ["--run.name=same", WIDTH.format(16)]))
    assert (plain / "model.safetensors").read_bytes() == (same / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_scaled_run_that_is_stopped_goes_on_to_the_same_bytes(tiny_text, monkeypatch, name):
    options = [WIDTH.format(8), f"--optimizer.name={name}", "--training.macro_batch=1"]
    train(whole := load_recipe(tiny_text, [*options, "--run.name=whole"]))
    recipe = load_recipe(tiny_text, [*options, "--run.name=stopped"])
    with monkeypatch.context() as patch:  # as if a signal came
        patch.setattr("cleangpt.training.launch.StopVote.__call__", lambda vote, wish: True)
        with pytest.raises(Stopped):
            train(recipe)
    train(recipe)
    assert left_behind(whole.folder)["weights"] == left_behind(recipe.folder)["weights"]


@pytest.mark.parametrize("model_type", ["openai-gpt", "gemma"])
def test_a_model_without_a_norm_to_scale_is_refused(tiny_text, model_type):
    """One has none before its head, the other's begins at 0."""
    options = [f"--model.model_type={model_type}", WIDTH.format(8)]
    with pytest.raises(UserError, match=r"optimizer.reference_width: expected null: .* has no final norm"):
        train(load_recipe(tiny_text, options))
