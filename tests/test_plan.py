"""A plan predicts what a run then shows."""

import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, read_metrics, run_python

from cleangpt import UserError, load_recipe, train
from cleangpt.data.prepare import prepare_data
from cleangpt.plan import make_plan, measure_time, usual_lr
from cleangpt.training import memory
from cleangpt.training.memory import CPU_GROWTH

GROWING = [f"--schedule.accumulation.{key}" for key in ("style=linear", "begin=1", "end=3")]

RSS = """
import gc, json, sys
from cleangpt import load_recipe, train

def status(key):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024

options = json.loads(sys.argv[2])
tiny = ["--model.hidden_size=32", "--model.num_attention_heads=2", "--data.block_size=16", "--training.batch_size=2"]
tiny += ["--evaluation.batch_size=2"]
train(load_recipe(sys.argv[1], [*options, *tiny, "--training.micro_batch_size=2", "--run.name=warm-up"]))
gc.collect()
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
before = status("VmRSS")
train(load_recipe(sys.argv[1], options))
print(status("VmHWM") - before)
"""


@pytest.mark.parametrize("kind", ["tiny_text", "tiny_adder"])
def test_a_run_is_as_long_and_as_large_as_planned(kind, request):
    recipe = load_recipe(request.getfixturevalue(kind), GROWING)
    plan = make_plan(recipe)
    assert not recipe.folder.exists()
    final = train(recipe)
    last = read_metrics(recipe.folder)[-1]
    assert plan.recipe.training.max_steps == last["step"]
    assert plan.tokens == last["tokens"]
    assert plan.batches[1] == 3 * recipe.training.batch_size
    weights = (final / "model.safetensors").stat().st_size
    assert 4 * plan.parameters < weights < 4 * plan.parameters + 4000  # and the file's header
    disk = sum(file.stat().st_size for file in recipe.folder.rglob("*.safetensors"))
    assert disk < plan.disk < 1.5 * disk  # the checkpoint being written is gone at the end


def test_epochs_are_those_of_the_recipe(tiny_text):
    plan = make_plan(load_recipe(tiny_text, ["--training.max_steps=null", "--training.max_epochs=2"]))
    assert plan.epochs == pytest.approx(2, rel=0.02)


def test_flops_are_those_of_the_matrix_products(tiny_text):
    recipe = load_recipe(tiny_text)
    plan = make_plan(recipe)
    hidden, time, tokens = 16, 16, plan.tokens
    vocab = plan.parameters // hidden - time - 12 * hidden  # roughly: what is neither block nor position
    per_token = 2 * (12 * hidden**2 + vocab * hidden) + 4 * time * hidden  # forward; backward is twice that
    assert plan.flops == pytest.approx(3 * per_token * tokens, rel=0.1)


def test_memory_counts_what_is_in_use_at_once(tiny_text):
    one, two, halves = (
        make_plan(
            load_recipe(tiny_text, [f"--training.batch_size={batch}", f"--training.micro_batch_size={micro}"])
        ).ddp
        for batch, micro in ((4, 4), (8, 8), (8, 4))
    )
    assert one.weights == one.gradients == pytest.approx(one.optimizer / 2, rel=0.01)
    assert two.activations == pytest.approx(2 * one.activations, rel=0.01)
    assert one.activations < two.peak - one.peak < 1.5 * one.activations  # and gradients of activations
    assert halves.activations == one.activations
    assert halves.peak - one.peak == one.gradients


def test_planning_leaves_torch_as_it_was(tiny_text):
    """The memory tracker patches torch while it is active."""

    def patched():
        places = [vars(sys.modules[name]) for name in ("torch.nn.modules.module", "torch.optim.optimizer")]
        hooks = [repr(value) for place in places for name, value in place.items() if name.startswith("_global_")]
        return [torch.UntypedStorage.resize_, *hooks]

    before = patched()
    make_plan(load_recipe(tiny_text))
    assert patched() == before


def test_processes_share_the_batch_and_fsdp_the_model(tiny_text):
    one, four = (make_plan(load_recipe(tiny_text), number) for number in (1, 4))
    assert four.micro_batch == 1 and one.micro_batch == 4
    assert four.ddp.weights == one.ddp.weights == 4 * one.parameters
    assert four.fsdp.weights == one.ddp.weights // 4
    assert one.fsdp == one.ddp


def test_what_looks_wrong_is_reported(tiny_text):
    assert [w.split(":")[0] for w in make_plan(load_recipe(tiny_text)).warnings] == []
    wrong = ["--training.max_steps=5000", "--optimizer.lr=0.2", "--model.vocab_size=1000", "--model.hidden_size=12"]
    reported = [warning.split(":")[0] for warning in make_plan(load_recipe(tiny_text, wrong)).warnings]
    assert reported == ["training", "optimizer.lr", "model.vocab_size", "model.num_attention_heads"]
    assert usual_lr(124_000_000) == pytest.approx(6e-4, rel=0.1)  # GPT-3's


def test_a_vocabulary_too_small_is_refused_as_in_training(tiny_text):
    with pytest.raises(UserError, match=r"model\.vocab_size"):
        make_plan(load_recipe(tiny_text, ["--model.vocab_size=5"]))


def test_a_model_without_heads_is_planned(tiny_text):
    shape = ["--model={model_type: mamba, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: null}"]
    assert make_plan(load_recipe(tiny_text, shape)).parameters > 0


def test_time_includes_the_problems_graded_at_the_end(tiny_adder, monkeypatch):
    """A test split of 15 problems of which 5 are graded costs as little as one of 5."""
    recipe = load_recipe(tiny_adder, ["--evaluation.batch_size=1"])
    plan, times = make_plan(recipe), []
    clock = itertools.count()  # every measurement takes a second
    monkeypatch.setattr("cleangpt.plan.time.perf_counter", lambda: next(clock))
    for most in (15, 5):
        monkeypatch.setattr("cleangpt.plan.MAX_GRADED", most)
        times.append(measure_time(plan, steps=2))
    assert times[0] - times[1] == 10


def test_the_script_leaves_a_picture_and_no_run(tiny_text, tmp_path):
    done = run_python("scripts/plan.py", tiny_text, "--num_processes=2")
    assert done.returncode == 0, done.stderr
    assert "time, one process here" in done.stdout and "at best" in done.stdout
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["tiny-plan.png"]
    assert (tmp_path / "outputs" / "tiny-plan.png").read_bytes().startswith(b"\x89PNG")
    done = run_python("scripts/plan.py", tiny_text, "--num_processes=3")
    assert done.returncode == 2 and "divisor" in done.stderr
    done = run_python("scripts/plan.py", tiny_text, "--picture=plan.foo", "--no_measurement")
    assert done.returncode == 2 and done.stderr.startswith("error: --picture: plan.foo cannot be written")


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("recipe", "precision"), [("shakespeare", "no"), ("shakespeare_llama", "bf16")])
def test_memory_is_what_a_process_grows_by(recipe, precision, text_file, tmp_path):
    path = ROOT / "recipes" / f"{recipe}.yaml"
    options = [f"--data.data_files={text_file}", f"--run.output_dir={tmp_path}", "--model.num_hidden_layers=3"]
    options += ["--training.batch_size=16", "--training.max_steps=3", "--training.macro_batch=3"]
    options += ["--evaluation.batch_size=16", "--evaluation.prompts=[]", f"--training.mixed_precision={precision}"]
    memory, grown = make_plan(load_recipe(path, options)).ddp, []
    for environment in ({"MALLOC_MMAP_THRESHOLD_": "65536"}, {}):
        command = [sys.executable, "-c", RSS, str(path), json.dumps([*options, "--run.overwrite=true"])]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, **environment})
        assert done.returncode == 0, done.stderr
        grown.append(int(done.stdout.splitlines()[-1]))
    without_holes, with_holes = grown
    copy = memory.weights + memory.optimizer  # for a checkpoint; it may be gone by the peak
    assert memory.peak - copy < without_holes < 1.05 * memory.peak
    assert memory.peak < with_holes < CPU_GROWTH * memory.peak


def test_a_micro_batch_is_chosen_by_the_memory_once(tiny_text, monkeypatch):
    options = ["--training.batch_size=16", "--training.micro_batch_size=auto", "--training.max_steps=3"]
    recipe = load_recipe(tiny_text, options)
    assert make_plan(recipe).micro_batch == 16
    peak = make_plan(load_recipe(tiny_text, [*options, "--training.micro_batch_size=4"])).ddp.peak
    monkeypatch.setattr(memory, "free_memory", lambda device: 1.01 * CPU_GROWTH * peak)
    assert make_plan(recipe).micro_batch == 4
    train(recipe)
    monkeypatch.undo()  # more memory does not change the run
    saved = load_recipe(recipe.folder / "recipe.yaml")
    assert saved.training.micro_batch_size == 4
    data = prepare_data(saved)
    assert memory.choose_micro_batch(recipe, data, 1, saved).training.micro_batch_size == 4
    monkeypatch.setattr(memory, "free_memory", lambda device: 0)
    assert memory.choose_micro_batch(recipe, data, 1).training.micro_batch_size == 1
