"""Groups of processes that train, under accelerate's FSDP2 on CPUs that it takes for GPUs, or as they are."""

import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path

import faults


def start_group(size: int, runs: list, *preparations: Callable[[], None]) -> list:
    """`size` processes that prepare themselves and train `runs`, each (recipe, overrides), one after another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [faults.start(train_in_group, rank, size, port, runs, preparations) for rank in range(size)]


def train_in_group(rank: int, size: int, port: int, runs: list, preparations: tuple) -> int:
    """What `torchrun train.py` does in one process, for each of `runs`; the first exit code that is not 0."""
    local = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in local.items()}}
    for prepare in preparations:
        prepare()
    return next((code for recipe, overrides in runs if (code := faults.run(str(recipe), overrides))), 0)


def shard_on_cpus() -> None:
    """What `recipes/accelerate/fsdp2.yaml` asks for, and MULTI_CPU, which accelerate never shards, called MULTI_GPU."""
    from accelerate import DistributedType, PartialState

    form_group = PartialState.__init__

    def form_group_of_gpus(self, *args, **kwargs):
        form_group(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:  # the device stays the CPU
            self.distributed_type = DistributedType.MULTI_GPU

    os.environ |= {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_VERSION": "2",
        "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
        "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
        "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
    }
    PartialState.__init__ = form_group_of_gpus


def scale_gradients() -> None:
    """Scales gradients as fp16 does, by the scaler that accelerate takes for FSDP2; a power of two rounds nothing."""
    from accelerate.utils import get_fsdp2_grad_scaler

    import cleangpt.training.setup as setup

    start_accelerator = setup.start_accelerator

    def start_scaled(*args):
        accelerator = start_accelerator(*args)
        accelerator.scaler = get_fsdp2_grad_scaler(device="cpu")
        accelerator.unscale_gradients = lambda: [
            accelerator.scaler.unscale_(optimizer.optimizer) for optimizer in accelerator._optimizers
        ]
        return accelerator

    setup.start_accelerator = start_scaled


def use_hub(address: str, token: str) -> None:
    """Pushes to the Hub at `address`."""
    from huggingface_hub import constants

    constants.ENDPOINT, constants.HF_HUB_OFFLINE = address, False
    os.environ["HF_TOKEN"] = token


def kill_in_step(step: int) -> None:
    """The process kills itself in that step, after it has waited for what is being saved."""
    import cleangpt.training.loop as loop

    update = loop.update

    def update_or_die(run, *arguments):
        if run.progress.step + 1 == step:
            run.saver.wait()
            run.accelerator.wait_for_everyone()
            os.kill(os.getpid(), signal.SIGKILL)
        return update(run, *arguments)

    loop.update = update_or_die


def assert_finish(processes: list) -> None:
    for process in processes:
        process.join(300)
        assert process.exitcode == 0


def folder_of(recipe: Path, name: str) -> Path:
    return recipe.parent / "outputs" / name
