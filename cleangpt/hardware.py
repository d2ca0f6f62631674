"""What the machine can do: precision, speed, memory, cores."""

import contextlib
import functools
import math
import os
import platform
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil
import torch
from accelerate.utils import parse_flag_from_env

from .errors import UserError

LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")  # set by torchrun and accelerate launch


def default_device() -> torch.device:
    """The accelerator, or the CPU if there is none or `use_cpu` of accelerate's configuration asks for it."""
    if parse_flag_from_env("ACCELERATE_USE_CPU"):
        return torch.device("cpu")
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def count_threads(local_processes: int) -> int:
    """The threads of one of `local_processes` processes on this machine: the user's `OMP_NUM_THREADS`, or its cores.

    torchrun and accelerate launch give their processes an `OMP_NUM_THREADS` where the user gave none, so what counts
    under a launcher is the environment that the launcher was started with. The cores are those that affinity and cgroup
    quotas leave to this process, divided among `local_processes`.
    """
    given: Mapping[str, str] = os.environ
    if any(name in given for name in LAUNCHERS):
        given = {}
        with contextlib.suppress(psutil.Error):  # a launcher that cannot be asked
            environments = (parent.environ() for parent in psutil.Process().parents())
            given = next((each for each in environments if not any(name in each for name in LAUNCHERS)), {})
    if match := re.match(r"\s*([1-9]\d*)", given.get("OMP_NUM_THREADS", "")):  # "4,2" is for nested regions
        return int(match[1])
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    groups = Path("/proc/self/cgroup")
    quota = cpu_quota(groups.read_text() if groups.exists() else "", Path("/sys/fs/cgroup"))
    return max(1, int(min(cores, quota)) // local_processes)


def cpu_quota(groups: str, root: Path) -> float:
    """CPUs that the cgroups in `groups`, as in /proc/self/cgroup, and those above them grant; infinite if they do not.

    `root` is where cgroups are mounted: version 2 at its top, of version 1 one folder for each controller.
    """
    quotas = [math.inf]
    for folder, is_v1 in _cgroups(groups, root):
        with contextlib.suppress(OSError, ValueError):  # no such file here, or "max"
            if is_v1:
                quota, period = (int((folder / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
            else:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            quotas += [quota / period] if quota > 0 else []  # -1: no limit
    return min(quotas)


def memory_quota(groups: str, root: Path) -> float:
    """Bytes that cgroups, as in `cpu_quota`, still grant; what they hold of files can be dropped and counts as free."""
    quotas = [math.inf]
    for folder, is_v1 in _cgroups(groups, root):
        names = ("limit_in_bytes", "usage_in_bytes") if is_v1 else ("max", "current")
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int((folder / f"memory.{name}").read_text()) for name in names)
            counts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            quotas.append(limit - used + int(counts["total_inactive_file" if is_v1 else "inactive_file"]))
    return min(quotas)


def _cgroups(groups: str, root: Path) -> Iterator[tuple[Path, bool]]:
    """The folders of cgroups and of those above them, and whether they are of version 1."""
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / controllers
        for folder in (mount / path.lstrip("/"), *(mount / path.lstrip("/")).parents):
            yield folder, bool(controllers)
            if folder == mount:
                break


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU, or that a process on the CPU may still take."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    groups = Path("/proc/self/cgroup")
    quota = memory_quota(groups.read_text() if groups.exists() else "", Path("/sys/fs/cgroup"))
    return min(psutil.virtual_memory().available, quota)


def seed_device(seed: int, device: torch.device) -> None:
    """`torch.manual_seed` for the CPU and `device` only: looking for every other kind takes half a millisecond."""
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than float32 ones; a CPU that only emulates them is very slow."""
    native = ("avx512_bf16", "amx_bf16", "bf16")
    return device.type != "cpu" or any(torch.cpu.get_capabilities().get(name) for name in native)


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """Floating-point operations per second of a square matrix product, cached by device, type and number of threads.

    Products grow until one takes 5 ms, so that the run need not wait. What they occupied does not count in
    `peak_memory`.
    """
    best, took, size = 0.0, 0.0, 256
    while took < 0.005 and size <= 8192:
        one, other = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        times = []
        for _ in range(3):
            started = time.perf_counter()
            (one @ other)[0, 0].item()  # waits for the device
            times.append(time.perf_counter() - started)
        took = min(times)
        best, size = max(best, 2 * size**3 / took), 2 * size
    del one, other
    if device.type == "cpu":
        with contextlib.suppress(OSError):  # Linux forgets the most that was resident; elsewhere it stays
            Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.accelerator.reset_peak_memory_stats(device)
    return best


def peak_memory(device: torch.device) -> int:
    """Most bytes since `peak_flops`: allocated on an accelerator, or resident in a CPU process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident if sys.platform == "darwin" else 1024 * resident


def choose_precision(mixed_precision: str, hidden_size: int) -> str:
    """What `training.mixed_precision` means on this machine; a `UserError` for fp16 on a CPU."""
    device = default_device()
    if mixed_precision == "fp16" and device.type == "cpu":
        raise UserError(("training.mixed_precision", "fp16 needs an accelerator, expected no or bf16 on a CPU"))
    if mixed_precision != "auto":
        return mixed_precision
    if device.type == "cpu":
        return "bf16" if has_native_bf16(device) and hidden_size >= 128 else "no"
    if device.type == "mps":  # not tried yet
        return "no"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


def describe_hardware(device: torch.device, num_processes: int) -> str:
    """What a run trains on: "2 × NVIDIA H100", or a CPU's name with its threads."""
    number = f"{num_processes} × " if num_processes > 1 else ""
    if device.type == "cuda":
        return number + torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{number}{device.type} on {platform.machine()}"
    cpuinfo = Path("/proc/cpuinfo")  # on Linux, where `platform.processor` has no name
    found = re.search(r"^model name\s*:\s*(.+)", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    name = found[1] if found else platform.processor() or platform.machine()
    return f"{number}{name}, {torch.get_num_threads()} threads"
