"""A real SLURM with two nodes on this machine runs `recipes/accelerate/slurm.sh`."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from conftest import ROOT, needs, run_python
from test_distributed import assert_same_runs
from test_machines import CORES, LONG, train_on_one

MISSING = [program for program in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(program) is None]
pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(os.geteuid() != 0, reason="SLURM's daemons need root"),
    pytest.mark.skipif(bool(MISSING), reason=f"{', '.join(MISSING)}: apt-get install slurm-wlm munge"),
]

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
AuthInfo=socket={folder}/munge.socket,cred_expire=5  # a requeued job waits until its credential has expired
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
JobRequeue=1
MpiDefault=none
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""

# In a mount namespace of its own, where n1 and n2 are names of this machine; each node has one core.
DAEMONS = """
mount --bind {folder}/hosts /etc/hosts
munged --foreground --force --key-file={folder}/munge.key --socket={folder}/munge.socket \
    --pid-file={folder}/munged.pid --log-file={folder}/munged.log --seed-file={folder}/munged.seed &
until [[ -e {folder}/munge.socket ]]; do sleep 0.1; done
slurmctld -D -c &
taskset --cpu-list {cores[0]} slurmd -D -N n1 &
taskset --cpu-list {cores[1]} slurmd -D -N n2 &
wait
"""


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """Starts the daemons in namespaces of their own, with which they and their jobs end."""
    folder, host = tmp_path / "slurm", socket.gethostname().split(".")[0]
    (folder / "state").mkdir(parents=True)
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        for free in (one, two, three):
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in (one, two, three)]
    (folder / "slurm.conf").write_text(CONFIGURATION.format(folder=folder, host=host, ports=ports))
    (folder / "hosts").write_text(f"127.0.0.1 localhost n1 n2 {host}\n")
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    monkeypatch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
    script = DAEMONS.format(folder=folder, cores=[CORES[0], CORES[-1]])
    apart = ["unshare", "--mount", "--pid", "--mount-proc", "--fork", "--kill-child"]
    with (folder / "said.txt").open("w") as said:
        daemons = subprocess.Popen([*apart, "bash", "-c", script], stdout=said, stderr=said)
    try:
        wait_until(lambda: ask("sinfo", "--noheader", "--format=%T %D") == "idle 2", folder / "said.txt")
        yield
    finally:
        daemons.kill()
        daemons.wait()


def wait_until(condition, log: Path) -> None:
    deadline = time.time() + 600
    while not condition():
        assert time.time() < deadline, log.read_text()
        time.sleep(0.1)


def ask(*command) -> str:
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True).stdout.strip()


def describe(job: str) -> dict[str, str]:
    """What SLURM knows of a job."""
    return dict(word.split("=", 1) for word in ask("scontrol", "show", "job", job).split() if "=" in word)


def submit(log: Path, *arguments) -> str:
    """Submits the script to two nodes with one core each; the job's number."""
    nodes = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={log}"]
    return ask("sbatch", "--parsable", *nodes, "recipes/accelerate/slurm.sh", *arguments)


def test_a_job_whose_time_ends_saves_is_requeued_and_changes_nothing(slurm, tiny_text, tmp_path):
    """The run is frozen until its time is cut to less than ten minutes and SLURM has sent its signal."""
    log, folder = tmp_path / "job.txt", tmp_path / "outputs" / "tiny"
    job = submit(log, tiny_text, *LONG)
    wait_until(lambda: any(folder.glob("checkpoints/step-*")), log)
    commands = {process: process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])}
    processes = [process for process in commands if commands[process][2:4] == ["train.py", str(tiny_text)]]
    assert len(processes) == 2
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    ask("scontrol", "update", f"JobId={job}", "TimeLimit=9")
    wait_until(lambda: "The time is nearly up" in log.read_text(), log)
    ask("scontrol", "update", f"JobId={job}", "TimeLimit=60")  # for the next start
    for process in processes:
        process.send_signal(signal.SIGCONT)
    wait_until(lambda: describe(job)["JobState"] in ("COMPLETED", "FAILED"), log)
    told = describe(job)
    assert (told["JobState"], told["ExitCode"], told["Restarts"]) == ("COMPLETED", "0:0", "1"), log.read_text()
    assert "stopped:" in log.read_text()
    train_on_one(tiny_text, *LONG, "--run.name=calm")
    assert_same_runs(tmp_path / "outputs" / "calm", folder)


def test_a_job_that_cannot_run_fails_and_is_not_requeued(slurm, tiny_text, tmp_path):
    log = tmp_path / "job.txt"
    job = submit(log, tiny_text, "--training.batch_size=5")
    wait_until(lambda: describe(job)["JobState"] == "FAILED", log)
    assert describe(job)["Restarts"] == "0"
    assert "error: training.batch_size: expected a multiple of the 2 processes, got 5" in log.read_text()


@needs("submitit", extra="slurm")
def test_a_sweep_runs_as_jobs_and_finds_them_again(slurm, tiny_text, tmp_path):
    sweep = ["scripts/sweep.py", tiny_text, "--grid", "optimizer.lr=1e-2,3e-2", "--seeds=2", "--slurm"]
    first = run_python(*sweep, "cpus_per_task=1", "timeout_min=9", "slurm_partition=all")
    assert first.returncode == 0, first.stderr
    assert "4/4 " in first.stdout and "p = " in first.stdout
    assert len([*(tmp_path / "outputs" / "tiny-sweep" / "slurm").glob("*_result.pkl")]) == 4
    assert "4 runs, 0 of them to be trained" in run_python(*sweep).stdout
    wrong = run_python(*sweep, "slurm_partition=none", "--run.name=other")
    assert wrong.returncode == 2 and "error: --slurm: sbatch: error: invalid partition" in wrong.stderr
