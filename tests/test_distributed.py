"""Two processes that really run: exact gradients under DDP, FSDP2 without accelerate, one that dies."""

import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import faults
import numpy as np
import psutil
import pytest
import torch
from accelerate import DistributedType
from conftest import ROOT, read_metrics
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from cleangpt import NanoGPTConfig, NanoGPTForCausalLM, NanoLlamaConfig, NanoLlamaForCausalLM, load_recipe, train
from cleangpt.data.loader import Batch, Loader, Share
from cleangpt.data.splits import IGNORED
from cleangpt.models.statistics import copy_weights, update_ratio, weight_norms
from cleangpt.training.step import accumulate

BIN = Path(sys.executable).parent
OPTIONS = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def in_two_processes(function, tmp_path: Path, *arguments) -> list:
    """What `function(rank, *arguments)` returns in each of two processes that form a group."""
    processes = [faults.start(join_group, function, rank, str(tmp_path), arguments) for rank in range(2)]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


def join_group(function, rank: int, folder: str, arguments) -> int:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    Path(folder, f"{rank}.json").write_text(json.dumps(function(rank, *arguments)))
    torch.distributed.destroy_process_group()
    return 0


def make_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "nanogpt":
        return NanoGPTForCausalLM(NanoGPTConfig(**OPTIONS))
    return NanoLlamaForCausalLM(NanoLlamaConfig(**OPTIONS, use_qk_norm=True))


class Ragged:
    """Random rows of 12 tokens, of which each has its own number of targets."""

    sequence_length = 12

    def __len__(self):
        return 100

    def count_targets(self, indices):
        return int((self[indices]["targets"] != IGNORED).sum())

    def __getitem__(self, indices):
        rows = [torch.randint(30, (13,), generator=torch.Generator().manual_seed(int(i))) for i in indices]
        ids = torch.stack(rows).numpy()
        targets = ids[:, 1:].copy()
        for row, index in zip(targets, indices, strict=True):
            row[int(index) % 11 :] = IGNORED
        return {"input_ids": ids[:, :-1], "targets": targets}


class Group:
    """What `accumulate` needs of an Accelerator."""

    mixed_precision, distributed_type = "no", DistributedType.MULTI_CPU

    def __init__(self, num_processes: int):
        self.num_processes, self.device = num_processes, torch.device("cpu")

    def no_sync(self, model):
        return model.no_sync()

    def backward(self, loss):
        loss.backward()


def batch_of(process: int, num_processes: int, micro: int) -> Batch:
    share = Share(device=torch.device("cpu"), process=process, num_processes=num_processes, micro_batch_size=micro)
    return Loader(Ragged(), np.full(5, 8), 0, share).batch(1)


def ddp_gradient(rank: int, micro: int) -> list:
    model = DistributedDataParallel(make_model("nanogpt").double())
    loss = accumulate(Group(2), model, batch_of(rank, 2, micro))
    return [loss.item(), torch.cat([weight.grad.flatten() for weight in model.parameters()]).tolist()]


@pytest.mark.parametrize("micro", [1, 3, 4])
def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path, micro):
    """8 sequences as one batch, or as 2 processes x micro-steps of ragged targets: 1e-12 in float64."""
    model = make_model("nanogpt").double()
    loss = accumulate(Group(1), model, batch_of(0, 1, 8))
    gradient = torch.cat([weight.grad.flatten() for weight in model.parameters()])
    parts = in_two_processes(ddp_gradient, tmp_path, micro)
    assert sum(part[0] for part in parts) == pytest.approx(loss.item(), rel=1e-12)
    for _, other in parts:
        torch.testing.assert_close(torch.tensor(other, dtype=torch.float64), gradient, rtol=1e-12, atol=1e-15)


def train_a_little(model, rows: slice, num_processes: int) -> list[float]:
    """Losses of a few steps on the process's part of a batch of 8."""
    ids = torch.randint(30, (8, 12), generator=torch.Generator().manual_seed(1))[rows]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if num_processes > 1:
            torch.distributed.all_reduce(loss := loss.detach() / num_processes)
        losses.append(loss.item())
    return losses


def fsdp_losses(rank: int, kind: str) -> list:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh, model = init_device_mesh("cpu", (2,)), make_model(kind)
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    losses = train_a_little(model, slice(4 * rank, 4 * rank + 4), 2)
    norms, moved = weight_norms(model), update_ratio([2 * weight for weight in copy_weights(model)], model)
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    sharded = sum(type(weight).__name__ == "DTensor" for weight in model.parameters())
    return [losses, sharded, {name: weight.flatten().tolist() for name, weight in whole.items()}, norms, moved]


@pytest.mark.parametrize("kind", ["nanogpt", "nanollama"])
def test_fsdp2_shards_both_models_and_trains_the_same(tmp_path, kind):
    model = make_model(kind)
    alone = train_a_little(model, slice(None), 1)
    (losses, sharded, weights, norms, moved), (other, *_) = in_two_processes(fsdp_losses, tmp_path, kind)
    assert losses == pytest.approx(alone, abs=1e-5) and losses == other
    assert sharded == len(list(model.parameters()))
    for name, weight in model.state_dict().items():
        assert weights[name] == pytest.approx(weight.flatten().tolist(), abs=1e-4), name
    assert norms == pytest.approx(weight_norms(model), rel=1e-4)  # of the whole weights, not of a shard
    assert moved == pytest.approx(0.5)


def launch(*arguments) -> subprocess.Popen:
    """torchrun with two processes and a port of its own; what it says on stderr is in the file `said`."""
    command = [BIN / "torchrun", "--standalone", "--nproc_per_node=2", *arguments]
    said = tempfile.TemporaryFile("w+")  # noqa: SIM115, it lives as long as the process
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=said)
    process.said = said
    return process


def assert_finishes(process: subprocess.Popen) -> None:
    code = process.wait(240)
    process.said.seek(0)
    assert code == 0, process.said.read()


def workers(process: subprocess.Popen) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children()
    return [child for child in children if "train.py" in " ".join(child.cmdline())]


LONG = ["--training.max_steps=200", "--training.macro_batch=20", "--model.dropout=0.1", "--tracking.log_every=20"]


def wait_for_checkpoint(folder: Path, process: subprocess.Popen) -> None:
    deadline = time.time() + 120
    while not any(folder.glob("checkpoints/step-*")):
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.01)


def test_a_process_that_dies_is_restarted_and_changes_nothing(tiny_text, tmp_path):
    for name in ("calm", "hurt"):
        process = launch("--max_restarts=3", "train.py", tiny_text, *LONG, f"--run.name={name}")
        if name == "hurt":
            wait_for_checkpoint(tmp_path / "outputs" / name, process)
            workers(process)[1].send_signal(signal.SIGKILL)
        assert_finishes(process)
    assert_same_runs(tmp_path / "outputs" / "calm", tmp_path / "outputs" / "hurt")


def assert_same_runs(one: Path, other: Path) -> None:
    one, other = faults.left_behind(one), faults.left_behind(other)
    for what in ("weights", "state", "metrics"):
        assert one[what] == other[what], what


def test_torchrun_passes_sigterm_on_and_one_process_goes_on_where_two_stopped(tiny_text, tmp_path):
    process = launch("train.py", tiny_text, *LONG)
    wait_for_checkpoint(folder := tmp_path / "outputs" / "tiny", process)
    process.send_signal(signal.SIGTERM)
    process.wait(60)
    before = [line["step"] for line in read_metrics(folder) if "train/loss" in line]
    assert before[-1] < 200
    train(load_recipe(tiny_text, LONG))
    calm = load_recipe(tiny_text, [*LONG, "--run.name=calm"])
    train(calm)
    losses, expected = ([m["train/loss"] for m in read_metrics(f) if "train/loss" in m] for f in (folder, calm.folder))
    assert losses[: len(before)] == pytest.approx(expected[: len(before)], abs=1e-2)  # dropout differs by process
    assert len(losses) == len(expected)


@pytest.mark.soak
def test_30_kills_of_two_processes_change_nothing(tiny_text, tmp_path):
    assert_finishes(launch("train.py", tiny_text, *LONG, "--run.name=calm"))
    killed, number = 0, 0
    while killed < 30:
        name, number = f"killed-{number}", number + 1
        for attempt in range(4):
            process = launch("train.py", tiny_text, *LONG, f"--run.name={name}")
            started = time.time()
            while time.time() < started + 5 + 3 * (attempt + number % 5) / 4 and process.poll() is None:
                time.sleep(0.05)
            if process.poll() is None:
                victims = [*workers(process), psutil.Process(process.pid)]
                for victim in victims:
                    victim.kill()
                killed += 1
            process.wait()
        assert_finishes(launch("train.py", tiny_text, *LONG, f"--run.name={name}"))
        assert_same_runs(tmp_path / "outputs" / "calm", tmp_path / "outputs" / name)
