"""accelerate's FSDP2 on one and two CPU processes: exact after a kill, on another number, beside DDP, elsewhere.

All runs are made once, by groups of processes that train one run after another; the tests compare what they left.
"""

import itertools
import json
import random
import signal
import subprocess
import sys
import threading
import time
from functools import partial

import faults
import pytest
import torch
import yaml
from conftest import read_metrics
from hub_server import HubServer
from safetensors.torch import load_file
from sharded import assert_finish, folder_of, kill_in_step, scale_gradients, shard_on_cpus, start_group, use_hub

from cleangpt import NanoGPTForCausalLM, NanoLlamaForCausalLM

PAIRS = list(itertools.product(["nanogpt", "nanollama"], ["adamw", "muon"]))
MODELS = pytest.mark.parametrize(("kind", "optimizer"), PAIRS)
SIZES = pytest.mark.parametrize("size", [1, 2])


@pytest.fixture(scope="module")
def recipe(tmp_path_factory, text_file):
    """A tiny model of any kind: six steps with a boundary every third, all checkpoints kept."""
    folder = tmp_path_factory.mktemp("sharded")
    sections = {
        "run": {"output_dir": str(folder / "outputs")},
        "data": {"path": "text", "data_files": str(text_file), "block_size": 16},
        "tokenizer": {"train": {"kind": "char"}},
        "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
        "training": {"max_steps": 6, "batch_size": 4, "macro_batch": 3, "ema": 0.5},
        "optimizer": {"lr": 0.01},
        "checkpoint": {"keep_last": 9},
        "tracking": {"log_every": 1},
    }
    (folder / "tiny.yaml").write_text(yaml.safe_dump(sections))
    return folder / "tiny.yaml"


@pytest.fixture(scope="module")
def hub():
    server = HubServer("hf_secretsecretsecret")
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def folder(recipe, hub):
    """The run's folder of a kind, an optimizer and a name: `two` for two sharded processes and so on."""

    def runs(name: str, start: str | None = None, push: bool = False) -> list:
        planned = []
        for kind, optimizer in PAIRS:
            options = [
                f"--model.model_type={kind}",
                f"--optimizer.name={optimizer}",
                f"--run.name={kind}-{optimizer}-{name}",
            ]
            if start is not None:
                checkpoint = folder_of(recipe, f"{kind}-{optimizer}-{start}") / "checkpoints" / "step-00000003"
                options.append(f"--training.resume={checkpoint}")
            if push:
                options += ["--hub.push=true", f"--hub.repo_id=me/{kind}-{optimizer}-{name}"]
            planned.append((recipe, options))
        return planned

    pushing = partial(use_hub, hub.url, hub.token)
    killed = {size: runs(f"killed-{size}") for size in (1, 2)}
    assert_finish(start_group(2, runs("2", push=True), shard_on_cpus, pushing))
    assert_finish(start_group(1, runs("1", push=True), shard_on_cpus, pushing))
    assert_finish(start_group(2, runs("ddp")))
    for size, each in killed.items():
        for run in each:
            for process in start_group(size, [run], shard_on_cpus, partial(kill_in_step, 5)):
                process.join(300)
                assert process.exitcode == -signal.SIGKILL
    assert_finish(start_group(2, killed[2] + runs("1-to-2", "1") + runs("ddp-to-2", "ddp"), shard_on_cpus))
    assert_finish(start_group(1, killed[1] + runs("2-to-1", "2"), shard_on_cpus))
    assert_finish(start_group(2, runs("2-to-ddp", "2")))
    return lambda kind, optimizer, name: folder_of(recipe, f"{kind}-{optimizer}-{name}")


def losses(folder, name: str = "train/loss") -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


@MODELS
@SIZES
def test_the_losses_are_those_of_ddp(folder, kind, optimizer, size):
    sharded, ddp = folder(kind, optimizer, size), folder(kind, optimizer, "ddp")
    for name in ("train/loss", "eval/loss", "grad_norm"):
        close = {"abs": 1e-4} if "loss" in name else {"rel": 1e-3}  # Muon orthogonalizes in bf16
        assert losses(sharded, name) == pytest.approx(losses(ddp, name), **close), name
    assert losses(sharded)[-1] < losses(sharded)[0] - 0.01
    names = [load_file(run / "final/model.safetensors").keys() for run in (sharded, ddp)]
    assert names[0] == names[1]  # tied weights are saved once


@MODELS
@SIZES
def test_a_killed_run_resumes_to_the_same_bytes(folder, kind, optimizer, size):
    calm, killed = (faults.left_behind(folder(kind, optimizer, name)) for name in (size, f"killed-{size}"))
    for what in ("weights", "state", "metrics"):
        assert killed[what] == calm[what], what
    assert "checkpoints/step-00000006/optimizer.safetensors" in killed["weights"]


@MODELS
@pytest.mark.parametrize("change", ["2-to-1", "1-to-2", "2-to-ddp", "ddp-to-2"])
def test_a_run_goes_on_with_another_number_of_processes_and_from_or_to_ddp(folder, kind, optimizer, change):
    changed = losses(folder(kind, optimizer, change))
    assert changed == pytest.approx(losses(folder(kind, optimizer, "ddp"))[3:], abs=1e-4)
    before, after = (load_file(folder(kind, optimizer, name) / "final/model.safetensors") for name in ("ddp", change))
    for name, weight in before.items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=2e-3)


WITHOUT_CLEANGPT = """
import sys, torch
sys.modules["cleangpt"] = None
from transformers import AutoModelForCausalLM, AutoTokenizer

for name in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained("me/" + name, trust_remote_code=True).eval()
    inputs = AutoTokenizer.from_pretrained("me/" + name, trust_remote_code=True)("The fox", return_tensors="pt")
    torch.save((type(model).__name__, inputs["input_ids"], model(**inputs).logits), f"{sys.argv[1]}/{name}.pt")
"""


def test_what_is_pushed_loads_without_cleangpt(folder, hub, tmp_path):
    names = [f"{kind}-{optimizer}-{size}" for kind, optimizer in PAIRS for size in (1, 2)]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_CLEANGPT, str(tmp_path), *names],
        cwd=tmp_path,
        env={
            "HF_HOME": str(tmp_path / "home"),
            "PATH": "/usr/bin:/bin",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
            **hub.environment,
        },
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for kind, optimizer in PAIRS:
        for size in (1, 2):
            final = folder(kind, optimizer, size) / "final"
            name, ids, logits = torch.load(tmp_path / f"{kind}-{optimizer}-{size}.pt")
            model = {"nanogpt": NanoGPTForCausalLM, "nanollama": NanoLlamaForCausalLM}[kind].from_pretrained(final)
            assert name == type(model).__name__
            assert torch.equal(logits, model.eval()(ids).logits)
            code = {path.name for path in final.glob("*.py")}
            own = {"positions.py"} if kind == "nanollama" else set()
            assert code == {f"configuration_{kind}.py", f"modeling_{kind}.py", "generation.py", *own}


def test_a_scaler_of_gradients_changes_nothing(folder, recipe):
    """As fp16 needs it; all optimizers, on all processes."""
    run = (recipe, ["--model.model_type=nanogpt", "--optimizer.name=muon", "--run.name=nanogpt-muon-scaled"])
    assert_finish(start_group(2, [run], shard_on_cpus, scale_gradients))
    scaled, plain = (folder("nanogpt", "muon", name) for name in ("scaled", 2))
    assert json.loads((scaled / "checkpoints/step-00000006/state.json").read_text())["scaler"]["_growth_tracker"] == 6
    assert losses(scaled) == losses(plain)
    assert (scaled / "final/model.safetensors").read_bytes() == (plain / "final/model.safetensors").read_bytes()


@pytest.mark.soak
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_kills_at_random_moments_change_nothing(recipe, optimizer):
    """20 of two sharded processes: of one of them, or of both at once."""
    options = ["--model.model_type=nanogpt", f"--optimizer.name={optimizer}", "--model.dropout=0.1"]
    options += ["--training.max_steps=30", "--checkpoint.keep_last=2"]
    chance, killed, number, reached = random.Random(7), 0, 0, set()

    def start(name: str) -> list:
        return start_group(2, [(recipe, [*options, f"--run.name={optimizer}-{name}"])], shard_on_cpus)

    assert_finish(start("calm"))
    started = time.perf_counter()  # of a second one: the first waits for the process that forks the others
    assert_finish(start("calm-again"))
    seconds = time.perf_counter() - started
    calm = faults.left_behind(folder_of(recipe, f"{optimizer}-calm"))
    while killed < 20:
        name, number = f"killed-{number}", number + 1
        for _ in range(3):
            processes = start(name)
            deadline = time.perf_counter() + chance.uniform(0.1, 0.9) * seconds
            while time.perf_counter() < deadline and all(process.is_alive() for process in processes):
                time.sleep(0.002)
            victims = processes if chance.random() < 0.5 else processes[:1] if chance.random() < 0.5 else processes[1:]
            if all(process.is_alive() for process in processes):
                for process in victims:
                    process.kill()
                killed += 1
                folder = folder_of(recipe, f"{optimizer}-{name}")
                reached.add(max((path.name for path in folder.glob("checkpoints/step-*")), default="none"))
            for process in processes:
                process.join(10)  # a survivor ends with the error that the other is gone
                process.kill()
                process.join()
        assert_finish(start(name))
        left = faults.left_behind(folder_of(recipe, f"{optimizer}-{name}"))
        for what in ("weights", "state", "metrics"):
            assert left[what] == calm[what], (name, what)
    assert len(reached) > 2, reached  # kills before the first checkpoint and after several others
