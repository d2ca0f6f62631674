"""What the machine can do: precision, speed, memory."""

import functools
import platform
import re
import resource
import sys
import time
from pathlib import Path

import torch

from .errors import UserError


def default_device() -> torch.device:
    """The accelerator, or the CPU if there is none."""
    return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")


def has_native_bf16(device: torch.device) -> bool:
    """Whether bf16 products are faster than float32 ones; a CPU that only emulates them is very slow."""
    native = ("avx512_bf16", "amx_bf16", "bf16")
    return device.type != "cpu" or any(torch.cpu.get_capabilities().get(name) for name in native)


@functools.cache
def peak_flops(device: torch.device, dtype: torch.dtype, num_threads: int) -> float:
    """Floating-point operations per second of a square matrix product, cached by device, type and number of threads.

    Products grow until one takes 20 ms, so that a type the hardware only emulates does not delay the run.
    """
    best, slowest, size = 0.0, 0.0, 256
    while slowest < 0.02 and size <= 8192:
        one, other = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        for _ in range(3):
            started = time.perf_counter()
            (one @ other)[0, 0].item()  # waits for the device
            seconds = time.perf_counter() - started
            best, slowest = max(best, 2 * size**3 / seconds), seconds
        size *= 2
    return best


def peak_memory(device: torch.device) -> int:
    """Most bytes so far: allocated on an accelerator, or resident in a CPU process."""
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
