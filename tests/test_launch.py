"""Real processes: several train as one, or the launch is refused."""

import sys
from pathlib import Path

import pytest
from conftest import ROOT, raising, read_metrics, run_command, run_python

from cleangpt import load_recipe, train
from cleangpt.errors import UserError, exit_code

BIN = Path(sys.executable).parent


NOISE = ["--training.batch_size=6", "--training.micro_batch_size=1", "--tracking.gradient_noise=true"]


def column(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


@pytest.fixture
def one_process(tiny_text, tmp_path) -> Path:
    done = run_python("train.py", tiny_text, "--run.name=one", *NOISE)
    assert done.returncode == 0, done.stderr
    return tmp_path / "outputs" / "one"


@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_two_processes_train_as_one(launcher, tiny_text, one_process):
    start = {
        "accelerate": [BIN / "accelerate", "launch", "--config_file", "recipes/accelerate/cpu_2.yaml"],
        "torchrun": [BIN / "torchrun", "--nproc_per_node=2"],
    }[launcher]
    done = run_command(*start, "train.py", tiny_text, "--run.name=two", *NOISE)
    assert done.returncode == 0, done.stderr
    two = one_process.parent / "two"
    for name in ("train/loss", "eval/loss", "gradient_noise"):
        assert column(two, name) == pytest.approx(column(one_process, name), abs=1e-4, rel=1e-3)
    assert len(read_metrics(two)) == len(read_metrics(one_process))


def test_a_launcher_that_starts_one_process_for_two_is_refused(tiny_text, tmp_path):
    done = run_command(BIN / "accelerate", "launch", "--cpu", "--num_processes=2", "train.py", tiny_text)
    assert done.returncode != 0
    assert "error: num_processes:" in done.stderr
    assert not (tmp_path / "outputs").exists()


def test_a_batch_that_the_processes_do_not_divide_is_told_once(tiny_text, tmp_path):
    done = run_command(BIN / "torchrun", "--nproc_per_node=2", "train.py", tiny_text, "--training.batch_size=5")
    assert done.returncode != 0
    assert done.stderr.count("error: training.batch_size: expected a multiple of the 2 processes, got 5") == 1
    assert not (tmp_path / "outputs").exists()


ELSEWHERE = """
import os, runpy, sys
if os.environ["RANK"] == "1":
    os.chdir(sys.argv.pop())
else:
    sys.argv.pop()
sys.path.insert(0, ROOT)
runpy.run_path(ROOT + "/train.py", run_name="__main__")
"""


@pytest.mark.parametrize("sees", ["nothing", "other text"])
def test_a_mistake_that_only_another_process_sees_is_told_with_its_rank(sees, tiny_text, text_file, tmp_path):
    """The second process stands in a folder of its own, where the data is missing, or is another text."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    (tmp_path / "one" / "text.txt").write_text(text_file.read_text())
    if sees == "other text":
        (tmp_path / "two" / "text.txt").write_text("something else " * 100)
    script = tmp_path / "elsewhere.py"
    script.write_text(f"ROOT = {str(ROOT)!r}\n{ELSEWHERE}")
    done = run_command(
        *("env", "-C", tmp_path / "one", BIN / "torchrun", "--nproc_per_node=2", script, tiny_text),
        *("--data.data_files=text.txt", tmp_path / "two"),
    )
    assert done.returncode != 0
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    expected = {
        "nothing": "error: rank 1: data.data_files: expected an existing file, got 'text.txt'",
        "other text": "error: rank 1: data.fingerprint: expected the main process's data",
    }[sees]
    assert line.startswith(expected)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("rank", "local_rank", "told"),
    [("0", "0", "error: data: gone\n"), ("1", "1", ""), ("2", "0", "error: rank 2: data: gone\n")],
)
def test_the_first_process_of_each_machine_tells_a_mistake(rank, local_rank, told, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert exit_code(raising(UserError(("data", "gone")))) == 2
    assert capsys.readouterr().err == told


def test_one_process_exits_with_0_and_says_how_to_load(tiny_adder):
    done = run_python("train.py", tiny_adder)
    assert done.returncode == 0, done.stderr
    assert "AutoModelForCausalLM.from_pretrained" in done.stdout
    assert "accuracy" in done.stdout


def test_a_run_started_with_two_processes_goes_on_with_one(tiny_text, tmp_path):
    both = [BIN / "torchrun", "--nproc_per_node=2", "train.py", tiny_text, "--checkpoint.keep_last=9"]
    assert run_command(*both, "--run.name=two").returncode == 0
    checkpoint = tmp_path / "outputs" / "two" / "checkpoints" / "step-00000003"
    done = run_python(
        "train.py", tiny_text, "--checkpoint.keep_last=9", "--run.name=alone", f"--training.resume={checkpoint}"
    )
    assert done.returncode == 0, done.stderr
    two = column(tmp_path / "outputs" / "two", "train/loss")
    assert column(tmp_path / "outputs" / "alone", "train/loss") == pytest.approx(two[3:], abs=1e-5)
    back = run_command(*both, "--run.name=back", f"--training.resume={checkpoint}")
    assert back.returncode == 0, back.stderr
    assert column(tmp_path / "outputs" / "back", "train/loss") == two[3:]


def test_accumulation_is_the_recipes_and_not_the_environments(tiny_text, tmp_path, monkeypatch):
    train(load_recipe(tiny_text, ["--run.name=plain"]))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # by which accelerate would divide
    train(load_recipe(tiny_text, ["--run.name=divided"]))
    plain, divided = (read_metrics(tmp_path / "outputs" / name) for name in ("plain", "divided"))
    assert [line.get("grad_norm") for line in divided] == [line.get("grad_norm") for line in plain]
