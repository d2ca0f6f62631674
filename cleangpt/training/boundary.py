"""What happens between macro-batches and at the end of a run: evaluation, saving, the report."""

from copy import deepcopy
from functools import partial
from pathlib import Path

from ..data.arithmetic import ArithmeticSplit
from ..evaluation.evaluate import MAX_GRADED, evaluate
from ..evaluation.tasks import evaluate_tasks
from ..evaluation.writing import continue_texts, example, final_samples
from ..files import write_folder
from ..hardware import describe_hardware
from ..models.statistics import weight_norms
from ..reporting.card import Report, write_card
from .checkpoint import Tensors, copy_optimizers, copy_weights, write_checkpoint
from .run import TrainingRun


def end_macro_batch(run: TrainingRun) -> None:
    """Evaluates, and saves the best model, a checkpoint and a push to the Hub, each when it is due."""
    recipe, progress, folder = run.recipe, run.progress, run.recipe.folder
    macro_batch, last = -(-progress.step // recipe.training.macro_batch), progress.step == run.max_steps
    is_evaluated = macro_batch % recipe.evaluation.every == 0 or last
    if progress.step == 0:
        is_evaluated = recipe.evaluation.at_start
    progress.metrics, progress.boundary = evaluate_validation(run) if is_evaluated else {}, progress.step
    if progress.step == 0:
        return
    better = is_evaluated and progress.update_best(recipe.checkpoint.metric, recipe.training.early_stopping)
    patience, waited = recipe.training.early_stopping.patience, progress.evaluations_without_gain
    if is_evaluated and patience is not None and waited:
        metric = recipe.checkpoint.metric
        run.tracker.say(f"no gain in {metric}, {waited} of {patience} evaluations until the run stops")
    due = macro_batch % recipe.checkpoint.every == 0 or last or progress.stopped_early
    if recipe.checkpoint.save:
        save(run, folder / "best" if better else None, due, averaged=progress.average_is_better)
    if recipe.hub.push and (better if recipe.hub.every is None else macro_batch % recipe.hub.every == 0):
        run.saver.submit(run.publisher.push, folder / "best", f"Best model, pushed at step {progress.step}")


def evaluate_validation(run: TrainingRun) -> dict[str, float]:
    """Measures the validation split, lets the model continue the recipe's prompts, and logs both."""
    progress, metrics = run.progress, {f"eval/{name}": value for name, value in measure(run).items()}
    if run.average is not None:
        with run.average.in_place():
            metrics |= {f"eval/ema/{name}": value for name, value in measure(run).items()}
    watched = run.loader.coverage(progress.step) | weight_norms(run.model)
    run.tracker.log_evaluation(progress, metrics, watched)
    if prompts := example(run.data) if run.data.prompts is None else run.data.prompts:
        model = run.accelerator.unwrap_model(run.model)
        texts = continue_texts(model, run.data.tokenizer, prompts, run.recipe.run.seed, 100)
        run.tracker.log_samples(progress.step, texts)
    return metrics


def measure(run: TrainingRun) -> dict[str, float]:
    """The present weights' figures on the validation split and in lm-eval's tasks."""
    evaluation, split = run.recipe.evaluation, run.data.splits["validation"]
    num_rows = evaluation.num_problems if isinstance(split, ArithmeticSplit) else None
    figures = evaluate(run.accelerator, run.model, split, evaluation.batch_size, evaluation.max_batches, num_rows)
    if run.tasks is not None and evaluation.lm_eval is not None:
        sizes = evaluation.batch_size, evaluation.lm_eval.limit
        figures |= evaluate_tasks(run.accelerator, run.model, run.data.tokenizer, run.tasks, *sizes)
    return figures


def save(
    run: TrainingRun,
    folder: Path | None,
    checkpoint: bool,
    samples: tuple[str, ...] | None = None,
    averaged: bool = False,
) -> None:
    """Copies the state of the run, and writes a model's folder, a checkpoint, or both in the background.

    All processes call it.

    Args:
        samples: texts of the final model, which make its card the run's report.
        averaged: whether the model's folder gets the averaged weights.
    """
    if folder is None and not checkpoint:
        return
    run.saver.wait()
    scaler = run.accelerator.scaler
    run.progress.elapsed_s, run.progress.scaler = run.tracker.elapsed_s, None if scaler is None else scaler.state_dict()
    models, network, tokenizer = {"model": copy_weights(run.accelerator, run.model)}, run.network, run.data.tokenizer
    if run.average is not None:
        with run.average.in_place():
            models["average"] = copy_weights(run.accelerator, run.model)

    def write_model(weights: Tensors, folder: Path, report: Report | None = None) -> None:
        network.save_pretrained(folder, state_dict=dict(weights))
        tokenizer.save_pretrained(folder)
        if report is not None:
            write_card(folder, report)

    if folder is not None:
        weights, report = models["average" if averaged else "model"], make_report(run, samples, averaged)
        run.saver.submit(write_folder, folder, partial(write_model, weights, report=report))
    if checkpoint:
        optimizers = copy_optimizers(run.accelerator, run.model, run.optimizers)
        writers = {name: partial(write_model, weights) for name, weights in models.items()}
        run.saver.submit(write_checkpoint, optimizers, writers, deepcopy(run.progress), run.recipe)


def make_report(run: TrainingRun, samples: tuple[str, ...] | None, averaged: bool) -> Report:
    """What the card of a model of this run says; of its averaged weights, where it has those."""
    network, progress = run.network, deepcopy(run.progress)
    own = {name: value for name, value in progress.metrics.items() if not name.startswith("eval/ema/")}
    other = {name.replace("/ema", "", 1): value for name, value in progress.metrics.items() if name not in own}
    progress.metrics = own | (other if averaged else {})
    native = {"nanogpt": "gpt2", "nanollama": "qwen3" if getattr(network.config, "use_qk_norm", False) else "llama"}
    if getattr(network.config, "coupled_digits", None) is not None:
        native = {}
    return Report(
        recipe=run.recipe,
        model_type=network.config.model_type,
        native=native.get(network.config.model_type),
        parameters=network.num_parameters(),
        progress=progress,
        split_sizes=run.data.sizes,
        example=run.data.example,
        num_processes=run.accelerator.num_processes,
        hardware=describe_hardware(run.accelerator.device, run.accelerator.num_processes),
        samples=samples,
    )


def finish(run: TrainingRun) -> Path:
    """Grades the test split, writes `final`, shows what the model can do and how to load it."""
    recipe, data, say, final = run.recipe, run.data, run.tracker.say, run.recipe.folder / "final"
    if (split := data.splits.get("test")) is not None:
        num_rows = min(len(split), MAX_GRADED) if isinstance(split, ArithmeticSplit) else len(split)
        figures = evaluate(run.accelerator, run.model, split, recipe.evaluation.batch_size, num_rows=num_rows)
        run.progress.metrics = run.progress.metrics | {f"test/{name}": value for name, value in figures.items()}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
        say(f"test split, {num_rows:,} sequences: {shown}")
    if (progress := run.progress).stopped_early:
        best = f"the best was {progress.best:.4f} at step {progress.best_step}"
        say(f"stopped early at step {progress.step}: {recipe.checkpoint.metric} gains no more, {best}")
    samples = final_samples(run.accelerator.unwrap_model(run.model), data, recipe)
    if isinstance(data.splits["validation"], ArithmeticSplit):
        order = ", last digit first" if recipe.data.reverse_answer else ""
        say(f"held-out problems with the model's answers{order}:\n  " + samples[0].replace("\n", "\n  "))
    save(run, final, False, tuple(samples))
    run.saver.wait()
    run.accelerator.wait_for_everyone()
    run.tracker.log_picture(run.progress.step, "curves", final / "curves.png")
    run.publisher.push(final, f"Final model, step {run.progress.step}")
    say(f"The model is in {final}. To load it:")
    say(f'  import cleangpt; model = transformers.AutoModelForCausalLM.from_pretrained("{final}")')
    run.publisher.close(say)
    run.tracker.close()
    return final
