"""The scripts, as a user runs them."""

import json
import runpy
import sys
import types
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_metrics, run_command, run_python
from transformers import AutoTokenizer, GenerationMixin

from cleangpt import load_recipe, train
from cleangpt.data.tokenization import arithmetic_tokenizer, character_tokenizer
from cleangpt.errors import exit_code


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


@pytest.fixture
def call_script(monkeypatch, capsys):
    """Runs a script in this process, which starts no Python; returns exit code, stdout, stderr."""

    def call(name: str, *arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        capsys.readouterr()
        code = exit_code(runpy.run_path(str(ROOT / "scripts" / name))["main"])
        return code, *capsys.readouterr()

    return call


def test_generate_continues_a_prompt_the_same_way_for_the_same_seed(trained):
    arguments = ("scripts/generate.py", trained / "final", "--prompt", "The fox", "--max_new_tokens=5", "--seed=1")
    one, other = run_python(*arguments), run_python(*arguments)
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("The fox")
    assert one.stdout == other.stdout


def test_generate_streams_past_the_context(trained, call_script):
    """The model has 16 positions."""
    code, out, err = call_script("generate.py", trained / "final", "--prompt=The fox", "--max_new_tokens=60")
    assert code == 0, err
    assert out.startswith("The fox") and 30 < len(out) <= len("The fox") + 61


@pytest.mark.parametrize("script", ["generate.py", "demo.py"])
def test_generation_is_on_the_accelerator(script, trained, call_script, monkeypatch):
    """On `meta`, which gives no numbers: the model is there, and so is what it gets."""
    seen = []

    def generate(model, ids, **options):
        seen.append((model.device.type, ids.device.type))
        return ids

    monkeypatch.setattr("cleangpt.hardware.default_device", lambda: torch.device("meta"))
    monkeypatch.setattr(GenerationMixin, "generate", generate)
    monkeypatch.setitem(sys.modules, "gradio", types.ModuleType("gradio"))
    if script == "generate.py":
        assert call_script(script, trained / "final", "--prompt", "The fox")[0] == 0
    else:
        demo = runpy.run_path(str(ROOT / "scripts" / script))
        model, tokenizer = demo["load"](str(trained / "final"))
        list(demo["continue_text"](model, tokenizer, "The fox", 5, 1.0, 0, 1))
    assert seen == [("meta", "meta")]


def test_generate_reads_a_prompt_from_a_file(trained, tmp_path, call_script):
    (tmp_path / "prompt.txt").write_text("The fox")
    options = ["--prompt_file", tmp_path / "prompt.txt", "--top_p=0.9"]
    code, out, err = call_script("generate.py", trained / "final", *options)
    assert code == 0, err
    assert out.startswith("The fox")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt="], "--prompt: expected some text"),
        (["--prompt=ü"], "--prompt: has characters that the model's tokenizer lacks"),
        (["--prompt_file=nowhere.txt"], "--prompt_file: expected a text file, got nowhere.txt"),
        (["--prompt=The", "--top_p=2"], "--top_p: expected a number above 0, up to 1, got 2.0"),
        (["--prompt=The", "--num_samples=0"], "--num_samples: expected a whole number from 1, got 0"),
        (["--prompt=The", "--seed=-1"], "--seed: expected a whole number from 0 to 2^63 - 1, got -1"),
    ],
)
def test_generate_refuses_what_it_cannot_do(trained, options, message, call_script):
    code, _, err = call_script("generate.py", trained / "final", *options)
    assert (code, err) == (2, f"error: {message}\n")


def test_evaluation_of_the_saved_model_is_that_of_the_run(trained):
    done = run_python("scripts/evaluate_model.py", trained / "final", "--recipe", trained / "recipe.yaml", "--json")
    assert done.returncode == 0, done.stderr
    last = read_metrics(trained)[-1]
    for key, value in json.loads(done.stdout).items():
        assert value == pytest.approx(last[key], abs=1e-6), key


def test_answers_are_graded_the_same_on_two_processes(tiny_adder, tmp_path, call_script):
    final = train(load_recipe(tiny_adder, ["--training.max_steps=100", "--optimizer.lr=0.01"]))
    arguments = ["scripts/evaluate_model.py", final, "--recipe", tiny_adder, "--evaluation.batch_size=4", "--limit=13"]
    torchrun = Path(sys.executable).with_name("torchrun")
    two = run_command(torchrun, "--nproc_per_node=2", *arguments, f"--report={tmp_path}/report")
    assert two.returncode == 0, two.stderr
    _, one, _ = call_script("evaluate_model.py", *arguments[1:], "--json")
    for name, value in json.loads(one).items():
        assert f"{name:20} {value:.4f}\n" in two.stdout
    assert "carries" in two.stdout and "13 of 16 problems" in two.stdout
    assert (tmp_path / "report" / "accuracy.png").read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "report" / "wrong_answers.csv").read_text().startswith("question,answer,right\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--split=tset"], "--split: expected one of train, validation, test, got 'tset'"),
        (["--limit=0"], "--limit: expected 1 to 16, got 0"),
        ([f"--report={__file__}"], f"--report: expected a folder, got the file {__file__}"),
        (["--lengths", "0"], "--lengths: expected whole numbers from 1, got 0"),
        (
            ["--data.num_digits=2"],
            "data.num_digits: expected sequences of at most the model's 6 positions, these have 9",
        ),
    ],
)
def test_what_cannot_be_graded_is_told(tiny_adder, options, message, call_script):
    final = train(load_recipe(tiny_adder))
    code, _, err = call_script("evaluate_model.py", final, "--recipe", tiny_adder, *options)
    assert (code, err) == (2, f"error: {message}\n")


def test_a_rotary_model_may_be_asked_for_more_than_it_was_trained_on(tiny_adder, call_script):
    final = train(load_recipe(tiny_adder, ["--model.model_type=nanollama"]))
    longer = ["--recipe", tiny_adder, "--data.num_digits=2", "--limit=50"]
    code, out, err = call_script("evaluate_model.py", final, *longer)
    assert code == 0, err
    assert "50 of 1,500 problems" in out


def test_accuracy_over_length_is_that_of_each_length_alone(tiny_adder, tmp_path, call_script):
    final = train(load_recipe(tiny_adder, ["--model.model_type=nanollama", "--training.max_steps=60"]))
    options = [final, "--recipe", tiny_adder, "--limit=5"]
    code, out, err = call_script("evaluate_model.py", *options, "--lengths", 1, 3, f"--report={tmp_path}/report")
    assert code == 0, err
    lengths = ["--data.min_digits=3", "--data.num_digits=3", "--json"]
    alone = json.loads(call_script("evaluate_model.py", *options, *lengths)[1])["eval/accuracy"]
    assert out.splitlines()[-1] == f"   3 digits, 5 problems: accuracy {alone:.4f}"
    assert (tmp_path / "report/lengths.png").read_bytes().startswith(b"\x89PNG")


def test_a_model_without_tokenizer_must_know_the_ids(tiny_adder, call_script):
    final = train(load_recipe(tiny_adder, ["--model.vocab_size=20"]))
    for file in final.glob("*token*"):
        file.unlink()
    code, out, err = call_script("evaluate_model.py", final, "--recipe", tiny_adder)
    assert code == 0, err
    assert "eval/accuracy" in out


def test_a_model_of_another_recipe_is_refused(trained, tiny_adder, call_script):
    code, _, err = call_script("evaluate_model.py", trained / "final", "--recipe", tiny_adder)
    assert (code, err) == (2, f"error: model: the tokenizer of {trained / 'final'} is not the one of {tiny_adder}\n")


@pytest.mark.parametrize("script", ["train_tokenizer.py", "export.py"])
def test_a_file_in_the_way_is_told(script, trained, tmp_path, call_script):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / ("" if script == "train_tokenizer.py" else "below")
    source = trained / ("recipe.yaml" if script == "train_tokenizer.py" else "final")
    code, _, err = call_script(script, source, out)
    assert code == 2 and err.startswith(f"error: {out}: ") and err.count("\n") == 1
    assert (tmp_path / "file").read_text() == "mine"


def test_data_is_prepared_without_training(stories_recipe, tmp_path):
    done = run_python("scripts/prepare_data.py", stories_recipe)
    assert done.returncode == 0, done.stderr
    assert "36" in done.stdout and "tokens per document of train: min" in done.stdout
    picture = Path(done.stdout.split("lengths drawn in ")[1].splitlines()[0])
    assert f'datasets.load_from_disk("{picture.parent}")' in done.stdout
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


def test_a_folder_that_holds_other_things_is_no_place_for_a_tokenizer(trained, call_script):
    before = {path: path.read_bytes() for path in (trained / "final").iterdir()}
    code, _, errors = call_script("train_tokenizer.py", trained / "recipe.yaml", trained / "final")
    assert code == 2 and "which has no README.md" in errors
    assert before == {path: path.read_bytes() for path in (trained / "final").iterdir()}


@pytest.mark.parametrize(
    "command", [["generate.py", "--prompt=a"], ["export.py", "out"], ["push_to_hub.py", "me/tiny"]]
)
def test_a_runs_folder_in_place_of_a_models_is_told(trained, command, call_script):
    script, *rest = command
    code, _, errors = call_script(script, trained, *rest)
    assert code == 2 and f"use {trained / 'final'}" in errors and errors.count("\n") == 1


def test_all_files_of_a_model_are_readable_alike(trained):
    assert len({path.stat().st_mode for path in (trained / "final").iterdir()}) == 1


def test_a_model_writes_without_a_warning_about_lengths(trained):
    final = str(trained / "final")
    code = f"""
import cleangpt, transformers
writer = transformers.pipeline("text-generation", {final!r})
print(writer("The fox"), writer("The fox", max_new_tokens=5))
"""
    done = run_python("-c", code)
    assert done.returncode == 0 and "max_" not in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("options", "largest"),
    [
        (["--model.intermediate_size=8192"], "MLP"),
        (["--model.hidden_size=256", "--model.intermediate_size=1", "--data.block_size=32"], "attention"),
        (["--data.block_size=1", "--training.batch_size=1", "--optimizer.name=muon"], "optimizer"),
    ],
)
def test_a_profile_finds_what_takes_the_time(options, largest, tiny_text, tmp_path, call_script):
    trace = tmp_path / "trace.json"
    code, out, _ = call_script("profile_run.py", tiny_text, "--trace", trace, *options)
    shares = {line[:22].strip(): float(line[22:33]) for line in out.splitlines()[1:-2]}
    computed = {part: share for part, share in shares.items() if part != "loop"}  # which waits where others compute too
    assert code == 0 and max(computed, key=computed.get) == largest and min(shares.values()) > 0
    assert list(shares) == [*("attention", "MLP", "embeddings and norms", "head and loss", "optimizer", "data", "loop")]
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("optimizer") == names.count("data") == 6
    assert not (tmp_path / "outputs").exists()


def test_the_picture_of_the_records_has_every_line_of_their_table(tmp_path):
    picture = tmp_path / "records.png"
    done = run_python("scripts/benchmark.py", "records", f"--picture={picture}")
    table = (ROOT / "docs/results.md").read_text().split("## Results")[0]
    lines = [line for line in table.splitlines() if line.startswith("| 20")]
    assert all(line.split(" | ")[0][2:] in done.stdout for line in lines)
    assert done.stdout.count("\n  20") == len(lines) >= 5
    assert picture.read_bytes().startswith(b"\x89PNG")
