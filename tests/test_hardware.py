"""What a run finds on a machine: its device, its threads, its precision, and the memory that it counts."""

import os
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_command

from cleangpt import hardware
from cleangpt.hardware import (
    choose_precision,
    count_threads,
    cpu_quota,
    default_device,
    memory_quota,
    peak_flops,
    peak_memory,
)

BIN = Path(sys.executable).parent
GROUPS = Path("/proc/self/cgroup").read_text() if Path("/proc/self/cgroup").exists() else ""
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
CORES = max(1, int(min(CORES, cpu_quota(GROUPS, Path("/sys/fs/cgroup")))))

# What a process of a launcher sees on a machine with a GPU, which CUDA_VISIBLE_DEVICES may hide.
ON_A_GPU = """
import os, torch
torch.accelerator.current_accelerator = lambda check_available=False: (
    None if os.environ.get("CUDA_VISIBLE_DEVICES", "0").startswith("-1") else torch.device("cuda")
)
from cleangpt.hardware import count_threads, default_device
print(default_device(), count_threads(int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
"""


@pytest.fixture
def gpu(monkeypatch):
    """A machine with a GPU that has no bf16 of its own, as a T4."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)


@pytest.mark.parametrize(
    ("launcher", "threads", "expected"),
    [
        (["accelerate", "launch", "--config_file", "recipes/accelerate/cpu.yaml"], None, [f"cpu {CORES}"]),
        (["accelerate", "launch", "--config_file", "recipes/accelerate/cpu_2.yaml"], "3", ["cpu 3", "cpu 3"]),
        (["torchrun", "--nproc_per_node=2"], None, [f"cuda {max(1, CORES // 2)}"] * 2),
    ],
)
def test_the_configurations_for_a_cpu_take_it_and_the_users_threads_win(
    launcher, threads, expected, tmp_path, monkeypatch
):
    """The launchers set OMP_NUM_THREADS to a number of theirs where the user set none."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    (tmp_path / "script.py").write_text(ON_A_GPU)
    given = {} if threads is None else {"OMP_NUM_THREADS": threads}
    done = run_command(BIN / launcher[0], *launcher[1:], tmp_path / "script.py", PYTHONPATH=".", **given)
    assert sorted(done.stdout.splitlines()) == expected, done.stderr


def test_accelerates_wish_for_the_cpu_decides_on_device_and_precision(gpu, monkeypatch):
    assert default_device().type == "cuda"
    assert choose_precision("auto", 16) == "fp16"  # emulated bf16 is no bf16
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert default_device().type == "cpu"
    assert choose_precision("auto", 16) == "no"


def test_without_a_launcher_the_users_threads_win(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert count_threads(1) == CORES
    monkeypatch.setenv("OMP_NUM_THREADS", "5,2")
    assert count_threads(2) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "many")
    assert count_threads(1) == CORES


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        ("0::/a/b\n", {"a/b/cpu.max": "max 100000", "a/cpu.max": "250000 100000"}, 2.5),  # of the one above
        ("0::/a\n", {"cpu.max": "150000 100000"}, 1.5),  # in a container, whose own group is at the top
        ("0::/a\n", {"a/cpu.max": "max 100000"}, float("inf")),
        (
            "5:cpu,cpuacct:/a\n4:memory:/a\n0::/\n",
            {"cpu,cpuacct/a/cpu.cfs_quota_us": "50000", "cpu,cpuacct/a/cpu.cfs_period_us": "100000"},
            0.5,
        ),
        ("1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf")),
        ("", {}, float("inf")),
    ],
)
def test_cgroups_of_both_versions(groups, files, quota, tmp_path):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_quota(groups, tmp_path) == quota


@pytest.mark.parametrize(
    ("groups", "files", "quota"),
    [
        (
            "0::/a\n",
            {"a/memory.max": "1000", "a/memory.current": "700", "a/memory.stat": "anon 500\ninactive_file 200"},
            500,
        ),
        ("0::/a\n", {"a/memory.max": "max", "a/memory.current": "700"}, float("inf")),
        (
            "4:memory:/a\n5:cpu:/a\n",
            {
                "memory/a/memory.limit_in_bytes": "1000",
                "memory/a/memory.usage_in_bytes": "600",
                "memory/a/memory.stat": "inactive_file 5\ntotal_inactive_file 50",
            },
            450,
        ),
    ],
)
def test_memory_is_what_the_container_still_grants(groups, files, quota, tmp_path):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    assert memory_quota(groups, tmp_path) == quota


@pytest.mark.parametrize(("quota", "threads"), [(0.5, 1), (1.9, 1), (10**6, CORES)])
def test_threads_fit_into_the_quota(quota, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(hardware, "cpu_quota", lambda groups, root: quota)
    assert count_threads(1) == threads


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="only Linux forgets the most that was resident")
def test_what_came_before_the_probe_and_the_probe_do_not_count():
    torch.ones(100_000_000)  # 400 MB
    before = peak_memory(torch.device("cpu"))
    peak_flops.__wrapped__(torch.device("cpu"), torch.float32, 1)
    assert peak_memory(torch.device("cpu")) < before - 350e6


def test_on_an_accelerator_its_allocator_forgets_the_probe(monkeypatch):
    """With products that are the CPU's."""
    done, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *shape, device, dtype: done.append("product") or randn(*shape))
    monkeypatch.setattr(torch.accelerator, "reset_peak_memory_stats", lambda device: done.append(device.type))
    peak_flops.__wrapped__(torch.device("cuda"), torch.float32, 1)
    assert done[-1] == "cuda" and done.count("cuda") == 1 and len(done) > 2
