"""Two machines: network namespaces of this one, joined by a cable. Each has one core, so one thread as well."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_metrics, run_command
from test_distributed import assert_same_runs, wait_for_checkpoint

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces need root"),
    pytest.mark.skipif(shutil.which("ip") is None, reason="ip: apt-get install iproute2"),
]

BIN = Path(sys.executable).parent
CORES = sorted(os.sched_getaffinity(0))[:2]
LONG = ["--training.max_steps=100", "--training.macro_batch=10", "--model.dropout=0.1", "--tracking.log_every=10"]


class Machine:
    """A namespace with an address and a core of its own; `rank` is 0 for the first machine, 1 for the second."""

    def __init__(self, rank: int, folder: Path):
        self.rank, self.address = rank, f"10.77.0.{rank + 1}"
        self.name = self.cable = f"m{rank}-{os.getpid()}"
        self.said = folder / f"machine-{rank}.txt"

    def start(self, *command, folder: Path = ROOT) -> subprocess.Popen:
        """Starts a command here; what it prints is appended to the file `said`."""
        enter = ["ip", "netns", "exec", self.name, "env", "-C", folder, f"GLOO_SOCKET_IFNAME={self.cable}"]
        pinned = ["taskset", "--cpu-list", str(CORES[self.rank % len(CORES)])]
        with self.said.open("a") as said:
            return subprocess.Popen([str(part) for part in (*enter, *pinned, *command)], stdout=said, stderr=said)

    def die(self) -> None:
        """Kills every process at once."""
        for pid in run_command("ip", "netns", "pids", self.name).stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@pytest.fixture
def machines(tmp_path):
    """Two machines, whose processes and network are gone after the test."""
    first, second = both = [Machine(rank, tmp_path) for rank in range(2)]

    def ip(*arguments) -> None:
        subprocess.run(["ip", *arguments], check=True)

    try:
        for machine in both:
            ip("netns", "add", machine.name)
        ends = (("netns", first.name), ("type", "veth", "peer", "name", second.cable, "netns", second.name))
        ip("link", "add", first.cable, *(word for end in ends for word in end))
        for machine in both:
            ip("-n", machine.name, "address", "add", f"{machine.address}/24", "dev", machine.cable)
            ip("-n", machine.name, "link", "set", machine.cable, "up")
            ip("-n", machine.name, "link", "set", "lo", "up")
        yield both
    finally:
        for machine in both:
            machine.die()
            subprocess.run(["ip", "netns", "delete", machine.name], check=False)


def assert_finishes(machine: Machine, process: subprocess.Popen) -> None:
    assert process.wait(240) == 0, machine.said.read_text()


def train_on_one(*arguments) -> None:
    """Two processes on one machine, with a thread each."""
    pinned = ["taskset", "--cpu-list", ",".join(map(str, CORES))]
    done = run_command(*pinned, BIN / "torchrun", "--standalone", "--nproc_per_node=2", "train.py", *arguments)
    assert done.returncode == 0, done.stderr


def elastic(machine: Machine, *arguments) -> list:
    """The command of `recipes/accelerate/slurm.sh`: the first machine keeps the list of those that take part."""
    first = "true" if machine.rank == 0 else "false"
    return [
        *(BIN / "torchrun", "--nnodes=2", "--nproc_per_node=auto", "--max_restarts=3", "--rdzv_backend=c10d"),
        *("--rdzv_endpoint=10.77.0.1:29500", f"--rdzv_conf=is_host={first}", f"--local_addr={machine.address}"),
        *("train.py", *arguments),
    ]


def test_two_machines_end_with_the_bytes_of_two_processes_on_one(machines, tiny_text, tmp_path):
    file = ["--config_file", "recipes/accelerate/two_machines.yaml", "--num_processes=2", "--main_process_ip=10.77.0.1"]
    running = [
        machine.start(
            *(BIN / "accelerate", "launch", *file, f"--machine_rank={machine.rank}"),
            *("train.py", tiny_text, *LONG, "--run.name=two"),
        )
        for machine in machines
    ]
    for machine, process in zip(machines, running, strict=True):
        assert_finishes(machine, process)
    train_on_one(tiny_text, *LONG, "--run.name=one")
    assert_same_runs(tmp_path / "outputs" / "one", tmp_path / "outputs" / "two")


@pytest.mark.parametrize("victim", [0, 1])
def test_a_machine_that_dies_comes_back_and_changes_nothing(victim, machines, tiny_text, tmp_path, monkeypatch):
    """The second joins again by itself. With the first the list of machines is lost, so both are started again."""
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    train_on_one(tiny_text, *LONG, "--run.name=calm")
    running = [machine.start(*elastic(machine, tiny_text, *LONG, "--run.name=hurt")) for machine in machines]
    wait_for_checkpoint(hurt := tmp_path / "outputs" / "hurt", running[victim])
    machines[victim].die()
    running[victim].wait()
    if victim == 0:
        assert running[1].wait(120) != 0
    before = [line["step"] for line in read_metrics(hurt) if "train/loss" in line]
    assert before[-1] < 100
    for machine in machines[victim:]:
        running[machine.rank] = machine.start(*elastic(machine, tiny_text, *LONG, "--run.name=hurt"))
    for machine, process in zip(machines, running, strict=True):
        assert_finishes(machine, process)
    assert_same_runs(tmp_path / "outputs" / "calm", hurt)


def test_a_file_missing_on_the_second_machine_is_told_on_both(machines, tiny_text, text_file, tmp_path):
    running = []
    for machine in machines:
        (folder := tmp_path / machine.name).mkdir()
        if machine.rank == 0:
            shutil.copy(text_file, folder / "text.txt")
        torchrun = [BIN / "torchrun", "--nnodes=2", f"--node_rank={machine.rank}", "--master_addr=10.77.0.1"]
        running.append(
            machine.start(*torchrun, ROOT / "train.py", tiny_text, "--data.data_files=text.txt", folder=folder)
        )
    for machine, process in zip(machines, running, strict=True):
        assert process.wait(120) != 0
        expected = "error: rank 1: data.data_files: expected an existing file, got 'text.txt'"
        assert expected in machine.said.read_text().splitlines()
    assert not (tmp_path / "outputs").exists()
