"""The scripts, as a user runs them."""

import json

import pytest
from conftest import read_metrics, run_python

from cleangpt import load_recipe, train


@pytest.fixture
def trained(tiny_text):
    recipe = load_recipe(tiny_text)
    train(recipe)
    return recipe.folder


def test_generate_continues_a_prompt_the_same_way_for_the_same_seed(trained):
    arguments = ("scripts/generate.py", trained / "final", "--prompt", "The fox", "--max_new_tokens=5", "--seed=1")
    one, other = run_python(*arguments), run_python(*arguments)
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("The fox")
    assert one.stdout == other.stdout


@pytest.mark.parametrize(
    ("prompt", "message"), [("", "expected some text"), ("ü", "lacks"), ("x" * 40, "expected less than")]
)
def test_generate_refuses_what_the_model_cannot_read(trained, prompt, message):
    done = run_python("scripts/generate.py", trained / "final", "--prompt", prompt)
    assert done.returncode == 2
    assert message in done.stderr


def test_evaluation_of_the_saved_model_is_that_of_the_run(trained):
    done = run_python("scripts/evaluate_model.py", trained / "final", "--recipe", trained / "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    last = read_metrics(trained)[-1]
    for key, value in json.loads(done.stdout).items():
        assert value == pytest.approx(last[key], abs=1e-6), key


def test_a_model_of_another_recipe_is_refused(trained, tiny_adder):
    done = run_python("scripts/evaluate_model.py", trained / "final", "--recipe", tiny_adder)
    assert done.returncode == 2
    assert "tokenizer" in done.stderr
