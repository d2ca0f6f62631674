"""lm-eval's tasks on the model that is being trained (https://github.com/EleutherAI/lm-evaluation-harness)."""

import contextlib
import copy
import difflib
import io
import logging
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models import build
from ..recipe.keys import Recipe
from .evaluate import inference

OURS = Path(__file__).parents[2] / "lm_eval_tasks"  # in a clone


def load_tasks(recipe: Recipe) -> dict[str, Any]:
    """The tasks of `evaluation.lm_eval` as lm-eval's `evaluate` takes them, ours on the recipe's own validation split.

    Raises:
        UserError: for a task that lm-eval does not know, that cannot be loaded, or that runs code a model wrote.
    """
    assert recipe.evaluation.lm_eval is not None
    from lm_eval.tasks import TaskManager

    names, key = list(recipe.evaluation.lm_eval.tasks), "evaluation.lm_eval.tasks"
    with quiet(), tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(recipe.to_yaml())
        file.flush()
        options: dict[str, Any] = {"include_path": str(OURS), "metadata": {"recipe": file.name, "split": "validation"}}
        manager = TaskManager(include_defaults=False, **options)
        if not set(names) <= {*manager.all_tasks}:
            manager = TaskManager(**options)  # all of lm-eval's take seconds to find
        for name in set(names) - {*manager.all_tasks}:
            close = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {close[0]}?" if close else "`lm_eval ls tasks` lists them"
            raise UserError((key, f"unknown task {name!r}, {hint}"))
        try:
            loaded: dict[str, Any] = {**manager.load(names)}
        except Exception as error:  # a task's own code can raise anything, and most download their data
            raise UserError((key, f"{', '.join(names)} cannot be loaded: {type(error).__name__}: {error}")) from error
    for name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError((key, f"{name} runs code that the model writes, expected another task"))
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def evaluate_tasks(
    accelerator: Accelerator,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    tasks: dict[str, Any],
    batch_size: int,
    limit: int | None,
) -> dict[str, float]:
    """Measures a prepared model on `tasks`, or on their first `limit` documents each.

    All processes call it and share the documents; of a sharded model, or with fewer documents than processes, each
    measures all, in step with the others. The random state stays.

    Returns:
        `<metric>/<task>`, the same on all processes; a metric behind one of lm-eval's filters has its name too.

    Raises:
        UserError: for a task that this model cannot do, for want of positions say.
    """
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    for task in tasks["tasks"].values():
        task.set_fewshot_seed(seed=1234)  # lm-eval's own: the same examples at each boundary
    fewest = min(len(task.eval_docs) for task in tasks["tasks"].values())
    is_shared = accelerator.distributed_type != DistributedType.FSDP
    is_shared &= min(fewest, limit or fewest) >= accelerator.num_processes  # lm-eval fails in a process without any
    network: Any = accelerator.unwrap_model(model)
    with quiet(), inference(model), own_lengths(network), unmoved_random_state(accelerator.device):
        lm = HFLM(network, backend="causal", tokenizer=copy.deepcopy(tokenizer), batch_size=batch_size)
        if is_shared:
            lm.accelerator, lm._rank, lm._world_size = accelerator, accelerator.process_index, accelerator.num_processes
        try:
            found: Any = evaluate(lm, tasks, limit=limit, bootstrap_iters=0, log_samples=False)
        except (AssertionError, ValueError) as error:  # what lm-eval raises for texts that do not fit
            reason = f"a model of {lm.max_length} positions cannot do them: {type(error).__name__} {error}".strip()
            raise UserError(("evaluation.lm_eval.tasks", f"{', '.join(tasks['tasks'])}: {reason}")) from error
    figures = {}
    for task, results in found["results"].items() if accelerator.is_main_process else ():
        for name, value in results.items():
            if isinstance(value, int | float) and "_stderr" not in name and "," in name:
                figures[f"{name.removesuffix(',none')}/{task}"] = float(value)
    return broadcast_object_list([figures])[0]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps progress bars, and warnings of lm-eval and transformers, out of the output."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with build.quiet(), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def own_lengths(network: Any) -> Iterator[None]:
    """Leaves it to lm-eval how much is written: `generate` would heed the model's `max_new_tokens` instead."""
    saved, network.generation_config = network.generation_config, copy.copy(network.generation_config)
    network.generation_config.max_new_tokens = None
    try:
        yield
    finally:
        network.generation_config = saved


@contextlib.contextmanager
def unmoved_random_state(device: torch.device) -> Iterator[None]:
    """Puts the states of Python's, numpy's and torch's global generators back."""
    states = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    random.setstate(states[0])
    np.random.set_state(states[1])
