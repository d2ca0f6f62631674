"""One Accelerator for whatever started us: one process, several, CPU or GPU."""

import atexit
import os
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, DistributedType
from accelerate.state import AcceleratorState

from .errors import UserError
from .monitoring import has_native_bf16


def start_accelerator(trackers: list[str], folder: Path, mixed_precision: str, hidden_size: int) -> Accelerator:
    """Joins the other processes of this run, sets threads and precision.

    Args:
        trackers: `recipe.tracking.trackers`. folder: where they write.
        mixed_precision: `recipe.training.mixed_precision`. hidden_size: decides `auto` on a CPU.

    Raises:
        UserError: when the launcher asked for more processes than really run together, for fp16 on a CPU, and for
            DeepSpeed, whose checkpoints are pickles.
    """
    num_processes = int(os.environ.get("WORLD_SIZE", 1))
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            ("num_processes", "this launcher starts one process however many are asked for; use torchrun, or "
             "accelerate launch --config_file recipes/accelerate/cpu_2.yaml")
        )  # fmt: skip
    on_cpu = not torch.accelerator.is_available()
    precision = choose_precision(mixed_precision, on_cpu, hidden_size)
    if on_cpu:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
        atexit.register(leave_group)
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ["GROUP_WORLD_SIZE"] == "1":
        join_restarted()
    AcceleratorState._reset_state()  # one program may train several times, each in its own precision
    accelerator = Accelerator(
        cpu=on_cpu,  # without it, CPU processes train alone instead of joining one group
        mixed_precision=precision,
        log_with=trackers or None,
        project_dir=folder,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    if accelerator.num_processes != num_processes:
        raise UserError(
            ("num_processes", f"asked for {num_processes} processes, but {accelerator.num_processes} train together")
        )
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        raise UserError(("distributed_type", "expected NO, MULTI_CPU, MULTI_GPU or FSDP, got DEEPSPEED"))
    torch.set_float32_matmul_precision("high")  # TF32 where there is an accelerator
    return accelerator


def leave_group() -> None:
    """Leaves the group of processes, where there is one: threads that gloo leaves running can abort a process at exit."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join_restarted() -> None:
    """Forms the group of processes under a name of its own for each time that torchrun restarts them.

    torchrun's store still holds the addresses of those that died, and who reads one waits for half an hour
    (pytorch#135712). On one machine all processes count their restarts alike, on several they may not: there
    `TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1` makes torchrun open a new store each time.
    """
    if torch.distributed.is_initialized():
        return
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    store = torch.distributed.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), size, False)
    store = torch.distributed.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    torch.distributed.init_process_group(store=store, rank=rank, world_size=size)


def agree(accelerator: Accelerator, *wishes: bool) -> list[bool]:
    """What any process wishes, the same on all of them."""
    if accelerator.num_processes == 1:
        return list(wishes)
    counts = torch.tensor(wishes, dtype=torch.float32, device=accelerator.device)
    return (accelerator.reduce(counts, "sum") > 0).tolist()


def choose_precision(mixed_precision: str, on_cpu: bool, hidden_size: int) -> str:
    """The fixed table behind `auto`, so that a resumed run chooses the same:

    | hardware | `auto` |
    |---|---|
    | GPU with bf16 | `bf16` |
    | GPU without | `fp16` |
    | Apple's MPS (untested) | `no` |
    | CPU with native bf16, width at least 128 | `bf16` |
    | any other CPU | `no` |
    """
    if mixed_precision == "fp16" and on_cpu:
        raise UserError(("training.mixed_precision", "fp16 needs an accelerator, expected no or bf16 on a CPU"))
    if mixed_precision != "auto":
        return mixed_precision
    if on_cpu:
        return "bf16" if has_native_bf16(torch.device("cpu")) and hidden_size >= 128 else "no"
    if torch.accelerator.current_accelerator().type == "mps":
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
