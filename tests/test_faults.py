"""No fault changes a run: killed at any moment, preempted, out of disk, damaged, it ends with the same weights.

A small sample here; `make soak` runs all of it: 200 kills, every failpoint, 20 signals in each phase.
"""

import contextlib
import itertools
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import faults
import pytest
from conftest import LINES, ROOT, read_metrics
from datasets import load_from_disk
from pydantic import TypeAdapter
from transformers import AutoTokenizer

from cleangpt import Stopped, UserError, load_recipe, train
from cleangpt.files import _seal, is_whole, remove
from cleangpt.training import step
from cleangpt.training.checkpoint import Progress, list_checkpoints, newest_checkpoint
from cleangpt.training.run_folder import hold_folder

OPTIONS = [
    "--training.max_steps=12",
    "--training.macro_batch=4",
    "--checkpoint.keep_last=2",
    "--checkpoint.keep_best=1",
]
OPTIONS += ["--model.dropout=0.1", "--optimizer.name=muon", "--tracking.log_every=2", "--optimizer.lr=0.01"]
WAIT = 120  # seconds until a process counts as hanging


@pytest.fixture(scope="session")
def reference_cache():
    return {}


@pytest.fixture
def reference(tiny_text, reference_cache):
    """What the run leaves when nothing disturbs it, and how long it takes."""
    if not reference_cache:
        assert finish(tiny_text, "calm") == 0
        reference_cache["left"] = left_of(tiny_text, "calm")
        started = time.perf_counter()  # of a second one: the first waits for the process that forks the others
        assert finish(tiny_text, "calm again") == 0
        reference_cache["seconds"] = time.perf_counter() - started
    return reference_cache


def options(name: str) -> list[str]:
    return [*OPTIONS, f"--run.name={name}"]


def finish(recipe: Path, name: str) -> int:
    """The same command once more, to its end; its exit code."""
    process = faults.start(faults.run, str(recipe), options(name))
    process.join(WAIT)
    assert process.exitcode is not None, "hangs"
    return process.exitcode


def left_of(recipe: Path, name: str) -> dict:
    return faults.left_behind(recipe.parent / "outputs" / name)


def soak(value):
    """A parameter for `make soak` alone."""
    return pytest.param(value, marks=pytest.mark.soak)


@pytest.mark.parametrize("kills", [6, soak(200)])
def test_kills_at_random_moments_change_nothing(tiny_text, reference, kills):
    draw, killed, number = random.Random(kills), 0, 0
    while killed < kills:
        name, number = f"killed-{number}", number + 1
        for _ in range(draw.randint(1, 5)):
            process = faults.start(faults.run, str(tiny_text), options(name))
            process.join(draw.uniform(0, 1.2 * reference["seconds"]))
            if process.exitcode is None:
                process.kill()
                killed += 1
            process.join()
        assert finish(tiny_text, name) == 0
        assert left_of(tiny_text, name) == reference["left"]


def count_moments(recipe: Path, tmp_path: Path) -> int:
    counted = tmp_path / "moments"
    process = faults.start(faults.run_and_fail_at, str(recipe), options("counted"), None, counted)
    process.join(WAIT)
    return int(counted.read_text())


@pytest.mark.parametrize("moments", [4, soak(None)])
def test_a_kill_at_the_moments_of_saving_changes_nothing(tiny_text, reference, tmp_path, moments):
    """Before and after each write, flush, rename and delete: at some of them, or at every one."""
    count = count_moments(tiny_text, tmp_path)
    assert count > 200
    for point in random.Random(3).sample(range(count), moments or count):
        name = f"point-{point}"
        process = faults.start(faults.run_and_fail_at, str(tiny_text), options(name), point)
        process.join(WAIT)
        assert process.exitcode == -signal.SIGKILL
        assert finish(tiny_text, name) == 0
        assert left_of(tiny_text, name) == reference["left"]


def slow_at(phase: str, recipe: str, overrides: list[str], reached: str) -> int:
    """`faults.run` that takes its time in one phase, once it has said that it reached it."""
    import cleangpt.data.encoding
    import cleangpt.training.boundary
    import cleangpt.training.checkpoint
    import cleangpt.training.loop

    if phase.startswith("data"):
        os.environ["HF_DATASETS_CACHE"] = f"{reached}.cache"
    owner, name = {
        "data build": (cleangpt.data.encoding, "tokenize"),
        "data workers": (cleangpt.data.encoding.Encoder, "encode"),
        "step": (cleangpt.training.loop, "accumulate"),
        "evaluation": (cleangpt.training.boundary, "evaluate"),
        "saving": (cleangpt.training.checkpoint, "save_file"),
    }[phase]
    inner, calls = getattr(owner, name), 0

    def outer(*arguments, **more):
        nonlocal calls
        calls += 1
        if calls == (1 if phase in ("data build", "data workers", "saving") else 2):
            Path(reached).touch()
            time.sleep(0.3)
        return inner(*arguments, **more)

    setattr(owner, name, outer)
    return faults.run(recipe, overrides)


@pytest.mark.parametrize("times", [1, soak(20)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("phase", ["data build", "data workers", "step", "evaluation", "saving"])
def test_a_signal_in_any_phase_saves_and_loses_nothing(tiny_text, reference, tmp_path, phase, number, times):
    for count in range(times):
        name = f"{phase.replace(' ', '-')}-{number.name}-{count}"
        reached = tmp_path / f"{name}.reached"
        workers = ["--data.num_proc=2"] if phase == "data workers" else []
        process = faults.start(slow_at, phase, str(tiny_text), [*options(name), *workers], str(reached))
        while not reached.exists() and process.exitcode is None:
            time.sleep(0.005)
        os.kill(process.pid, number)
        process.join(WAIT)
        assert process.exitcode == (130 if number == signal.SIGINT else 143)
        checkpoints = list((tiny_text.parent / "outputs" / name / "checkpoints").glob("step-*"))
        assert phase.startswith("data") == (not checkpoints)
        assert finish(tiny_text, name) == 0
        assert left_of(tiny_text, name) == reference["left"]


def test_a_second_ctrl_c_ends_the_run_at_once(tiny_text, monkeypatch):
    """But not one that comes at the same moment: a terminal and torchrun both send the first."""

    def interrupt_twice(*arguments):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return step.accumulate(*arguments)

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("cleangpt.training.loop.accumulate", interrupt_twice)
    with pytest.raises(Stopped, match="by a signal after step 1, saved") as stop:
        train(load_recipe(tiny_text, OPTIONS))
    assert stop.value.code == 130
    monkeypatch.setattr("cleangpt.training.signals.ECHO_S", -1.0)
    with pytest.raises(KeyboardInterrupt):
        train(load_recipe(tiny_text, OPTIONS))
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_is_not_taken_for_a_mistake_in_the_data(tiny_text, monkeypatch):
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Stopped, match="SIGTERM before the first step") as stop:
        train(load_recipe(tiny_text, ["--data.split={train: 0.7, validation: 0.3}"]))  # not built by another test
    assert stop.value.code == 143


def test_losses_that_are_not_finite_are_left_out_and_then_stop_the_run(tiny_text, monkeypatch, capsys):
    """Steps 7 to 10 give a NaN: three are skipped, the fourth ends the run with the checkpoint of step 4 as it was."""
    monkeypatch.setattr("cleangpt.training.loop.accumulate", spoiled(range(7, 11)))
    recipe = load_recipe(tiny_text, options("diverges"))
    with pytest.raises(Stopped, match=r"diverged at step 10, samples \d+, .*: loss nan") as stop:
        train(recipe)
    assert stop.value.code == 1
    assert "step 9: loss nan, gradient norm" in capsys.readouterr().out
    assert "step-00000008 is the last good checkpoint" in str(stop.value)
    assert {line["step"]: line["train/loss"] for line in read_metrics(recipe.folder) if "train/loss" in line}[8] is None


def test_a_step_that_is_left_out_changes_no_weight(tiny_text, monkeypatch):
    recipe = load_recipe(tiny_text, [*options("skips"), "--training.max_steps=4"])
    monkeypatch.setattr("cleangpt.training.loop.accumulate", spoiled([3]))
    snapshots = []
    monkeypatch.setattr("cleangpt.training.loop.update_ratio", lambda before, model: snapshots.append(before) or 0.0)
    monkeypatch.setattr("cleangpt.reporting.tracking.Tracker.is_due", lambda self, step: True)
    train(recipe)
    moved = [
        any((one != other).any() for one, other in zip(*pair, strict=True)) for pair in itertools.pairwise(snapshots)
    ]
    assert moved == [True, True, False]  # before step 4 the weights are those from before step 3


def spoiled(steps):
    """`accumulate` whose loss and gradients are NaN in some steps."""
    calls = itertools.count(1)

    def accumulate(accelerator, model, batch):
        loss = step.accumulate(accelerator, model, batch)
        if next(calls) not in steps:
            return loss
        for weight in model.parameters():
            weight.grad.fill_(float("nan"))
        return loss * float("nan")

    return accumulate


def test_a_run_that_was_not_finite_for_a_while_resumes_with_its_count(tiny_text):
    assert load_progress_of({"step": 4, "skipped": 2}).skipped == 2


def load_progress_of(state: dict) -> Progress:
    return TypeAdapter(Progress).validate_python(state)


def test_a_full_disk_is_told_and_the_last_good_checkpoint_stays(tiny_text, tmp_path):
    process = faults.start(run_on_a_full_disk, str(tiny_text), options("full"), str(tmp_path / "said"))
    process.join(WAIT)
    assert process.exitcode == 2
    assert "run.output_dir: " in (tmp_path / "said").read_text()
    folder = tiny_text.parent / "outputs" / "full"
    assert newest_checkpoint(folder).name == "step-00000004"
    assert not list(folder.rglob("*.writing"))


def run_on_a_full_disk(recipe: str, overrides: list[str], said: str) -> int:
    """`faults.run` that can write no more weights from its second checkpoint on."""
    import errno

    import cleangpt.training.checkpoint

    inner, calls = cleangpt.training.checkpoint.save_file, itertools.count(1)

    def save_file(*arguments):
        if next(calls) > 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        inner(*arguments)

    cleangpt.training.checkpoint.save_file = save_file
    with open(said, "w") as sys.stderr:
        return faults.run(recipe, overrides)


def test_two_runs_on_one_folder_the_second_is_told_who_has_it(tiny_text):
    recipe = load_recipe(tiny_text)
    with (
        hold_folder(recipe.folder),
        pytest.raises(UserError, match=rf"run.name: .*trained by process {os.getpid()} on"),
    ):
        train(recipe)
    train(recipe)
    assert not [path.name for path in recipe.folder.parent.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize(("flips", "truncations"), [(150, 50), pytest.param(1000, 200, marks=pytest.mark.soak)])
def test_flipped_bits_and_truncations_are_seen(tiny_text, flips, truncations):
    """Each damage to the newest checkpoint is seen, and the older one is taken."""
    run = load_recipe(tiny_text, options("damaged"))
    assert finish(tiny_text, "damaged") == 0
    older, newest = list_checkpoints(run.folder)
    files = [path for path in sorted(newest.rglob("*")) if path.is_file()]
    draw = random.Random(4)
    for number in range(flips + truncations):
        file = draw.choice(files)
        content = file.read_bytes()
        damaged = bytearray(content)
        if number < flips:
            damaged[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        else:
            del damaged[draw.randrange(len(content)) :]
        file.write_bytes(damaged)
        assert not is_whole(newest), (file, number)
        assert newest_checkpoint(run.folder) == older
        file.write_bytes(content)
    assert newest_checkpoint(run.folder) == newest


class Bomb:
    """A pickle that leaves a file behind when somebody loads it."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return Path.touch, (self.trace,)


SLOTS = """
optimizer.bin optimizer.pt scheduler.bin scaler.pt rng.pt random_states_0.pkl custom_checkpoint_0.pkl state.pkl
model/pytorch_model.bin model/training_args.bin model/model.pkl model/adapter_model.bin
optimizer.safetensors state.json recipe.yaml manifest.json model/model.safetensors model/config.json
model/generation_config.json model/tokenizer.json model/tokenizer_config.json
"""


def attacks(folder: Path, trace: Path) -> list:
    """Ways to write into the newest checkpoint what must never run or lead elsewhere, with a manifest that fits."""
    bomb, outside = pickle.dumps(Bomb(trace)), folder.parents[3] / "outside"
    outside.mkdir(exist_ok=True)
    yaml_bomb = f"!!python/object/apply:pathlib.Path.touch [!!python/object/apply:pathlib.Path ['{trace}']]"
    ways = [lambda name=name: write(folder / name, bomb) for name in SLOTS.split()]
    ways += [lambda name=name: replace_weights(folder, name, bomb) for name in ("pytorch_model.bin", "model.bin")]
    ways += [lambda: write(folder / "recipe.yaml", yaml_bomb.encode())]
    ways += [lambda: write(folder / "recipe.yaml", f"run: {yaml_bomb}".encode())]
    ways += [lambda: write(folder.parents[1] / "recipe.yaml", yaml_bomb.encode())]
    ways += [lambda: write(folder.parents[1] / "recipe.yaml", f"data: {yaml_bomb}".encode())]
    ways += [lambda: write(folder.parents[1] / "metrics.jsonl", bomb)]
    ways += [lambda: patch_json(folder / "model/config.json", auto_map={"AutoModelForCausalLM": "evil.Model"})]
    ways += [
        lambda: (
            write(folder / "model/evil.py", f"open({str(trace)!r}, 'w')".encode()),
            patch_json(folder / "model/config.json", model_type="evil", auto_map={"AutoConfig": "evil.C"}),
        )
    ]
    ways += [lambda: write(folder / "model/modeling_nanogpt.py", f"open({str(trace)!r}, 'w')".encode())]
    ways += [lambda: patch_json(folder / "manifest.json", **{"../../../../outside": {"size": 0, "sha256": ""}})]
    ways += [lambda: patch_json(folder / "manifest.json", **{"/etc/passwd": {"size": 0, "sha256": ""}})]
    ways += [lambda: patch_json(folder / "state.json", step="../../x", metrics=[1])]
    for path in (folder / "model/model.safetensors", folder / "state.json", folder / "model", folder, folder.parent):
        ways.append(lambda path=path: link(path, outside))
    for name in ("metrics.jsonl", "recipe.yaml", "best", ".best.writing", ".final.writing"):
        ways.append(lambda name=name: link(folder.parents[1] / name, outside))
    return ways


def write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def replace_weights(folder: Path, name: str, content: bytes) -> None:
    (folder / "model" / "model.safetensors").unlink()
    write(folder / "model" / name, content)


def patch_json(path: Path, **values) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def link(path: Path, target: Path) -> None:
    remove(path)
    path.symlink_to(target)


def test_malicious_files_are_neither_executed_nor_followed(tiny_text, tmp_path):
    """Pickles in every slot, tags in YAML, paths and links to elsewhere, the checkpoint's manifest made to fit."""
    assert finish(tiny_text, "good") == 0
    good, trace, outside = tmp_path / "outputs" / "good", tmp_path / "executed", tmp_path / "outside"
    shutil.rmtree(good / "final")  # so that the run has something left to do
    count = len(attacks(good / "checkpoints" / "step-00000012", trace))
    assert count >= 40
    for number in range(count):
        folder = tmp_path / "outputs" / "victim"
        remove(folder)
        shutil.copytree(good, folder)
        checkpoint = folder / "checkpoints" / "step-00000012"
        attacks(checkpoint, trace)[number]()
        if checkpoint.is_dir() and not checkpoint.is_symlink() and number not in (15,):
            with contextlib.suppress(OSError, ValueError):
                _seal(checkpoint)  # as if whoever wrote it had been careful
        try:
            train(load_recipe(tiny_text, options("victim")))
        except UserError as error:
            assert error.problems
        assert not trace.exists(), number
        assert not any(outside.iterdir()), number


def mutated(text: str, draw: random.Random) -> str:
    """A recipe with a few of its characters, lines or values changed."""
    for _ in range(draw.randint(1, 4)):
        kind, place = draw.randrange(6), draw.randrange(len(text))
        if kind == 0:
            text = text[:place] + chr(draw.choice([*range(32, 127), 10, 0x2028, 0xE9])) + text[place + 1 :]
        elif kind == 1:
            text = text[:place] + text[place + draw.randint(1, 20) :]
        elif kind == 2:
            text = text[:place] + text[place : place + draw.randint(1, 30)] + text[place:]
        else:
            lines = text.splitlines() or [""]
            i = draw.randrange(len(lines))
            if kind == 3:
                lines[i] = lines[i].split(":")[0] + ": " + draw.choice(VALUES.strip().replace("\n", "|").split("|"))
            elif kind == 4:
                lines[i] = "  " * draw.randrange(3) + lines[i].strip()
            else:
                lines.insert(draw.randrange(len(lines)), lines[i])
            text = "\n".join(lines) or "x"
    return text


VALUES = """
-1|0|1e999|.nan|null|[]|{}|[1, {a: 2}]|yes|'|!!python/object:os.system x|&a *a|2024-01-01|0x10|${run.name}
${oc.env:HOME}|'${'|../..|*|? x|a: b: c|1_0|999999999999999999999999999999999999999999999999999999999999999999999
"""


@pytest.mark.parametrize("count", [200, soak(5000)])
def test_mutated_recipes_are_read_or_refused(tmp_path, count):
    draw, recipes = random.Random(5), [path.read_text() for path in sorted((ROOT / "recipes").glob("*.yaml"))]
    for path in (ROOT / "recipes").glob("*.yaml"):
        shutil.copy(path, tmp_path)
    refused = 0
    for _ in range(count):
        text = mutated(draw.choice(recipes), draw)
        (tmp_path / "mutated.yaml").write_text(text)
        try:
            load_recipe(tmp_path / "mutated.yaml")
        except UserError as error:
            refused += 1
            assert all(isinstance(part, str) and part for problem in error.problems for part in problem), text
    assert count / 10 < refused < count


def test_where_a_builder_is_killed_the_one_that_waits_builds(tiny_text, tmp_path):
    """Its workers live on for a while, and what they still write counts for nothing."""
    text = "".join(f"{i} {LINES[i % 4]}\n" for i in range(60_000))
    (tmp_path / "long.txt").write_text(text)
    cache, options = tmp_path / "cache", [f"--data.data_files={tmp_path / 'long.txt'}", "--data.num_proc=2"]
    command = [sys.executable, "scripts/prepare_data.py", str(tiny_text), *options]
    start = {"cwd": ROOT, "env": {**os.environ, "HF_DATASETS_CACHE": str(cache)}, "start_new_session": True}
    first = subprocess.Popen(command, **start)
    while not list(cache.glob("cleangpt/building-*/train/*")):
        assert first.poll() is None
        time.sleep(0.01)
    second = subprocess.Popen(command, **start, stdout=subprocess.PIPE, text=True)
    time.sleep(0.5)
    first.kill()
    opened = re.search(r'load_from_disk\("(.+)"\)', second.communicate(timeout=WAIT)[0])[1]
    with contextlib.suppress(ProcessLookupError):
        os.killpg(first.pid, signal.SIGKILL)
    tokenizer = AutoTokenizer.from_pretrained(Path(opened, "tokenizer"))
    splits = load_from_disk(opened)
    written = "".join(tokenizer.decode(row) for name in ("train", "validation") for row in splits[name]["input_ids"])
    assert written == text
    assert not list(cache.glob("cleangpt/building-*"))
