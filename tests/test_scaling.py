"""Scaling: runs of equal compute, found again, and a recipe proposed for another budget."""

import shlex
import shutil

import pandas
import pytest
import yaml
from conftest import read_metrics
from test_docs import run
from test_sweep import problems_of
from transformers import AutoModelForCausalLM

from cleangpt import load_recipe
from cleangpt.law import fit_law, predict
from cleangpt.models.statistics import flops_per_token
from cleangpt.scaling import best_width, collect, load_fit, make_runs, open_family
from cleangpt.sweep import train_quietly
from cleangpt.training.checkpoint import list_checkpoints

BUDGETS, SIZES = ["1e7", "2e7"], ["8", "16", "24"]
COMMAND = ["--budgets", *BUDGETS, "--sizes", *SIZES]
SMALL = {"model_type": "nanogpt", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def scaled(tmp_path_factory, text_file):
    """A recipe whose six runs are trained and fitted; what the script printed."""
    folder = tmp_path_factory.mktemp("scaled")
    sections = {
        "run": {"output_dir": str(folder / "outputs")},
        "data": {"path": "text", "data_files": str(text_file), "block_size": 16},
        "tokenizer": {"train": {"kind": "char"}},
        "model": SMALL,
        "training": {"max_steps": 6, "batch_size": 4},
        "checkpoint": {"keep_last": 4},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(sections))
    family, runs = make_runs(path, BUDGETS, SIZES)
    family.claim()
    assert not any(map(train_quietly, runs.values()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fit_law, "__defaults__", (10,))  # samples
        told = run("scripts/scaling.py", [str(path), *COMMAND], patch)
    return path, family, runs, told


def test_every_run_of_a_budget_costs_the_same_within_a_step(tiny_text):
    family, runs = make_runs(tiny_text, ["1e8", "1e9"], [], ["--schedule.accumulation={style: linear, end: 3}"])
    assert [*runs][:3] == ["8-1e8", "16-1e8", "24-1e8"]
    for name, one in runs.items():
        width, budget = name.split("-")
        spent = family.sequences(one.training.max_steps) * family.cost(int(width)).flops
        assert abs(spent - float(budget)) <= 3 * 4 * family.cost(int(width)).flops
        assert one.model["hidden_size"] == int(width) and one.folder.parent == family.folder


def test_a_width_keeps_what_the_heads_and_the_mlp_are_to_it(tiny_text):
    llama = ["--model.model_type=nanollama", "--model.num_attention_heads=4", "--model.num_key_value_heads=2"]
    family, runs = make_runs(tiny_text, ["1e8", "2e8"], ["8", "16", "40"], [*llama, "--model.intermediate_size=30"])
    assert family.unit == 8
    shape = [runs["40-1e8"].model[key] for key in ("num_attention_heads", "num_key_value_heads", "intermediate_size")]
    assert shape == [10, 5, 75]
    assert runs["40-1e8"].model["num_hidden_layers"] == 1


def test_runs_are_ordinary_ones_that_evaluate_at_their_end(scaled):
    _, family, runs, _ = scaled
    assert {path.name for path in family.folder.iterdir() if path.is_dir()} == {*runs}
    lines = read_metrics(runs["16-2e7"].folder)
    assert [line["step"] for line in lines if "eval/loss" in line] == [runs["16-2e7"].training.max_steps]
    assert {"runs.csv", "fit.json", "scaling.png", "scaling.yaml"} <= {path.name for path in family.folder.iterdir()}


def test_a_row_has_the_figures_of_its_run(scaled):
    _, family, runs, _ = scaled
    table = pandas.read_csv(family.folder / "runs.csv").set_index("run")
    row, folder = table.loc["24-1e7"], runs["24-1e7"].folder
    model, last = AutoModelForCausalLM.from_pretrained(folder / "final"), read_metrics(folder)[-1]
    assert row.parameters == model.num_parameters()
    assert (row.tokens, row.loss) == (last["tokens"], last["eval/loss"])
    assert row.flops == flops_per_token(model) * last["tokens"]


def test_finished_runs_are_found_and_a_stopped_one_goes_on(scaled, tmp_path, monkeypatch):
    path, family, _, told = scaled
    assert f"{family.folder}: 6 runs, 0 of them to be trained" in told
    shutil.copytree(family.folder, tmp_path / "tiny-scaling")
    elsewhere = [str(path), *COMMAND, f"--run.output_dir={tmp_path}"]
    stopped = tmp_path / "tiny-scaling" / "16-2e7"
    shutil.rmtree(stopped / "final")
    for checkpoint in list_checkpoints(stopped)[:2]:  # the newest
        shutil.rmtree(checkpoint)
    monkeypatch.setattr(fit_law, "__defaults__", (10,))
    again = run("scripts/scaling.py", elsewhere, monkeypatch)
    assert "6 runs, 1 of them to be trained" in again
    assert "resuming from step" in (tmp_path / "tiny-scaling" / "16-2e7.log").read_text()
    one, other = (pandas.read_csv(folder / "runs.csv") for folder in (family.folder, tmp_path / "tiny-scaling"))
    pandas.testing.assert_frame_equal(one.drop(columns="seconds"), other.drop(columns="seconds"), check_exact=True)


def test_what_a_fit_lacks_is_told_and_nothing_is_trained(scaled, tmp_path, monkeypatch):
    path, *_ = scaled
    told = run("scripts/scaling.py", [str(path), *COMMAND, "--report", f"--run.output_dir={tmp_path}"], monkeypatch)
    assert "no fit: a fit needs 6 runs (finished: 0), 3 sizes (finished: 0), 2 budgets (finished: 0)" in told
    assert not (tmp_path / "tiny-scaling").exists()


def test_a_plan_proposes_the_recipe_that_spends_a_budget_best(scaled, monkeypatch):
    path, family, *_ = scaled
    told = run("scripts/plan.py", [str(path), "--budget=1e8", "--no_measurement"], monkeypatch)
    command = next(line for line in told.splitlines() if "train.py" in line)
    proposed = load_recipe(path, shlex.split(command)[shlex.split(command).index(str(path)) + 1 :])
    width, cost = proposed.model["hidden_size"], family.cost(proposed.model["hidden_size"])
    assert 0 <= family.sequences(proposed.training.max_steps) * cost.flops - 1e8 < 4 * cost.flops
    assert width == best_width(family, load_fit(family).law, 1e8)
    assert f"{cost.parameters:,} parameters" in told and f"{proposed.training.max_steps:,}" in told
    assert "ten times" not in told
    far = run("scripts/plan.py", [str(path), "--budget=3e8", "--no_measurement"], monkeypatch)
    assert "warning: --budget: the fit knows 1e7 to 2e7 FLOPs, and 3e8 lies more than ten times beyond" in far


def test_the_best_width_is_that_of_the_least_loss(tiny_text):
    family, law = open_family(tiny_text), [1.0, 30.0, 0.4, 50.0, 0.4]
    costs = {width: family.cost(width) for width in range(8, 400, 8)}
    losses = {width: predict(law, one.parameters, 1e11 / one.flops * 16) for width, one in costs.items()}
    assert 8 < best_width(family, law, 1e11) == min(losses, key=losses.get) < 392


def test_a_fit_of_another_recipe_or_none_is_refused(scaled, tiny_text):
    path, *_ = scaled
    ((key, message),) = problems_of(load_fit, open_family(tiny_text))
    assert key == "--budget" and "scripts/scaling.py RECIPE --budgets" in message
    ((key, message),) = problems_of(load_fit, open_family(path, ["--optimizer.lr=0.5"]))
    assert key == "optimizer.lr" and "got 0.5" in message and "--run.name=NAME" in message


def test_budgets_and_sizes_may_be_added_in_the_same_folder(scaled):
    path, _, runs, _ = scaled
    wider, more = make_runs(path, [*BUDGETS, "4e7"], [*SIZES, "32"])
    wider.claim()
    assert len(more) == 12 and collect(wider, more).run.tolist() == [*runs]


@pytest.mark.parametrize(
    ("budgets", "sizes", "overrides", "mistakes"),
    [
        (["much", "0"], [], [], ["--budgets: expected a number of FLOPs above 0, 1e13 say, got 'much'", "got '0'"]),
        (["nan", "inf"], [], ["--optimizer.lr=fast"], ["got 'nan'", "got 'inf'", "optimizer.lr: expected a number"]),
        (["1e8"], ["8", "12", "x"], [], ["--sizes: expected multiples of 8, where", "got 'x'"]),
        (["1e8", "1e8"], ["8", "16"], [], ["--sizes: expected at least 3", "--budgets: expected at least 2, all diff"]),
        (["1e3", "1e8"], [], [], ["--budgets: expected at least a step at width 32, got 1000 FLOPs"]),
        (["1e8", "1e9"], [], ["--training.max_steps=9"], ["training.max_steps: remove it, the budget decides"]),
        (["1e8", "1e9"], [], ["--run.seeds=[1,2]", "--model.init_from=x"], ["run.seeds: expected null", "model.init_"]),
    ],
)
def test_mistakes_are_told_before_the_first_run(budgets, sizes, overrides, mistakes, tiny_text, tmp_path):
    lines = [f"{key}: {message}" for key, message in problems_of(make_runs, tiny_text, budgets, sizes, overrides)]
    for line, mistake in zip(lines, mistakes, strict=True):
        assert mistake in line
    assert not (tmp_path / "outputs").exists()


def test_arithmetic_counts_its_answers_as_targets(tiny_adder):
    family, runs = make_runs(tiny_adder, ["1e7", "2e7"], ["8", "16", "24"])
    assert family.cost(16).targets == 3  # of 8+5=31 the answer and the end
    family.claim()
    assert train_quietly(runs["16-1e7"]) == 0
    (tokens,) = collect(family, runs).tokens
    assert tokens == 3 * 8 * runs["16-1e7"].training.max_steps
