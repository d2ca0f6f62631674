"""The model card: valid metadata, examples that run, the run's report with its picture."""

import re

import pytest
import yaml
from conftest import run_python
from huggingface_hub import ModelCard

from cleangpt import load_recipe, train
from cleangpt.reporting.card import dataset_license, train_command, without_paths


@pytest.mark.parametrize("kind", ["tiny_text", "tiny_adder"])
def test_the_card_is_valid_and_its_examples_run(kind, request):
    final = train(load_recipe(request.getfixturevalue(kind)))
    card = ModelCard.load(final / "README.md")
    assert card.data.library_name == "transformers"
    assert {result.metric_type for result in card.data.eval_results} >= {"loss", "perplexity"}
    blocks = re.findall(r"```python\n(.*?)```", card.text, re.DOTALL)
    assert len(blocks) == 2 and "import cleangpt" in blocks[0]
    for code in (blocks[0], "import sys\n" + blocks[1] + "print('cleangpt' not in sys.modules)"):
        done = run_python("-c", code)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() and "False" not in done.stdout


@pytest.mark.parametrize("kind", ["tiny_text", "tiny_adder"])
def test_the_card_of_the_final_model_reports_the_run(kind, request, tmp_path):
    recipe = load_recipe(request.getfixturevalue(kind))
    final = train(recipe)
    text = (final / "README.md").read_text()
    assert "](curves.png)" in text and (final / "curves.png").read_bytes().startswith(b"\x89PNG")
    resolved = yaml.safe_dump(
        without_paths(yaml.safe_load((recipe.folder / "recipe.yaml").read_text())), sort_keys=False, allow_unicode=True
    )
    assert str(tmp_path) not in resolved
    for part in ("What it writes:", "| hardware |", "| seconds |", "python train.py", "## Limitations", resolved):
        assert part in text
    assert "licence" in text
    best = (recipe.folder / "best" / "README.md").read_text()
    assert "curves.png" not in best and f"{recipe.folder / 'best'}" in best


def test_another_architecture_has_a_card_of_its_own(tiny_adder):
    options = ["--model.model_type=qwen3", "--model.intermediate_size=32", "--model.num_key_value_heads=1"]
    text = (train(load_recipe(tiny_adder, [*options, "--model.head_dim=8"])) / "README.md").read_text()
    assert "plain qwen3" in text and "import cleangpt" not in text


def test_a_licence_that_cannot_be_asked_for_is_unknown():
    assert dataset_license("someone/something") is None


def test_no_path_of_this_machine_is_in_recipe_or_command(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    files = [f"{tmp_path}/texts/a.txt", "/home/me/b.txt", "~/c.txt", "../d.txt", "e/f.txt", "https://host/g.txt"]
    shared = ["texts/a.txt", "b.txt", "c.txt", "d.txt", "e/f.txt", "https://host/g.txt"]
    recipe = {"data": {"data_files": files, "template": "/{a}"}, "run": {"output_dir": "/mnt/outputs", "seed": 42}}
    assert without_paths(recipe) == {
        "data": {"data_files": shared, "template": "/{a}"},
        "run": {"output_dir": "outputs", "seed": 42},
    }
    options = ["--run.output_dir=/mnt/my outputs", "--data.data_files=[/home/me/b.txt, e.txt]", "--optimizer.lr=1e-3"]
    monkeypatch.setattr("sys.argv", ["/opt/cleangpt/train.py", "/home/me/mine.yaml", *options])
    expected = "python train.py mine.yaml '--run.output_dir=my outputs' '--data.data_files=[b.txt, e.txt]'"
    assert train_command(1) == f"{expected} --optimizer.lr=1e-3"
