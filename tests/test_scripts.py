"""The scripts, as a user runs them."""

import json
from pathlib import Path

import pytest
from conftest import ROOT, read_metrics, run_python
from transformers import AutoTokenizer

from cleangpt import load_recipe, train
from cleangpt.tokenization import arithmetic_tokenizer, character_tokenizer


@pytest.fixture
def stories_recipe(write_recipe, stories_file):
    return write_recipe(
        data={"path": "json", "data_files": str(stories_file), "block_size": 16},
        tokenizer={"train": {"kind": "bpe", "vocab_size": 300}},
        model={"model_type": "nanogpt"},
        training={"max_steps": 1},
    )


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


def test_data_is_prepared_without_training(stories_recipe, tmp_path):
    done = run_python("scripts/prepare_data.py", stories_recipe)
    assert done.returncode == 0, done.stderr
    assert "36" in done.stdout and "tokens per document of train: min" in done.stdout
    picture = Path(done.stdout.split("lengths drawn in ")[1].strip())
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert not (tmp_path / "outputs").exists()


def test_a_tokenizer_is_made_again_byte_for_byte(stories_recipe, tmp_path):
    for name in ("one", "other"):
        environment = {"HF_HOME": str(tmp_path / f"cache-{name}")}  # trained twice, not found in a cache
        done = run_python("scripts/train_tokenizer.py", stories_recipe, tmp_path / name, **environment)
        assert done.returncode == 0, done.stderr
    for file in (tmp_path / "one").iterdir():
        assert file.read_bytes() == (tmp_path / "other" / file.name).read_bytes()


def test_the_shipped_tokenizers_are_what_the_script_makes(tmp_path):
    arithmetic_tokenizer().save_pretrained(tmp_path / "arithmetic")
    shakespeare = AutoTokenizer.from_pretrained(ROOT / "tokenizers" / "shakespeare")
    character_tokenizer(shakespeare.decode(range(65))).save_pretrained(tmp_path / "shakespeare")
    for name in ("arithmetic", "shakespeare"):
        for file in (ROOT / "tokenizers" / name).iterdir():
            assert file.read_bytes() == (tmp_path / name / file.name).read_bytes(), file
