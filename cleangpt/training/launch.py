"""The processes of a run: how they find each other, decide together, and get their Accelerator."""

import atexit
import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType, PartialState
from accelerate.state import AcceleratorState
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object

from ..errors import UserError
from ..hardware import count_threads, default_device

Result = TypeVar("Result")


def join_processes() -> None:
    """Forms the group of all the processes that the launcher was asked for, and sets the threads of a CPU process.

    Each run of a program calls it before `start_accelerator`.
    """
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        way_out = "use torchrun, or accelerate launch --config_file recipes/accelerate/cpu_2.yaml"
        raise UserError(("num_processes", f"this launcher starts one process whatever number it is given; {way_out}"))
    on_cpu = default_device().type == "cpu"
    restarts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["GROUP_WORLD_SIZE"] == "1"
    if restarts and not torch.distributed.is_initialized():
        join_restarted()
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    # One program may train several times, each time in another precision, and sharded: afterwards accelerate takes the
    # processes for ones of FSDP, and sets up no FSDP again.
    AcceleratorState._reset_state(reset_partial_state=True)
    joined = PartialState(cpu=on_cpu).num_processes  # without `cpu`, CPU processes each train alone
    if on_cpu:
        atexit.register(PartialState().destroy_process_group)  # a thread of gloo still running can abort the exit
        torch.set_num_threads(count_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))  # not accelerate's number
    if joined != num_processes:
        raise UserError(("num_processes", f"asked for {num_processes} processes, but {joined} train together"))


def join_restarted() -> None:
    """Forms the group under a name of its own each time that torchrun restarts the processes.

    torchrun's store still holds the addresses of the processes that died, and reading one blocks for half an hour
    (pytorch#135712). On one machine all processes count the same restarts; on several they may not, and
    `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` makes torchrun open a new store instead.
    """
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, False)
    named = torch.distributed.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch.distributed.init_process_group(store=named, rank=rank, world_size=size)


def start_accelerator(trackers: tuple[str, ...], folder: Path, mixed_precision: str) -> Accelerator:
    """The Accelerator of the processes that `join_processes` brought together; its trackers write to `folder`."""
    accelerator = Accelerator(
        cpu=PartialState().device.type == "cpu",
        mixed_precision=mixed_precision,
        log_with=list(trackers) or None,
        project_dir=folder,
        # Of its own, since ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment would divide the gradient.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:  # its checkpoints are pickles
        raise UserError(("distributed_type", "expected NO, MULTI_CPU, MULTI_GPU or FSDP, got DEEPSPEED"))
    torch.set_float32_matmul_precision("high")  # TF32 where the hardware has it
    return accelerator


def on_main(function: Callable[..., Result], *args: object) -> Result:
    """Calls `function(*args)` on the main process and returns its result, or raises its `UserError`, on all of them."""
    outcome: list = [None, []]
    if PartialState().is_main_process:
        try:
            outcome[0] = function(*args)
        except UserError as error:
            outcome[1] = error.problems
    result, problems = broadcast_object_list(outcome)
    if problems:
        raise UserError(*problems, shared=True)
    return result


def together(function: Callable[..., Result], *args: object) -> Result:
    """Calls `function(*args)`, which must not communicate, on every process and waits until all have succeeded.

    Raises:
        UserError: on every process: the mistakes of the main one, and under their rank those that only others see.
    """
    result, problems = None, []
    try:
        result = function(*args)
    except UserError as error:
        problems = error.problems
    main, *others = gather_object([problems])
    main += [
        (f"rank {rank}: {key}", message)
        for rank, problems in enumerate(others, 1)
        for key, message in problems
        if (key, message) not in main
    ]
    if main:
        raise UserError(*main, shared=True)
    return result  # type: ignore[return-value]  # None without problems only if `function` returns it


class StopVote:
    """Whether any process wants to stop: the same answer on all, a step late with several, so that no step waits.

    Each call starts to add up the wishes of all processes, in host memory, and the next one reads the sum.
    """

    def __init__(self, num_processes: int) -> None:
        self.group = torch.distributed.new_group(backend="gloo") if num_processes > 1 else None
        self.wishes = np.zeros(1, np.int64)
        self.counting: torch.distributed.Work | None = None

    def __call__(self, wish: bool) -> bool:
        """Casts this step's vote; every process calls it once a step."""
        if self.group is None:
            return wish
        if self.counting is not None:
            self.counting.wait()
        stop, self.wishes = bool(self.wishes[0]), np.array([wish], np.int64)
        self.counting = torch.distributed.all_reduce(torch.from_numpy(self.wishes), group=self.group, async_op=True)
        return stop
