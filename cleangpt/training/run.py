"""The parts of a training run."""

from dataclasses import dataclass, field
from typing import Any

from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..data.loader import Loader
from ..data.prepare import PreparedData
from ..recipe.keys import Recipe
from ..reporting.hub import Publisher
from ..reporting.progress import Progress
from ..reporting.tracking import Tracker
from .average import Average
from .checkpoint import Saver
from .launch import StopVote
from .noise import SquaredNorms


@dataclass
class TrainingRun:
    """What the loop works with; `setup.py` builds it."""

    recipe: Recipe  # as resolved
    accelerator: Accelerator
    data: PreparedData
    model: nn.Module  # as prepared by the accelerator
    network: PreTrainedModel  # the same weights under their own class, for `save_pretrained`
    optimizers: list[AcceleratedOptimizer]
    loader: Loader
    tracker: Tracker
    saver: Saver
    publisher: Publisher
    stop_vote: StopVote
    progress: Progress
    noise: SquaredNorms | None  # with `tracking.gradient_noise`
    average: Average | None  # with `training.ema`
    tasks: dict[str, Any] | None  # with `evaluation.lm_eval`
    max_steps: int
    unread: list[Tensor] = field(default_factory=list)  # `update`'s figures of the latest steps, on the device
