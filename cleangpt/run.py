"""The parts of a run, built from its recipe: new, or from a checkpoint."""

from dataclasses import dataclass

from accelerate import Accelerator
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from . import schedules
from .checkpoint import Progress, Saver, load_optimizers, load_progress
from .data.loader import Loader
from .data.prepare import PreparedData, prepare_data
from .errors import UserError
from .files import clear_leftovers
from .hub import Publisher
from .launch import start_accelerator
from .models.build import build_model, choose_attention, load_config, load_model
from .monitoring import flops_per_token
from .optim import build_optimizers
from .outputs import Start, open_folder
from .recipe import Recipe
from .tracking import Tracker


@dataclass
class Run:
    """The parts of a run."""

    recipe: Recipe
    accelerator: Accelerator
    data: PreparedData
    model: nn.Module
    optimizers: list
    loader: Loader
    tracker: Tracker
    saver: Saver
    publisher: Publisher
    progress: Progress
    max_steps: int


def build_run(recipe: Recipe, start: Start) -> Run:
    """Builds every part; what the user has to mend is told before anything is written.

    Args:
        recipe: with `data.block_size`; precision and attention are resolved here. start: where the run starts.
    """
    training = recipe.training
    width = load_config(recipe.model).hidden_size
    accelerator = start_accelerator(recipe.tracking.trackers, recipe.folder, training.mixed_precision, width)
    training.mixed_precision = accelerator.mixed_precision
    if training.batch_size % accelerator.num_processes:
        message = f"expected a multiple of the {accelerator.num_processes} processes, got {training.batch_size}"
        raise UserError(("training.batch_size", message))

    data = prepare_data(recipe)
    if recipe.data.fingerprint not in (None, data.fingerprint):
        message = (
            f"the text, its tokenizer or its cut changed: expected {recipe.data.fingerprint}, got {data.fingerprint}"
        )
        raise UserError(("data.fingerprint", message))
    recipe.data.fingerprint = data.fingerprint
    split = data.splits["train"]
    max_steps = training.max_steps
    if max_steps is None:
        sequences = training.max_epochs * split.num_sequences
        max_steps = schedules.steps_for(sequences, training.batch_size, recipe.schedule, recipe.optimizer)

    attention = choose_attention(recipe.model, split.sequence_length, training.mixed_precision, accelerator.device)
    if attention is not None:
        recipe.model["attn_implementation"] = attention
    if start.checkpoint is None:
        model, progress = build_model(recipe.model, data.tokenizer, split, recipe.run.seed), Progress()
    else:
        model = load_model(start.checkpoint / "model", attention)
        progress = load_progress(start.checkpoint)
    check_prompts(recipe.evaluation.prompts, data.tokenizer, model.config.max_position_embeddings)
    optimizers = build_optimizers(recipe.optimizer, model)
    if training.compile:
        compile_blocks(model)
    model, *optimizers = accelerator.prepare(model, *optimizers)
    if start.checkpoint is not None:
        load_optimizers(accelerator, start.checkpoint, model, optimizers)

    if accelerator.is_main_process:
        open_folder(recipe, progress.step)
        for folder in (recipe.folder, recipe.folder / "checkpoints"):
            clear_leftovers(folder)
    accelerator.wait_for_everyone()
    loader = Loader(
        split,
        lambda step: (
            training.batch_size * schedules.at(recipe.schedule, recipe.optimizer, step, max_steps).accumulation
        ),
        max_steps,
        recipe.run.seed,
        accelerator.process_index,
        accelerator.num_processes,
        training.micro_batch_size,
        accelerator.device,
    )
    network = accelerator.unwrap_model(model)
    tracker = Tracker(accelerator, recipe, progress, max_steps, flops_per_token(network))
    tracker.say(describe(recipe, network.num_parameters(), accelerator, progress.step))
    pushes = recipe.hub.push and accelerator.is_main_process
    publisher = Publisher(recipe.repo_id, recipe.hub.private, recipe.folder, pushes)
    return Run(
        recipe,
        accelerator,
        data,
        model.train(),
        optimizers,
        loader,
        tracker,
        Saver(accelerator),
        publisher,
        progress,
        max_steps,
    )


def compile_blocks(model: nn.Module) -> None:
    """Compiles each block of a transformers model where it stands: one compilation serves all, since they are alike.

    In place, so that no state dict gets a prefix.
    """
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(("training.compile", f"{type(model).__name__} has no blocks to compile, expected false"))
    for block in blocks:
        block.compile()


def describe(recipe: Recipe, parameters: int, accelerator: Accelerator, step: int) -> str:
    """What is trained and on what, on one line."""
    kind, processes = recipe.model.get("model_type", "model"), accelerator.num_processes
    where = f"{processes} process{'es' if processes > 1 else ''} on {accelerator.device.type}"
    precision = {"no": "float32"}.get(accelerator.mixed_precision, accelerator.mixed_precision)
    begin = f", going on from step {step}" if step else ""
    return f"{recipe.run.name}: {kind} with {parameters:,} parameters, {precision}, {where}{begin}"


def check_prompts(prompts: list[str], tokenizer, positions: int) -> None:
    """Refuses prompts after which a model with so many positions has no room for an answer."""
    lengths = {prompt: len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts}
    mistakes = [
        ("evaluation.prompts", f"expected less than the model's {positions} tokens, got {length}: {prompt[:40]!r}")
        for prompt, length in lengths.items()
        if length >= positions
    ]
    if mistakes:
        raise UserError(*mistakes)
