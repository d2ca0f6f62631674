"""The same folder is the same run, a new folder is a branch; a run starts where its main process says."""

import json
import shutil
import signal

import faults
import pytest
import torch
import yaml
from conftest import read_metrics
from safetensors.torch import load_file

from cleangpt import Stopped, UserError, load_recipe, train
from cleangpt.training import step
from cleangpt.training.checkpoint import list_checkpoints
from cleangpt.training.run_folder import find_start
from cleangpt.training.setup import build_run, find_run

FLAT = ["--schedule.lr.style=constant", "--schedule.lr.warmup_ratio=0"]


def losses(folder) -> dict[int, float]:
    return {line["step"]: line["train/loss"] for line in read_metrics(folder) if "train/loss" in line}


def cut_off(recipe) -> None:
    """Leaves a run as a kill after its first boundary would have."""
    _, *later = list_checkpoints(recipe.folder)
    for folder in (recipe.folder / "final", *later):
        shutil.rmtree(folder)


@pytest.mark.parametrize(
    "change",
    [
        ["--checkpoint.every=2", "--checkpoint.keep_last=3", "--checkpoint.metric=eval/perplexity"],
        ["--training.max_skipped=0", "--training.early_stopping.patience=50", "--training.micro_batch_size=2"],
        ["--data.num_proc=1", "--evaluation.batch_size=8", "--evaluation.prompts=[The]", "--tracking.log_every=2"],
        ["--hub.private=false", "--training.compile=false"],
    ],
)
def test_what_does_not_change_the_mathematics_may_change(tiny_text, change):
    keep = ["--checkpoint.keep_last=9"]
    train(whole := load_recipe(tiny_text, [*keep, "--run.name=whole"]))
    train(recipe := load_recipe(tiny_text, keep))
    cut_off(recipe)
    train(load_recipe(tiny_text, change))
    one, other = (read_metrics(folder)[-1]["eval/loss"] for folder in (recipe.folder, whole.folder))
    assert one == pytest.approx(other, abs=1e-6)


def test_the_data_may_move_but_not_change(tiny_text, text_file, tmp_path):
    train(recipe := load_recipe(tiny_text, ["--checkpoint.keep_last=9"]))
    cut_off(recipe)
    moved = shutil.copy(text_file, tmp_path / "moved.txt")
    assert train(load_recipe(tiny_text, [f"--data.data_files={{train: {moved}}}"])).is_dir()
    (tmp_path / "moved.txt").write_text("something else " * 100)
    with pytest.raises(UserError) as refused:
        train(load_recipe(tiny_text, [f"--data.data_files={moved}"]))
    assert [key for key, _ in refused.value.problems] == ["data.fingerprint"]


def test_arithmetic_with_other_splits_is_not_resumed(tiny_adder):
    """As a run of the first version is, whose splits separated a+b from b+a."""
    train(recipe := load_recipe(tiny_adder))
    file = recipe.folder / "recipe.yaml"
    saved = yaml.safe_load(file.read_text())
    saved["data"]["fingerprint"] = None
    file.write_text(yaml.safe_dump(saved))
    with pytest.raises(UserError, match=r"data\.fingerprint: the text, its tokenizer or its splits changed"):
        train(recipe)


def test_more_patience_goes_on_with_a_run_that_stopped_early(tiny_text):
    early = ["--training.max_steps=20", "--training.macro_batch=1", "--training.early_stopping.min_delta=100"]
    train(recipe := load_recipe(tiny_text, [*early, "--training.early_stopping.patience=1"]))
    assert max(losses(recipe.folder)) == 2
    train(load_recipe(tiny_text, [*early, "--training.early_stopping.patience=4"]))
    assert max(losses(recipe.folder)) == 5


def test_a_metric_that_changes_forgets_what_was_best(tiny_text):
    train(recipe := load_recipe(tiny_text, ["--checkpoint.keep_last=9"]))
    cut_off(recipe)
    train(load_recipe(tiny_text, ["--checkpoint.metric=grad_norm"]))
    state = json.loads((list_checkpoints(recipe.folder)[-1] / "state.json").read_text())
    assert (state["metric"], state["best"]) == ("grad_norm", state["logged"]["grad_norm"])


def test_a_branch_changes_what_it_says_and_writes_down_from_where(tiny_text, capsys):
    train(recipe := load_recipe(tiny_text, ["--checkpoint.keep_last=9"]))
    first, last = list_checkpoints(recipe.folder)
    change = [f"--training.resume={first}", "--run.name=branch", "--optimizer.lr=0.02", "--training.batch_size=8"]
    change += ["--training.max_steps=9", "--schedule.lr.style=linear", "--optimizer.weight_decay=0.3"]
    change += ["--checkpoint.keep_last=9"]
    train(branch := load_recipe(tiny_text, change))
    out = capsys.readouterr().out
    assert f"branched from {first}" in out and "optimizer.lr: 0.001 -> 0.02" in out
    written = yaml.safe_load((branch.folder / "recipe.yaml").read_text())["branched_from"]
    assert (written["checkpoint"], written["step"], written["sequences"]) == (str(first), 3, 12)
    assert written["changes"] == {
        "optimizer.lr": [0.001, 0.02],
        "optimizer.weight_decay": [0.1, 0.3],
        "schedule.lr.style": ["cosine", "linear"],
        "training.batch_size": [4, 8],
        "training.max_steps": [6, 9],
    }
    assert list(losses(branch.folder)) == [4, 5, 6, 7, 8, 9]
    assert list_checkpoints(recipe.folder) == [first, last]  # the other run is left alone
    assert (branch.folder / "best").is_dir()


def test_a_branch_goes_on_in_the_order_of_samples(tiny_text):
    """The next step of the run and of its branches, with another batch too, begins with the same sample."""
    train(recipe := load_recipe(tiny_text, ["--checkpoint.keep_last=9"]))
    first = list_checkpoints(recipe.folder)[0]
    expected = build_run(*find_run(load_recipe(tiny_text, ["--run.name=whole"]))).loader.indices(4)
    for batch_size in (4, 2, 8):
        options = [f"--training.resume={first}", f"--run.name=of-{batch_size}", f"--training.batch_size={batch_size}"]
        run = build_run(*find_run(load_recipe(tiny_text, options)))
        common = min(batch_size, 4)
        assert run.loader.indices(4)[:common].tolist() == expected[:common].tolist()


def test_a_finished_run_is_made_longer_by_a_branch(tiny_text):
    final = train(load_recipe(tiny_text))
    last = list_checkpoints(final.parent)[-1]
    longer = [f"--training.resume={last}", "--run.name=longer", "--training.max_steps=8"]
    assert list(losses(train(load_recipe(tiny_text, longer)).parent)) == [7, 8]


def test_a_stable_phase_serves_several_decays(tiny_text):
    wsd = ["--schedule.lr.style=wsd", "--schedule.lr.decay_ratio=0.5", "--training.max_steps=12"]
    train(recipe := load_recipe(tiny_text, [*wsd, "--checkpoint.keep_last=9"]))
    stable = list_checkpoints(recipe.folder)[1]
    for steps in (8, 10):
        options = [*wsd, f"--training.resume={stable}", f"--run.name=decay-{steps}", f"--training.max_steps={steps}"]
        assert list(losses(train(load_recipe(tiny_text, options)).parent)) == list(range(7, steps + 1))


def test_a_branch_that_is_killed_resumes_exactly(tiny_text):
    train(recipe := load_recipe(tiny_text, ["--checkpoint.keep_last=9", "--model.dropout=0.2"]))
    first = list_checkpoints(recipe.folder)[0]
    change = ["--model.dropout=0.1", "--optimizer.lr=0.01", "--training.max_steps=9", "--checkpoint.keep_last=9"]
    change += [f"--training.resume={first}"]
    assert faults.run(str(tiny_text), [*change, "--run.name=calm"]) == 0
    for number, name in ((signal.SIGTERM, "early"), (signal.SIGKILL, "late")):
        options = [*change, f"--run.name={name}"]
        process = faults.start(faults.run, str(tiny_text), options)
        folder = recipe.folder.with_name(name)
        while (
            process.exitcode is None and not (folder / "recipe.yaml" if name == "early" else folder / "best").exists()
        ):
            process.join(0.01)
        process.kill() if number == signal.SIGKILL else process.terminate()
        process.join()
        assert faults.run(str(tiny_text), options) == 0
        calm, other = (faults.left_behind(recipe.folder.with_name(run)) for run in ("calm", name))
        assert other["weights"] == calm["weights"] and losses(folder) == losses(recipe.folder.with_name("calm"))
    saved = load_recipe(recipe.folder.with_name("late") / "recipe.yaml")
    cut_off(saved)
    train(saved)  # what a branch wrote resumes it, without naming the checkpoint again
    assert losses(saved.folder) == losses(recipe.folder.with_name("calm"))


def test_a_branch_takes_other_data_of_the_same_tokenizer(tiny_text, tmp_path, text_file):
    train(recipe := load_recipe(tiny_text))
    last = list_checkpoints(recipe.folder)[-1]
    text = text_file.read_text()
    (tmp_path / "other.txt").write_text(text[1000:] + text[:1000])
    options = [f"--training.resume={last}", "--training.max_steps=9", f"--data.data_files={tmp_path / 'other.txt'}"]
    train(branch := load_recipe(tiny_text, [*options, "--run.name=other"]))
    assert list(losses(branch.folder)) == [7, 8, 9]
    assert read_metrics(branch.folder)[-1]["data/visits"] < read_metrics(recipe.folder)[-1]["data/visits"]
    (tmp_path / "other.txt").write_text("abc " * 500)
    with pytest.raises(UserError, match=r"tokenizer: expected the tokenizer of .*: set tokenizer.path"):
        train(load_recipe(tiny_text, [*options, "--run.name=strange"]))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ("--model.hidden_size=32", "training.resume"),
        ("--optimizer.name=muon", "checkpoints"),
        ("--training.max_steps=5", "training.max_steps"),
    ],
)
def test_a_branch_that_does_not_fit_is_refused(tiny_text, change, key):
    train(recipe := load_recipe(tiny_text))
    last = list_checkpoints(recipe.folder)[-1]
    options = [f"--training.resume={last}", "--run.name=branch", "--training.max_steps=9", change]
    with pytest.raises(UserError) as refused:
        train(load_recipe(tiny_text, options))
    assert key in refused.value.problems[0][0]
    assert not (recipe.folder.parent / "branch").exists()


def test_a_diverged_run_says_how_to_branch(tiny_text, monkeypatch):
    calls = iter(range(99))

    def accumulate(accelerator, model, batch):
        loss = step.accumulate(accelerator, model, batch)
        if next(calls) >= 4:
            next(model.parameters()).grad.fill_(float("nan"))
        return loss

    monkeypatch.setattr("cleangpt.training.loop.accumulate", accumulate)
    with pytest.raises(Stopped) as stop:
        train(load_recipe(tiny_text, ["--training.max_skipped=0"]))
    command = str(stop.value).split("add ")[1].split()
    monkeypatch.undo()
    assert train(load_recipe(tiny_text, command)).parent.name == "tiny-2"


def test_a_folder_whose_name_is_like_a_checkpoint_is_the_users(tiny_text):
    train(recipe := load_recipe(tiny_text))
    mine = recipe.folder / "checkpoints" / "step-00000006-keep"
    shutil.copytree(recipe.folder / "checkpoints" / "step-00000006", mine)
    shutil.rmtree(recipe.folder / "final")
    train(load_recipe(tiny_text))
    assert list_checkpoints(recipe.folder) == [recipe.folder / "checkpoints" / "step-00000006"]
    assert (mine / "state.json").is_file()


def test_a_kill_between_two_renames_does_not_restart_the_run(tiny_text):
    """A checkpoint written again is for a moment only there as `.step-N.old`."""
    train(recipe := load_recipe(tiny_text))
    shutil.rmtree(recipe.folder / "final")
    (checkpoint,) = list_checkpoints(recipe.folder)
    checkpoint.rename(checkpoint.with_name(f".{checkpoint.name}.old"))
    assert find_start(recipe).checkpoint == checkpoint
    assert checkpoint.is_dir()


def test_overwrite_does_not_delete_the_checkpoint_to_start_from(tiny_text):
    train(recipe := load_recipe(tiny_text))
    (checkpoint,) = list_checkpoints(recipe.folder)
    with pytest.raises(UserError, match=r"run\.overwrite: would delete"):
        train(load_recipe(tiny_text, ["--run.overwrite=true", f"--training.resume={checkpoint}"]))
    assert checkpoint.is_dir()


def test_one_recipe_serves_two_runs_and_other_data(tiny_text, text_file):
    train(recipe := load_recipe(tiny_text))
    before = load_file(recipe.folder / "final" / "model.safetensors")
    again = recipe.changed(run={"name": "again"})
    after = load_file(train(again) / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    text = text_file.read_text()
    try:
        text_file.write_text("Other text, in the same file. " * 100)
        assert train(again.changed(run={"name": "other"})).is_dir()
    finally:
        text_file.write_text(text)
    with pytest.raises(ValueError, match="frozen"):
        recipe.training.max_steps = 3
    with pytest.raises(TypeError, match="immutable"):
        recipe.model["hidden_size"] = 3
