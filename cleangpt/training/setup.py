"""From a recipe to the parts of its run.

recipe ──> find_start ──> resolve: lengths, precision, attention, data, steps ──> settle ──> build_run: every part
"""

import copy

import numpy as np
from accelerate import PartialState
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from ..data.loader import Loader, Share
from ..data.prepare import PreparedData, prepare_data
from ..data.tokenization import load_tokenizer
from ..errors import UserError
from ..evaluation.tasks import load_tasks
from ..hardware import choose_precision, default_device
from ..models.build import block_size, build_model, choose_attention, config_for, load_config, load_model
from ..models.loss import check_documents
from ..models.statistics import flops_per_token
from ..models.width import scale_initial
from ..recipe.keys import Recipe
from ..recipe.schedules import sequences_per_step, source_shares, steps_for
from ..recipe.values import ReadOnly
from ..reporting.hub import Publisher
from ..reporting.progress import Progress
from ..reporting.tracking import Tracker
from .average import Average
from .checkpoint import Saver, load_optimizers, load_progress
from .launch import StopVote, on_main, start_accelerator, together
from .memory import choose_micro_batch
from .noise import SquaredNorms
from .optim import build_optimizers
from .run import TrainingRun
from .run_folder import Start, find_start, open_folder, settle


def load_data(recipe: Recipe) -> tuple[Recipe, PreparedData]:
    """A copy of the recipe with its `data.block_size`, and its data (or a UserError), built if not in the cache."""
    recipe = recipe.changed(data={"block_size": block_size(recipe.data, recipe.model)})
    return recipe, prepare_data(recipe)


def resolve(recipe: Recipe, saved: Recipe | None = None) -> tuple[Recipe, PreparedData]:
    """Makes every choice that a recipe leaves open: block size, precision, attention, fingerprint, steps.

    The choices of precision and attention are those of `saved`, a resolved recipe, or else this hardware's.

    Raises:
        UserError: for data that cannot be read or has changed, or a model that cannot be had.
    """
    recipe, data = load_data(recipe)
    if recipe.data.fingerprint not in (None, data.fingerprint):
        expected = f"expected {recipe.data.fingerprint} (null accepts any), got {data.fingerprint}"
        raise UserError(("data.fingerprint", f"the text, its tokenizer or its splits changed: {expected}"))
    model, split, training, kept = recipe.model, data.splits["train"], recipe.training, saved or recipe
    wanted = kept.training.mixed_precision if training.mixed_precision == "auto" else training.mixed_precision
    precision = choose_precision(wanted, load_config(model).hidden_size)
    attention = model.get("attn_implementation") or kept.model.get("attn_implementation")
    attention = attention or choose_attention(model, split.sequence_length, precision, default_device())
    max_steps = training.max_steps
    if training.max_epochs is not None:
        sequences = training.max_epochs * split.num_sequences
        max_steps = steps_for(sequences, training.batch_size, recipe.schedule, recipe.optimizer)
    chosen = {"mixed_precision": precision, "max_steps": max_steps, "max_epochs": None}
    recipe = recipe.changed(data={"fingerprint": data.fingerprint}, training=chosen)
    if attention is not None:
        recipe = recipe.model_copy(update={"model": ReadOnly({**model, "attn_implementation": attention})})
    return recipe, data


def find_run(recipe: Recipe) -> tuple[Recipe, PreparedData, Start]:
    """Resolves a recipe and finds where its run starts; all processes agree, also on a `UserError` that one sees."""

    def require_same_data() -> None:
        if data.fingerprint != recipe.data.fingerprint:
            message = f"expected the main process's data, {recipe.data.fingerprint}, got {data.fingerprint}"
            raise UserError(("data.fingerprint", message))

    start = on_main(find_start, recipe)
    recipe, data = together(resolve, recipe, start.saved or start.source)
    recipe = on_main(choose_micro_batch, recipe, data, PartialState().num_processes, start.saved)
    recipe, start = on_main(settle, recipe, start)
    together(require_same_data)
    return recipe, data, start


def build_run(recipe: Recipe, data: PreparedData, start: Start) -> TrainingRun:
    """Builds every part of a run from its resolved recipe; user errors are raised before anything is written."""
    training, split = recipe.training, data.splits["train"]
    accelerator = start_accelerator(recipe.tracking.trackers, recipe.folder, training.mixed_precision)
    if training.batch_size % accelerator.num_processes:
        message = f"expected a multiple of the {accelerator.num_processes} processes, got {training.batch_size}"
        raise UserError(("training.batch_size", message), shared=True)
    network, progress = together(load_start, recipe, data, start)
    optimizers = build_optimizers(recipe.optimizer, network)
    token_flops = flops_per_token(network)
    # FSDP changes the class of the object that it shards, so it gets another one.
    model, *optimizers = accelerator.prepare(copy.copy(network), *optimizers)
    if start.checkpoint is not None:
        load_optimizers(start.checkpoint, model, optimizers)
        if accelerator.scaler is not None and progress.scaler is not None:
            accelerator.scaler.load_state_dict(progress.scaler)
    average = None
    if training.ema is not None:
        saved = start.checkpoint / "average" if start.checkpoint else None  # a branch's parent may have none
        begun = load_model(saved, key="training.resume") if saved and saved.exists() else None
        average = Average(network, training.ema, begun)
    share = Share(
        process=accelerator.process_index,
        num_processes=accelerator.num_processes,
        micro_batch_size=training.micro_batch_size if isinstance(training.micro_batch_size, int) else None,
        device=accelerator.device,
    )
    loader = Loader(split, sequences_per_step(recipe), recipe.run.seed, share, source_shares(recipe))
    noise = watch_noise(network, loader) if recipe.tracking.gradient_noise else None
    tasks = together(load_tasks, recipe) if recipe.evaluation.lm_eval is not None else None
    on_main(open_folder, recipe, progress.step)
    is_pushing = recipe.hub.push and accelerator.is_main_process
    run = TrainingRun(
        recipe=recipe,
        accelerator=accelerator,
        data=data,
        model=model.train(),
        network=network,
        optimizers=optimizers,
        loader=loader,
        tracker=Tracker(accelerator, recipe, progress, token_flops),
        saver=Saver(accelerator),
        publisher=Publisher(recipe.repo_id, recipe.hub.private, recipe.folder, is_pushing),
        stop_vote=StopVote(accelerator.num_processes),
        progress=progress,
        noise=noise,
        average=average,
        tasks=tasks,
        max_steps=training.max_steps or 0,
    )
    run.tracker.say(describe(run, token_flops))
    return run


def load_start(recipe: Recipe, data: PreparedData, start: Start) -> tuple[PreTrainedModel, Progress]:
    """The model and what else the run knows at its start, new or from a checkpoint.

    A branch takes the checkpoint's weights and step, but its own recipe's configuration and data.
    What does not fit, tokenizer or weights, is a UserError.
    """
    split, attention = data.splits["train"], recipe.model.get("attn_implementation")
    progress = load_progress(start.checkpoint) if start.checkpoint else Progress()
    if start.checkpoint is None:
        model = build_model(recipe.model, data.tokenizer, split, recipe.run.seed)
        if recipe.optimizer.reference_width is not None and "init_from" not in recipe.model:
            scale_initial(model, recipe.optimizer.reference_width)
    elif start.parent is None:
        model = load_model(start.checkpoint / "model", attention)
    else:
        saved, config = start.checkpoint / "model", config_for(recipe.model, data.tokenizer, split.sequence_length)
        if load_tokenizer(saved, "training.resume").get_vocab() != data.tokenizer.get_vocab():
            message = f"expected the tokenizer of {start.checkpoint}: set tokenizer.path to {saved}"
            raise UserError(("tokenizer", message))
        model = load_model(saved, attention, "training.resume", config=config)
        if start.checkpoint == start.parent:  # what is best is the other run's
            progress.metric, progress.evaluations_without_gain, progress.skipped = None, 0, 0
    patience = recipe.training.early_stopping.patience  # which may have changed
    progress.stopped_early = patience is not None and progress.evaluations_without_gain >= patience
    if recipe.data.packing == "documents":
        alone = recipe.training.micro_batch_size == recipe.evaluation.batch_size == 1
        check_documents(model, split.sequence_length, 1 if alone else 2)
    if recipe.training.compile:
        compile_blocks(model)
    return model, progress


def watch_noise(network: PreTrainedModel, loader: Loader) -> SquaredNorms:
    """What adds up the gradients' norms; a UserError where the gradients of micro-steps are not to be had."""
    key = "tracking.gradient_noise"
    if any(isinstance(weight, DTensor) for weight in network.parameters()):
        raise UserError((key, "expected false with FSDP, which shows no gradient of a micro-step alone"), shared=True)
    if loader.shares(1 + int(np.diff(loader.ends).argmin()))[1] == 1:
        message = "expected at least two micro-steps in a step, set a smaller training.micro_batch_size"
        raise UserError((key, message), shared=True)
    return SquaredNorms(network)


def compile_blocks(model: nn.Module) -> None:
    """Compiles each block in place, where no key of the state dict gets a prefix; one compilation serves all blocks."""
    blocks = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not blocks:
        raise UserError(("training.compile", f"{type(model).__name__} has no blocks to compile, expected false"))
    for block in blocks:
        block.compile()


def describe(run: TrainingRun, token_flops: int) -> str:
    """What is trained, from where (a line for each change of a branch), on which data, for how long, and its cost."""
    recipe, training, optimizer = run.recipe, run.recipe.training, run.recipe.optimizer
    kind, processes = recipe.model.get("model_type", "model"), run.accelerator.num_processes
    where = f"{processes} process{'es' if processes > 1 else ''} on {run.accelerator.device.type}"
    precision = training.mixed_precision.replace("no", "float32")
    begin = f", resuming from step {run.progress.step}" if run.progress.step else ""
    parameters = f"{run.network.num_parameters():,} parameters"
    lines = [f"{recipe.run.name}: {kind} with {parameters}, {precision}, {where}{begin}"]
    if recipe.branched_from is not None:
        lines.append(f"branched from {recipe.branched_from.checkpoint}")
        lines += [f"  {key}: {old!r} -> {new!r}" for key, (old, new) in recipe.branched_from.changes.items()]
    split = run.data.splits["train"]
    name, unit = recipe.data.path or ", ".join(recipe.data.parts), "tokens" if run.data.folders else "problems"
    sizes = ", ".join(f"{size:,} {unit} in {split_name}" for split_name, size in run.data.sizes.items())
    rate = f"{optimizer.name} at {optimizer.lr:g}, {recipe.schedule.lr.style}, weight decay {optimizer.weight_decay:g}"
    drawn = int(run.loader.ends[-1])
    tokens = drawn * split.sequence_length
    cost = f"{tokens:,} tokens, {drawn / split.num_sequences:.2g} epochs, {tokens * token_flops:.1e} FLOPs"
    return "\n".join(
        [
            *lines,
            f"data: {name}, {sizes}, {split.sequence_length} tokens in a sequence",
            f"schedule: {run.max_steps:,} steps of {training.batch_size:,} sequences, {rate}",
            f"cost: {cost}, at least {tokens / run.tracker.peak_tokens:,.0f} s at this machine's peak",
        ]
    )
