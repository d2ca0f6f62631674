"""Sweeps: the runs of a grid, killed and gone on with, and verdicts that are wrong as seldom as they say."""

import re
import subprocess
import sys
import time

import numpy as np
import pandas
import psutil
import pytest
from conftest import ROOT
from test_docs import run

from cleangpt import UserError, load_recipe, train
from cleangpt.sweep import collect, compare, holm, make_cells, open_sweep, train_quietly, verdict
from cleangpt.training.checkpoint import list_checkpoints

GRID = ["optimizer.lr=1e-2,3e-2", "model.hidden_size=16,32"]


def problems_of(function, *arguments) -> list[tuple[str, str]]:
    with pytest.raises(UserError) as error:
        function(*arguments)
    return error.value.problems


def test_every_combination_is_a_cell_with_the_same_seeds(tiny_text, tmp_path):
    cells = make_cells(tiny_text, GRID, ["--run.seeds=[1,2]"])
    assert [*cells] == [f"lr{lr}-hidden_size{width}" for lr in ("1e-2", "3e-2") for width in (16, 32)]
    one = cells["lr3e-2-hidden_size16"].runs[1]
    assert (one.optimizer.lr, one.model["hidden_size"], one.run.seed) == (0.03, 16, 2)
    assert one.folder == tmp_path / "outputs" / "tiny-sweep" / "lr3e-2-hidden_size16-seed2"
    assert one.tracking.group == "tiny-sweep"


def test_a_comma_inside_brackets_belongs_to_the_value(tiny_text):
    cells = make_cells(tiny_text, ["optimizer.betas=[0.9,0.95],[0.8,0.99]"])
    assert [cell.runs[0].optimizer.betas for cell in cells.values()] == [(0.9, 0.95), (0.8, 0.99)]


def test_the_mistakes_of_all_cells_are_told_at_once_and_once(tiny_text):
    grid = ["optimizer.lr=1e-2,fast", "training.batch_sise=2,4", "run.seed=1,2", "model.n_layer=1,1"]
    problems = problems_of(make_cells, tiny_text, grid)
    assert [key for key, _ in problems] == ["--grid", "--grid", "training.batch_sise", "optimizer.lr"]
    assert problems[2:] == [
        ("training.batch_sise", "unknown key, did you mean batch_size?"),
        ("optimizer.lr", "expected a number above 0, got 'fast'"),
    ]


def test_the_folder_of_another_sweep_is_refused_by_key(tiny_text):
    cells = make_cells(tiny_text, GRID, ["--run.seeds=[1,2]"])
    folder = open_sweep(cells)
    open_sweep(make_cells(tiny_text, GRID[:1]))  # nothing has run yet
    open_sweep(cells)
    (folder / "a-run").mkdir()
    (folder / "a-run" / "recipe.yaml").touch()
    open_sweep(make_cells(tiny_text, GRID, ["--run.seeds=[1,2,3]", "--checkpoint.metric=train/loss"]))
    ((key, message),) = problems_of(open_sweep, make_cells(tiny_text, ["optimizer.lr=1e-2", GRID[1]]))
    assert key == "--grid" and "lr3e-2-hidden_size16" in message and "--run.name=NAME" in message
    ((key, message),) = problems_of(open_sweep, make_cells(tiny_text, GRID, ["--evaluation.max_batches=1"]))
    assert key == "evaluation.max_batches" and "got 1;" in message
    open_sweep(make_cells(tiny_text, GRID[:1], ["--run.overwrite=true"]))
    assert not (folder / "a-run").exists()


def test_cells_branch_from_one_checkpoint_and_one_that_diverges_leaves_the_others(tiny_text, monkeypatch):
    train(stable := load_recipe(tiny_text, ["--training.max_steps=3"]))
    (checkpoint,) = list_checkpoints(stable.folder)
    options = [f"--training.resume={checkpoint}", "--training.max_skipped=0", "--run.seeds=[1,2]"]
    cells = make_cells(tiny_text, ["optimizer.lr=1e-2,1e38"], options)
    open_sweep(cells)
    assert [train_quietly(one) for cell in cells.values() for one in cell.runs] == [0, 0, 1, 1]
    results = collect(cells)
    assert results.cell.tolist() == ["lr1e-2"] * 2 and results.seed.tolist() == [1, 2]
    assert results["eval/loss"].nunique() == 2 and results.step.tolist() == [6, 6]
    log = cells["lr1e-2"].runs[1].folder.with_name("lr1e-2-seed2.log").read_text()
    assert f"branched from {checkpoint}" in log
    arguments = [str(tiny_text), "--grid", "optimizer.lr=1e-2,1e38", "--report", *options]
    assert "no seed that both have finished" in run("scripts/sweep.py", arguments, monkeypatch)


@pytest.mark.parametrize("kills", [1, pytest.param(3, marks=pytest.mark.soak)])
def test_a_killed_sweep_ends_with_the_same_table(kills, tiny_text, monkeypatch):
    """Killed without warning, each time in another run: no process lives on, and the runs go on where they were."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = [str(tiny_text), "--grid", "optimizer.lr=1e-2,3e-2"]
    options += ["--training.max_steps=24", "--checkpoint.keep_last=8"]  # 32 checkpoints in all
    killed, calm = [*options, "--seeds=2", "--run.name=killed"], [*options, "--seeds=2", "--run.name=calm"]
    cells = make_cells(tiny_text, [options[2]], [*options[3:], "--run.name=calm", "--run.seeds=[1,2]"])
    open_sweep(cells)
    assert not any(train_quietly(one) for cell in cells.values() for one in cell.runs)
    folder = tiny_text.parent / "outputs" / "killed-sweep"
    command = [sys.executable, ROOT / "scripts" / "sweep.py", *killed, "--jobs=2"]
    for kill in range(1, kills + 1):
        with subprocess.Popen(command, stdout=subprocess.DEVNULL) as sweep:
            while len([*folder.glob("*/checkpoints/step-*")]) < 6 * kill:
                assert sweep.poll() is None
                time.sleep(0.02)
            children = psutil.Process(sweep.pid).children(recursive=True)
            sweep.kill()
        gone, alive = psutil.wait_procs(children, timeout=30)
        assert len(gone) >= 2 and not alive
        assert len([*folder.glob("*/final")]) < 4
    told = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    assert "resuming from step" in "".join(log.read_text() for log in folder.glob("*.log"))
    quiet = run("scripts/sweep.py", [*calm, "--report"], monkeypatch)
    assert [table_of(told)] == [table_of(quiet)] and "p = " in told
    one, other = (pandas.read_csv(folder.with_name(f"{name}-sweep") / "results.csv") for name in ("killed", "calm"))
    timed = ["elapsed_s", "tokens_per_second", "mfu"]
    pandas.testing.assert_frame_equal(one.drop(columns=timed), other.drop(columns=timed), check_exact=True)
    assert (folder / "sweep.png").stat().st_size > 5000


def table_of(told: str) -> list[str]:
    """The lines of a table without the seconds."""
    return [re.sub(r"^(lr\S+ .*? 2 ) +\S+", r"\1", line) for line in told.splitlines() if line.startswith("lr")]


def test_equal_cells_seem_to_differ_in_one_sweep_of_twenty():
    random = np.random.default_rng(0)
    found = [compare(pandas.DataFrame(random.normal(size=(5, 2)))).p[1] < 0.05 for _ in range(200)]
    assert 4 <= sum(found) <= 16  # 10 ± 3 by chance
    several = [compare(pandas.DataFrame(random.normal(size=(5, 4)))).p.min() < 0.05 for _ in range(200)]
    assert sum(several) <= 16


def test_a_difference_of_two_spreads_is_found():
    random = np.random.default_rng(0)
    values = (random.normal(size=(200, 8, 2)) * 0.01 + [3, 2.98]).transpose(0, 1, 2)
    assert np.mean([compare(pandas.DataFrame(one)).p[1] < 0.05 for one in values]) > 0.85


def test_interval_and_p_are_those_of_students_own_example():
    """Hours of sleep that ten patients gained by two drugs (Student, 1908), with what R's `t.test` says of them."""
    one = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    two = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    row = compare(pandas.DataFrame({"one": one, "two": two})).loc["two"]
    found = row.difference - row.difference_interval, row.difference + row.difference_interval, row.p
    assert found == pytest.approx((0.7001142, 2.4598858, 0.002833), rel=1e-4)
    assert verdict(row) == "1.6 ± 0.9 higher, p = 0.0028, 10 seeds"


def test_p_is_corrected_for_the_number_of_comparisons():
    corrected = holm(pandas.Series([np.nan, 0.04, 0.01, 0.03, 0.02]))
    np.testing.assert_allclose(corrected, [np.nan, 0.06, 0.04, 0.06, 0.06])


def test_only_seeds_that_both_cells_have_are_compared():
    values = pandas.DataFrame({"one": [1.0, 2.0, 3.0, np.nan], "two": [1.5, 2.6, np.nan, 9.0]})
    row = compare(values).loc["two"]
    assert (row.seeds, row.pairs) == (3, 2) and row.difference == pytest.approx(0.55)


@pytest.mark.parametrize(
    ("two", "words"),
    [
        ([1.5], "0.5000 higher, 1 seed; no p: one seed has no spread"),
        ([0.5, 1.5], "0.5000 lower, 2 seeds; no p: no spread between the seeds"),
        ([1.0, 2.0], "the same, 2 seeds; no p: no spread between the seeds"),
        ([np.nan, np.nan], "no seed that both have finished"),
        ([0.9, 1.9 + 1e-6], "0.100000 ± 0.000006 lower, p < 0.0001, 2 seeds"),
    ],
)
def test_a_verdict_without_a_spread_has_no_p_and_says_why(two, words):
    one = [1.0, 2.0][: len(two)]
    assert verdict(compare(pandas.DataFrame({"one": one, "two": two})).loc["two"]) == words
